"""What groups add up to: mean, scatter, loss and auxiliary data, joined one after the other or at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax._axes import (
    checked_axes,
    explicit_spec,
    reshard,
    reshard_like,
    shared_axis,
    to_varying,
)
from adabatch_jax._tree import align, widen
from adabatch_jax._types import PyTree
from adabatch_jax.noise._gradient_noise import GradientNoise, blend, join_noise, pool_noise


class Tally(NamedTuple):
    """What one group gives, and what the groups so far add up to."""

    noise: GradientNoise
    value: jax.Array  # mean loss
    averaged: PyTree  # leaves of aux: means weighted by examples
    summed: PyTree  # sums
    taken: PyTree  # those of the first group with examples


def prepare(where: str, params: PyTree, groups: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Casts the parameters to vary over the device axes, so that their gradients stay apart."""
    checked = checked_axes(axes)
    same = shared_axis(groups, checked)
    if same is not None:
        raise ValueError(
            f"{where}: groups is the same on all devices of axis {same!r}: each "
            "device needs its own examples (shard the batch in in_specs)"
        )
    return to_varying(params, checked)


def single(mean: PyTree, size: jax.Array) -> GradientNoise:
    """The noise of one group: a mean without scatter."""
    return GradientNoise(
        mean=widen(mean),
        scatter=jnp.zeros((), jnp.float32),
        num_examples=size,
        num_groups=(size > 0).astype(jnp.int32),
    )


def merge(measure: Any, a: Tally, b: Tally) -> Tally:
    n_a, n_b = (t.noise.num_examples.astype(jnp.float32) for t in (a, b))
    value, averaged = blend(n_a, (a.value, a.averaged), n_b, (b.value, b.averaged))
    summed = jax.tree.map(lambda x, y: x + kept(n_b > 0, y), a.summed, b.summed)
    taken = optax.tree.where(n_a > 0, a.taken, b.taken)
    return Tally(join_noise(a.noise, b.noise, measure), value, averaged, summed, taken)


def pool(
    tally: Tally,
    total: Callable[[jax.Array], jax.Array],
    foremost: Callable[[jax.Array], jax.Array],
) -> Tally:
    """Merges the lanes of a leading axis, or devices: see `pool_noise`.

    `foremost` tells whether this is the first of them that is marked.
    """
    n = tally.noise.num_examples.astype(jnp.float32)
    noise, value = pool_noise(tally.noise, tally.value[..., None], total)
    all_n = jnp.maximum(noise.num_examples.astype(jnp.float32), 1.0)
    averaged = jax.tree.map(
        lambda x: total(kept(n > 0, align(n, x) * x)) / all_n.astype(x.dtype), tally.averaged
    )
    summed = jax.tree.map(lambda x: total(kept(n > 0, x)), tally.summed)
    taken = tally.taken
    if jax.tree.leaves(taken):
        one = foremost(n > 0)
        number = lambda x: x.astype(jnp.int32) if x.dtype == bool else x
        taken = jax.tree.map(lambda x: total(number(kept(one, x))).astype(x.dtype), taken)
    return Tally(noise, value[0], averaged, summed, taken)


def kept(mark: jax.Array, x: jax.Array) -> jax.Array:
    """`x` where it is marked along its leading axes, 0 elsewhere."""
    return jnp.where(jnp.expand_dims(mark, range(mark.ndim, x.ndim)), x, jnp.zeros_like(x))


def accumulate(
    groups: tuple[PyTree, jax.Array],
    bound: Any,
    compute: Callable[[PyTree, jax.Array], Tally],
    measure: Any = None,
    *,
    vectorize: int,
    lanes: bool,
    varying: frozenset[str],
    together: bool = False,
) -> Tally:
    """Runs `compute(group, size)` over the first `bound` groups and merges the results.

    One of four loop bodies runs, chosen while tracing:

    * `lane_step`, with `lanes`: group i of every lane, each merged into a tally of its own lane.
    * `chunk_step` with `together`: `compute` takes a block of `vectorize` groups with their sizes and
      returns their merged tally.
    * `chunk_step`, if `vectorize` > 1: the groups of a block under `vmap`, pooled.
    * `single_step` else: one group after the other.
    """
    groups, lane = side_by_side(groups) if lanes else (groups, None)
    _, sizes = groups
    join = partial(merge, measure)

    def widened(group: PyTree, size: jax.Array) -> Tally:
        t = compute(group, size)
        return t._replace(value=widen(t.value), averaged=widen(t.averaged))

    def at(index: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, False), groups)

    def lane_step(i: jax.Array, so_far: Tally) -> Tally:
        return jax.vmap(lambda t, *group: join(t, widened(*group)))(so_far, *at(i))

    def chunk_step(i: jax.Array, so_far: Tally) -> Tally:
        index = i * vectorize + jnp.arange(vectorize, dtype=jnp.int32)
        inside = index < bound
        group, size = jax.tree.map(lambda x: x[jnp.minimum(index, len(sizes) - 1)], groups)
        size = jnp.where(inside, size, 0)
        if together:
            return join(so_far, widened(group, size))
        return join(so_far, pool_leading(jax.vmap(widened)(group, size)))

    def single_step(i: jax.Array, so_far: Tally) -> Tally:
        return join(so_far, widened(*at(i)))

    # Every body merges into what there is so far, so the loop starts from a tally of no examples: zeros,
    # which a merge ignores. Their shapes are those of one result, which `eval_shape` finds without running
    # `compute`. To start from the first group instead would compile `compute` twice, and need one group.
    if together:
        shapes = jax.eval_shape(widened, *jax.tree.map(lambda x: x[:vectorize], groups))
    else:
        shapes = jax.eval_shape(jax.vmap(widened) if lanes else widened, *first(groups, 1))
    start = to_varying(jax.tree.map(partial(zeros_of, lane), shapes), varying)
    if lanes:
        return pool_leading(jax.lax.fori_loop(0, bound, lane_step, start))
    if vectorize > 1 or together:
        return jax.lax.fori_loop(0, (bound + vectorize - 1) // vectorize, chunk_step, start)
    return jax.lax.fori_loop(0, bound, single_step, start)


def side_by_side(groups: PyTree) -> tuple[PyTree, tuple[Any, Any] | None]:
    """Groups [loops, lanes, …] whose lanes are sharded alike, as `vmap` asks; mesh and axes of the lanes.

    None where the type of no leaf tells a sharding of its lanes: only that of Explicit axes does.
    """
    leaves = jax.tree.leaves(groups)
    found = [(x, spec[1]) for x in leaves if (spec := explicit_spec(x)) and spec[1] is not None]
    if not found:
        return groups, None
    (one, axes), *_ = found
    mesh = jax.typeof(one).sharding.mesh

    def laid(x: jax.Array) -> jax.Array:
        return reshard(x, mesh, (None, axes, *(explicit_spec(x) or (None,) * x.ndim)[2:]))

    return jax.tree.map(laid, groups), (mesh, axes)


def zeros_of(lane: tuple[Any, Any] | None, s: Any) -> jax.Array:
    """Zeros of this shape, sharded as its type says; with `lane`, what `side_by_side` gives for them."""
    zeros, sharding = jnp.zeros(s.shape, s.dtype), s.sharding
    spec = (None,) * len(s.shape) if sharding is None else tuple(sharding.spec)
    if lane is not None:
        mesh, axes = lane
        return reshard(zeros, mesh, (axes, *spec[1:]))
    return zeros if sharding is None else reshard(zeros, sharding.mesh, spec)


def pool_leading(tally: Tally) -> Tally:
    """Merges the lanes of a leading axis."""

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=0, dtype=x.dtype)

    def foremost(mark: jax.Array) -> jax.Array:
        place = reshard_like(jnp.arange(len(mark)), mark)
        return place == jnp.min(jnp.where(mark, place, len(mark)))

    return pool(tally, total, foremost)


def pool_devices(tally: Tally, axes: tuple[str, ...]) -> Tally:
    """Merges the devices of mesh axes."""
    if not axes:
        return tally
    checked = checked_axes(axes)

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.psum(to_varying(x, checked), axes)

    def foremost(mark: jax.Array) -> jax.Array:
        own = jax.lax.axis_index(axes)
        place = jnp.where(mark, own, jnp.iinfo(jnp.int32).max)
        return jax.lax.pmin(to_varying(place, checked), axes) == own

    return pool(tally, total, foremost)


def first(groups: PyTree, ndim: int) -> PyTree:
    """The first group, of which only the shape counts; lanes may be sharded."""

    def one(x: jax.Array) -> jax.Array:
        if spec := explicit_spec(x):
            x = reshard(x, jax.typeof(x).sharding.mesh, (*(None,) * ndim, *spec[ndim:]))
        return x[(0,) * ndim]

    return jax.tree.map(one, groups)
