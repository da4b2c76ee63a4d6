"""A few Adam steps on the hyper-parameters of a Gaussian process, resumed from test to test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

Parameters = tuple[jax.Array, ...]
# The leaves of Adam's state. Kept without names: a `count` or `mu` of ours beside those of the
# user's own Adam would make optax.tree.get ambiguous.
Moments = tuple[jax.Array, ...]


def no_moments(parameters: Parameters) -> Moments:
    """Adam's state before its first step."""
    return tuple(jax.tree.leaves(optax.adam(0.0).init(parameters)))


def descend(
    loss: Callable[[Parameters], jax.Array],
    parameters: Parameters,
    moments: Moments,
    *,
    rate: float,
    steps: int,
    project: Callable[[Parameters], Parameters] = lambda parameters: parameters,
) -> tuple[Parameters, Moments]:
    """Parameters and moments after `steps` steps, `project` applied after each."""
    optimizer = optax.adam(rate)
    form = jax.tree.structure(optimizer.init(parameters))

    def step(_: Any, carry: tuple[Parameters, Any]) -> tuple[Parameters, Any]:
        here, adam = carry
        updates, adam = optimizer.update(jax.grad(loss)(here), adam)
        return project(optax.apply_updates(here, updates)), adam  # type: ignore[arg-type]

    start = (parameters, jax.tree.unflatten(form, moments))
    parameters, adam = jax.lax.fori_loop(0, steps, step, start)
    return parameters, tuple(jax.tree.leaves(adam))
