"""How long the first steps are against the parameters: what bounds a rate that the loss alone allows."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax._tree import squared_norm

PyTree = Any
_STEPS = 24  # that are looked at: a momentum of 0.9 is nearly full then


class StepLength(NamedTuple):
    """The largest ‖d‖/‖w‖ of the first directions d, over the parameters with at least two axes."""

    seen: jax.Array  # int32: directions, up to 24
    longest: jax.Array  # float32; 0 if none could be measured


def no_length() -> StepLength:
    """Before the first step."""
    return StepLength(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))


def measure(length: StepLength, direction: PyTree, params: PyTree, wanted: jax.Array) -> StepLength:
    """The length with one more direction; without it where the ratio is not finite, as at w = 0.

    Biases and scales of a normalisation do not count: they start at zero or one whatever the network.
    """

    def with_this(length: StepLength) -> StepLength:
        pairs = zip(jax.tree.leaves(direction), jax.tree.leaves(params), strict=True)
        of_matrices = [(d, w) for d, w in pairs if w.ndim >= 2]
        step, size = (squared_norm([pair[i] for pair in of_matrices]) for i in (0, 1))
        ratio = jnp.sqrt(step / size)
        longest = jnp.fmax(length.longest, jnp.where(jnp.isfinite(ratio), ratio, 0.0))
        return StepLength(optax.safe_increment(length.seen), longest)

    # A cond, so that later steps do not read the parameters once more.
    wanted &= length.seen < _STEPS
    return jax.lax.cond(wanted, with_this, lambda length: length, length)


def bounded(length: Any, rate: jax.Array, relative_step: Any) -> jax.Array:
    """The rate, but no higher than makes those steps `relative_step` times as long as the parameters.

    The rate itself if `length` is not a `StepLength`, or holds nothing.
    """
    if not isinstance(length, StepLength):
        return rate
    bound = jnp.asarray(relative_step).astype(jnp.float32) / length.longest
    return jnp.where(length.longest > 0, jnp.minimum(rate, bound), rate)
