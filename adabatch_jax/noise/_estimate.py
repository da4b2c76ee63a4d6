"""Value, mean gradient and gradient noise in one pass over groups, with a traced number of groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._axes import AxisName, axis_tuple, to_varying, varying_axes
from adabatch_jax._tree import cast_like
from adabatch_jax.noise._gradient_noise import GradientNoise, unless_measured
from adabatch_jax.noise._groups import group_sizes, leading_shape
from adabatch_jax.noise._tally import (
    Tally,
    accumulate,
    first,
    join_aux,
    pool,
    pool_devices,
    prepare,
    single,
    split_aux,
    sum_leading,
)

PyTree = Any


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
        `coordinate_wise` compute anyway). `needs_noise(opt_state)` tells. Where it is the same for all
        steps give a Python bool or, for True, nothing: the choice alone costs a wide MLP 5 to 9 % of a step
        on a CPU (tests/benchmarks/accumulation.py).
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
    name = "value_and_grad_noise"
    _validate.positive_int(name, vectorize=vectorize)
    if lanes and vectorize != 1:
        raise ValueError(f"{name}: lanes=True already runs its lanes at once, got {vectorize=}")
    return estimator(
        loss_fn,
        has_aux=has_aux,
        axis_name=axis_name,
        vectorize=vectorize,
        coordinate_wise=coordinate_wise,
        inner_products=inner_products,
        lanes=lanes,
    )


def estimator(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    axis_name: AxisName = None,
    vectorize: int | None = None,
    coordinate_wise: bool = False,
    inner_products: bool = False,
    lanes: bool = False,
    together: Callable[..., tuple[Tally, Callable[[PyTree], jax.Array]]] | None = None,
) -> Callable[..., tuple[Any, GradientNoise]]:
    """`value_and_grad_noise`, its arguments checked.

    With `together`, which is called as `_structured`'s `batch_tally`, `vectorize` groups go through it as
    one; all of them with None.
    """
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
        masked = count is not None or sizes is not None
        sizes = group_sizes(groups, sizes, leading)
        bound = leading[0] if count is None else jnp.clip(count, 0, leading[0]).astype(jnp.int32)
        params, groups = jax.tree.map(jnp.asarray, (params, groups))
        params = prepare("value_and_grad_noise", params, groups, axes)
        varying = varying_axes((params, groups, args, sizes, bound))
        at_once = min(leading[0], vectorize or leading[0])
        over_groups = partial(
            accumulate, (groups, sizes), vectorize=at_once, lanes=lanes, varying=varying
        )

        def loss_parts(p: PyTree, group: PyTree) -> Any:
            out = loss_fn(p, group, *args)
            value, aux = out if has_aux else (out, None)
            return value, split_aux(aux)

        def gradient(group: PyTree, size: jax.Array) -> Tally:
            (value, aux), mean = jax.value_and_grad(loss_parts, has_aux=True)(params, group)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), mean)
            noise = single(mean, size)._replace(
                coordinate_scatter=zeros if coordinate_wise else None
            )
            return Tally(noise, value, *aux)

        project = None
        if together is None:
            total = over_groups(bound, gradient, measure)
        else:
            batch = partial(
                together,
                loss_parts,
                params,
                coordinate_wise=coordinate_wise,
                measure=measure,
                varying=varying,
            )
            if at_once == leading[0]:
                sizes = sizes if count is None else jnp.where(jnp.arange(at_once) < bound, sizes, 0)
                total, project = batch(groups, sizes, masked=masked)
            else:
                each = lambda group, sizes: batch(group, sizes, masked=True)[0]  # noqa: E731
                total = over_groups(bound, each, measure, together=True)
        total = pool_devices(total, axes)
        mean = cast_like(total.noise.mean, params)
        noise = total.noise._replace(mean=mean)

        if inner_products:
            direction = to_varying(mean, varying_axes(params))

            def projection(group: PyTree, size: jax.Array) -> Tally:
                loss = lambda p: loss_parts(p, group)[0]  # noqa: E731
                value, along = jax.jvp(loss, (params,), (direction,))
                return Tally(single(along, size), value, (), ())

            second = bound if measure is None else jnp.where(measure, bound, 0)
            if project:
                along = project(direction)
                tally = jax.vmap(lambda x, size: Tally(single(x, size), x, (), ()))(along, sizes)
                products = pool(tally, sum_leading)
            else:
                products = over_groups(second, projection)
            noise = noise._replace(inner_product_scatter=pool_devices(products, axes).noise.scatter)
        if measure is not None:
            noise = unless_measured(noise, jnp.asarray(measure).astype(bool))

        empty = noise.num_examples == 0
        value = jnp.where(empty, jnp.nan, total.value)
        if not has_aux:
            return value, noise
        shape = jax.eval_shape(loss_fn, params, first(groups, ndim), *args)[1]
        return (value, join_aux(shape, total.averaged, total.summed)), noise

    return fn
