"""Value, mean gradient and gradient noise in one pass over groups, with a traced number of groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._axes import (
    AxisName,
    axis_tuple,
    checked_axes,
    to_varying,
    varying_axes,
)
from adabatch_jax._tree import align, cast_like, widen
from adabatch_jax.noise._gradient_noise import (
    GradientNoise,
    blend,
    join_noise,
    pool_noise,
    unless_measured,
)
from adabatch_jax.noise._groups import group_sizes, leading_shape

PyTree = Any


class _Tally(NamedTuple):
    """What one group gives, and what the groups so far add up to."""

    noise: GradientNoise
    value: jax.Array  # mean loss
    averaged: PyTree  # float leaves of aux: weighted means
    summed: PyTree  # other leaves of aux: sums


def value_and_grad_noise(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    axis_name: AxisName = None,
    vectorize: int = 1,
    coordinate_wise: bool = False,
    inner_products: bool = False,
    lanes: bool = False,
) -> Callable[..., tuple[Any, GradientNoise]]:
    """Like `jax.value_and_grad`, over groups of examples, with the noise of the gradient beside it.

    The groups are taken one after the other; mean and scatter are updated as they come (Welford,
    Chan), so memory does not grow with their number and no large sums are subtracted. With
    `inner_products` a second pass takes the directional derivative of every group's loss along the
    final mean gradient, ⟨ḡ_j, ḡ⟩, which is exact on the whole gradient vector and keeps no gradients.

    On several devices, with the same result on any number of them:

    * `pmap`, and `shard_map` with its varying check on or off: `axis_name=`, each device its own groups.
    * Sharded `jit`: `lanes=True`, parameters replicated, axis 1 of the groups sharded over a mesh whose
      axes are `AxisType.Auto`. Against a plain data-parallel step the program has one all-reduce of a few
      numbers more, outside the loop.
    * Sharded `jit`, parameters and optimizer state sharded over the same axis (FSDP): the same, with
      `params = jax.lax.with_sharding_constraint(params, NamedSharding(mesh, P()))` at the top of the step,
      and `out_shardings` like those of the arguments. The parameters are gathered once, not once a group;
      without that line XLA may split the model instead, and exchange examples in the loop. The mean
      gradient is gathered once, too: every lane's mean is compared with it. (S − N·q would save that, but
      is the difference of two large sums.)

    Args:
      loss_fn: `loss_fn(params, group, *args)`, the **mean** loss of one group (scalar), or
        `(loss, aux)` with `has_aux`.
      has_aux: whether `loss_fn` returns auxiliary data. Float leaves come back as means weighted by
        examples, integer and boolean leaves as sums.
      axis_name: name, or names, of the device axis under `pmap` or `shard_map`. Value, gradient
        and noise come back merged over all devices: do not average them again.
      vectorize: groups computed at once under `vmap`. More memory, fewer and larger operations, which is
        not always faster: on a CPU sixteen single examples at once take 18 times as long as one by one on
        a wide MLP, 4 times on a CNN, as long on a transformer (tests/benchmarks/noise_peers.py).
      coordinate_wise: also keep `coordinate_scatter` (one more float32 copy of the parameters).
      inner_products: also compute `inner_product_scatter` (one forward-mode pass more; a loss with a
        `custom_vjp` has no forward mode and cannot be used).
      lanes: the groups carry two leading axes [num_loops, num_lanes]; the lanes run side by side
        under `vmap`, each with a mean and scatter of its own, merged once at the end. Under sharded
        `jit`, shard axis 1: no group leaves its device.

    Returns:
      A function `fn(params, groups, *args, count=None, sizes=None)` returning `(value, noise)`, or
      `((value, aux), noise)` with `has_aux`.

      * `groups`: pytree; the first axis of every leaf is num_groups (with `lanes`, the first two are
        num_loops and num_lanes). One PRNG key per group may be a leaf.
      * `count`: int, may be traced: only the first `count` groups (with `lanes`: loops) are
        computed. It is a loop bound, so one compilation serves every count.
      * `sizes`: integers [num_groups] (or [num_loops, num_lanes]): real examples in each group.
        Default: the axis after the leading ones. Groups of unequal size stay unbiased provided
        `loss_fn` averages over the real examples only. A group of size 0 is ignored, even if NaN.
      * `measure`: bool, may be traced: whether the noise is wanted. False leaves every scatter NaN, and
        the call costs little more than the gradient alone (but for what `vectorize`, `lanes` and
        `coordinate_wise` compute anyway). `needs_noise(opt_state)` tells.
      * `noise.mean` is the gradient, in the dtype of the parameters; `value` the mean loss over all
        examples; statistics are float32. With no examples at all the value is NaN, the gradient 0.

    Raises:
      ValueError: `vectorize < 1`, or together with `lanes`; leaves of `groups` that disagree on
        their leading axes or, without `sizes`, on the examples per group; `sizes` of another shape;
        with shard_map's varying check on, groups that are the same on all devices.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from adabatch_jax import split_groups
      >>> def loss_fn(w, x):
      ...     return 0.5 * jnp.mean((w - x) ** 2)
      >>> examples = jnp.array([1.0, 3.0, 5.0, 7.0])
      >>> fn = jax.jit(value_and_grad_noise(loss_fn))
      >>> value, noise = fn(jnp.array(0.0), split_groups(examples, 4))
      >>> float(value), float(noise.mean)
      (10.5, -4.0)
      >>> round(float(noise.trace), 4)  # the variance of the examples, ddof 1
      6.6667
      >>> _, half = fn(jnp.array(0.0), split_groups(examples, 4), count=2)
      >>> int(half.num_examples), float(half.mean)
      (2, -2.0)

    Source: Lau, Liu, Kolar (2024), arXiv 2402.11215 (tests); Chan, Golub, LeVeque (1983)
    (accumulation).
    """
    _validate.positive_int("value_and_grad_noise", vectorize=vectorize)
    if lanes and vectorize != 1:
        raise ValueError(
            f"value_and_grad_noise: lanes=True already runs its lanes at once, got {vectorize=}"
        )
    axes = axis_tuple(axis_name)
    ndim = 2 if lanes else 1

    def fn(
        params: PyTree,
        groups: PyTree,
        *args: Any,
        count: Any = None,
        sizes: Any = None,
        measure: Any = None,
    ) -> tuple[Any, GradientNoise]:
        leading = leading_shape(groups, ndim)
        sizes = group_sizes(groups, sizes, leading)
        bound = leading[0] if count is None else jnp.clip(count, 0, leading[0]).astype(jnp.int32)
        params, groups = jax.tree.map(jnp.asarray, (params, groups))
        params = _prepare("value_and_grad_noise", params, groups, axes)
        varying = varying_axes((params, groups, args, sizes, bound))
        accumulate = partial(
            _accumulate, (groups, sizes), vectorize=vectorize, lanes=lanes, varying=varying
        )
        pool = partial(_pool_devices, axes=axes, varying=varying)

        def gradient(group: PyTree, size: jax.Array) -> _Tally:
            out, mean = jax.value_and_grad(loss_fn, has_aux=has_aux)(params, group, *args)
            value, aux = out if has_aux else (out, None)
            averaged, summed = _split_aux(aux)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), mean)
            noise = _single(mean, size)._replace(
                coordinate_scatter=zeros if coordinate_wise else None
            )
            return _Tally(noise, value, averaged, summed)

        total = pool(accumulate(bound, gradient, measure))
        mean = cast_like(total.noise.mean, params)
        noise = total.noise._replace(mean=mean)

        if inner_products:
            direction = to_varying(mean, varying_axes(params))

            def projection(group: PyTree, size: jax.Array) -> _Tally:
                def loss(p: PyTree) -> Any:
                    out = loss_fn(p, group, *args)
                    return out[0] if has_aux else out

                value, along = jax.jvp(loss, (params,), (direction,))
                return _Tally(_single(along, size), value, (), ())

            second = bound if measure is None else jnp.where(measure, bound, 0)
            along = pool(accumulate(second, projection)).noise.scatter
            noise = noise._replace(inner_product_scatter=along)
        if measure is not None:
            noise = unless_measured(noise, jnp.asarray(measure).astype(bool))

        empty = noise.num_examples == 0
        value = jnp.where(empty, jnp.nan, total.value)
        if not has_aux:
            return value, noise
        shape = jax.eval_shape(loss_fn, params, _first(groups, ndim), *args)[1]
        return (value, _join_aux(shape, total.averaged, total.summed)), noise

    return fn


def _prepare(where: str, params: PyTree, groups: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Casts the parameters to vary over the device axes, so that their gradients stay apart."""
    checked = checked_axes(axes)
    same = sorted(checked - varying_axes(groups))
    if same:
        raise ValueError(
            f"{where}: groups is the same on all devices of axis {same[0]!r}: each "
            "device needs its own examples (shard the batch in in_specs)"
        )
    return to_varying(params, checked)


def _single(mean: PyTree, size: jax.Array) -> GradientNoise:
    """The noise of one group: a mean without scatter."""
    return GradientNoise(
        mean=widen(mean),
        scatter=jnp.zeros((), jnp.float32),
        num_examples=size,
        num_groups=(size > 0).astype(jnp.int32),
    )


def _merge(measure: Any, a: _Tally, b: _Tally) -> _Tally:
    n_a, n_b = (t.noise.num_examples.astype(jnp.float32) for t in (a, b))
    value, averaged = blend(n_a, (a.value, a.averaged), n_b, (b.value, b.averaged))
    summed = jax.tree.map(lambda x, y: x + _kept(n_b, y), a.summed, b.summed)
    return _Tally(join_noise(a.noise, b.noise, measure), value, averaged, summed)


def _pool(tally: _Tally, total: Callable[[jax.Array], jax.Array]) -> _Tally:
    """Merges the lanes of a leading axis, or devices: see `pool_noise`."""
    n = tally.noise.num_examples.astype(jnp.float32)
    noise, value = pool_noise(tally.noise, tally.value[..., None], total)
    all_n = jnp.maximum(noise.num_examples.astype(jnp.float32), 1.0)
    averaged = jax.tree.map(
        lambda x: total(_kept(n, align(n, x) * x)) / all_n.astype(x.dtype), tally.averaged
    )
    summed = jax.tree.map(lambda x: total(_kept(n, x)), tally.summed)
    return _Tally(noise, value[0], averaged, summed)


def _kept(n: jax.Array, x: jax.Array) -> jax.Array:
    """`x` where there are examples, 0 where there are none."""
    return jnp.where(align(n, x) > 0, x, jnp.zeros_like(x))


def _accumulate(
    groups: tuple[PyTree, jax.Array],
    bound: Any,
    compute: Callable[[PyTree, jax.Array], _Tally],
    measure: Any = None,
    *,
    vectorize: int,
    lanes: bool,
    varying: frozenset[str],
) -> _Tally:
    """Runs `compute(group, size)` over the first `bound` groups and merges the results."""
    _, sizes = groups
    merge = partial(_merge, measure)

    def widened(group: PyTree, size: jax.Array) -> _Tally:
        t = compute(group, size)
        return t._replace(value=widen(t.value), averaged=widen(t.averaged))

    def at(index: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, False), groups)

    def lane_step(i: jax.Array, so_far: _Tally) -> _Tally:
        return jax.vmap(merge)(so_far, jax.vmap(widened)(*at(i)))

    def chunk_step(i: jax.Array, so_far: _Tally) -> _Tally:
        index = i * vectorize + jnp.arange(vectorize, dtype=jnp.int32)
        inside = index < bound
        group, size = jax.tree.map(lambda x: x[jnp.minimum(index, len(sizes) - 1)], groups)
        chunk = jax.vmap(widened)(group, jnp.where(inside, size, 0))
        return merge(so_far, _pool(chunk, _sum_leading))

    def single_step(i: jax.Array, so_far: _Tally) -> _Tally:
        return merge(so_far, widened(*at(i)))

    shapes = jax.eval_shape(jax.vmap(widened) if lanes else widened, *_first(groups, 1))
    start = to_varying(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), varying)
    if lanes:
        return _pool(jax.lax.fori_loop(0, bound, lane_step, start), _sum_leading)
    if vectorize > 1:
        return jax.lax.fori_loop(0, (bound + vectorize - 1) // vectorize, chunk_step, start)
    return jax.lax.fori_loop(0, bound, single_step, start)


def _pool_devices(tally: _Tally, *, axes: tuple[str, ...], varying: frozenset[str]) -> _Tally:
    if not axes:
        return tally
    checked = checked_axes(axes)
    return _pool(tally, lambda x: jax.lax.psum(to_varying(x, checked), axes))


def _sum_leading(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, dtype=x.dtype)


def _first(groups: PyTree, ndim: int) -> PyTree:
    return jax.tree.map(lambda x: x[(0,) * ndim], groups)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _split_aux(aux: PyTree) -> tuple[list[jax.Array], list[jax.Array]]:
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(aux)]
    summed = [x.astype(jnp.int32) if x.dtype == bool else x for x in leaves if not _is_float(x)]
    return [x for x in leaves if _is_float(x)], summed


def _join_aux(shape: PyTree, averaged: list[jax.Array], summed: list[jax.Array]) -> PyTree:
    means, sums = iter(averaged), iter(summed)
    leaves, structure = jax.tree.flatten(shape)
    joined = [next(means).astype(s.dtype) if _is_float(s) else next(sums) for s in leaves]
    return jax.tree.unflatten(structure, joined)
