"""What a batch of single examples adds up to, and how far each gradient goes along the mean one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax._axes import to_varying
from adabatch_jax._tree import align, squared_norm, widen
from adabatch_jax._types import PyTree
from adabatch_jax.noise._accumulate import Tally
from adabatch_jax.noise._aux import Parts
from adabatch_jax.noise._gradient_noise import GradientNoise
from adabatch_jax.noise._structured._plan import make_plan
from adabatch_jax.noise._structured._statistics import along, backward, squares, sums

PARTS = tuple[jax.Array, Parts]


def batch_tally(
    loss_parts: Callable[[PyTree, PyTree], PARTS],
    params: PyTree,
    examples: PyTree,
    sizes: jax.Array,
    *,
    coordinate_wise: bool,
    measure: Any,
    masked: bool,
    varying: frozenset[str],
) -> tuple[Tally, Callable[[PyTree], jax.Array]]:
    """The tally of examples [n, 1, …], and a function of a direction: ⟨gᵢ, direction⟩, float32 [n].

    With S = Σ ‖gᵢ‖² the scatter is S − n ‖ḡ‖², and so coordinate by coordinate, not below 0.

    Args:
      loss_parts: of parameters and one example: loss, and the parts of aux, as `split_aux` gives them.
      params: pytree of real floats.
      examples: pytree.
      sizes: int32 [n]: 1, or 0 for what is to be ignored.
      coordinate_wise: whether the scatter is wanted coordinate by coordinate as well.
      measure: whether the scatter is wanted, may be traced; None is True.
      masked: whether a size can be 0.
      varying: the device axes over which everything varies.
    """
    leaves, structure = jax.tree.flatten(params)
    sizes = jnp.minimum(sizes, 1)
    if masked:  # what is ignored may be NaN, and 0 · NaN is NaN
        rows = jnp.where(sizes > 0, jnp.arange(len(sizes)), jnp.argmax(sizes > 0))
        examples = jax.tree.map(lambda x: x[rows], examples)
        number = jnp.sum(sizes)
        weights = (sizes / jnp.maximum(number, 1)).astype(jnp.float32)
    else:
        number = jnp.full((), len(sizes), jnp.int32)
        weights = jnp.full(len(sizes), 1.0 / len(sizes), jnp.float32)
    rows_of, batch = jax.tree.flatten(examples)
    first = [x[0] for x in rows_of]
    shape = jax.eval_shape(loss_parts, params, jax.tree.unflatten(batch, first))

    def fn(leaves: list[Any], example: list[Any]) -> list[Any]:
        parts = loss_parts(
            jax.tree.unflatten(structure, leaves), jax.tree.unflatten(batch, example)
        )
        return jax.tree.leaves(parts)

    plan = make_plan(fn, leaves, first)
    weights = to_varying(weights, varying)
    results, signals = backward(plan, leaves, rows_of, weights, varying)
    of_formulas = sums(plan, leaves, signals, "formula")
    n = number.astype(jnp.float32)

    def mean_of(direct: dict[int, jax.Array]) -> list[jax.Array]:
        found = of_formulas | direct
        return [known(widen(found.get(i, jnp.zeros_like(p)))) for i, p in enumerate(leaves)]

    def known(tree: PyTree) -> PyTree:
        """0 where there was no example at all."""
        here = lambda x: jnp.where(number > 0, x, jnp.zeros_like(x))
        return jax.tree.map(here, tree) if masked else tree

    def measured() -> Any:
        norms, each, direct = squares(plan, leaves, signals, coordinate_wise)
        mean = mean_of(direct)
        above = lambda s, q: jnp.maximum(n * n * s - n * q, 0.0).astype(jnp.float32)
        coordinates = [above(each[i], jnp.square(m)) for i, m in enumerate(mean) if each]
        return direct, above(norms, squared_norm(mean)), coordinates

    def not_measured() -> Any:
        _, *scatters = jax.eval_shape(measured)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), scatters)
        direct = {i: widen(x) for i, x in sums(plan, leaves, signals, "direct").items()}
        return direct, *to_varying(zeros, varying)

    found = measured() if measure is None else jax.lax.cond(measure, measured, not_measured)
    direct, scatter, coordinates = found
    mean = mean_of(direct)
    whole = functools.partial(jax.tree.unflatten, structure)
    scatter, coordinates = known((scatter, coordinates))
    noise = GradientNoise(
        whole(mean), scatter, number, number, whole(coordinates) if coordinate_wise else None
    )

    def average(x: jax.Array) -> jax.Array:
        return known(jnp.sum(align(weights, widen(x)) * widen(x), axis=0))

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(x * align(sizes, x), axis=0, dtype=x.dtype)

    value, (averaged, summed, taken) = jax.tree.unflatten(jax.tree.structure(shape), results)
    foremost = jnp.argmax(sizes > 0)
    tally = Tally(
        noise,
        average(value),
        [average(x) for x in averaged],
        [total(x) for x in summed],
        [known(x[foremost]) for x in taken],
    )

    def project(direction: PyTree) -> jax.Array:
        direction = jax.tree.map(lambda d, p: d.astype(p.dtype), direction, params)
        found = along(plan, leaves, signals, jax.tree.leaves(direction))
        return jnp.where(weights > 0, found / jnp.where(weights > 0, weights, 1.0), 0.0)

    return tally, project
