"""Value, mean gradient and gradient noise in one pass over groups, with a traced number of groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adabatch_jax import _validate
from adabatch_jax._axes import axis_tuple
from adabatch_jax._types import AxisName, LossFn, PyTree
from adabatch_jax.noise._arguments import check_bools
from adabatch_jax.noise._gradient_noise import GradientNoise
from adabatch_jax.noise._passes import Options, value_and_noise


def value_and_grad_noise(
    loss_fn: LossFn,
    *,
    has_aux: bool = False,
    sum_aux: PyTree = False,
    trained: PyTree = None,
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
    * Sharded `jit`: `lanes=True`, parameters replicated, axis 1 of the groups sharded over a mesh, whose
      axes may be Auto or, within `jax.set_mesh`, Explicit. Against a plain data-parallel step the program
      has one all-reduce of a few numbers more, outside the loop.
    * Sharded `jit`, parameters and optimizer state sharded over the same axis (FSDP): the same, with
      `params = jax.lax.with_sharding_constraint(params, NamedSharding(mesh, P()))` at the top of the step
      (on Explicit axes `jax.sharding.reshard(params, P())`), and `out_shardings` like those of the
      arguments. The parameters are gathered once, not once a group; without that line XLA may split the
      model instead, and exchange examples in the loop. The mean gradient is gathered once, too: every
      lane's mean is compared with it. (S − N·q would save that, but is the difference of two large sums.)

    Args:
      loss_fn: `loss_fn(params, group, *args)`, the **mean** loss of one group (scalar), or
        `(loss, aux)` with `has_aux`. A PRNG key that it closes over, or takes from `*args`, is the same in
        every group, and so is their dropout: that noise is not seen. Give each group a key of its own, as a
        leaf of `groups`, `jax.random.split(key, num_groups)`. A key among `*args` brings a warning.
      has_aux: whether `loss_fn` returns auxiliary data. Float and complex leaves come back as means
        weighted by examples (logits too: return what may be averaged). Integers, booleans and PRNG keys
        are those of one group, the first with examples (of the first lane or device that has any), so that
        a counter advances as in one step.
      sum_aux: which leaves of aux are added up over the groups instead, such as a number of correct
        predictions: a bool, or a pytree of bools like aux or a prefix of it. Booleans count as 0 and 1.
        PRNG keys, typed ones and uint32 pairs [..., 2], are never added.
      trained: which parameters are trained: a pytree of bools like the parameters, or a prefix of it.
        Nothing is computed for the others: their gradient is 0, and the noise is that of the trained ones.
        Default: all.
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
        For a loss that is averaged over tokens give the number of tokens behind each group's mean: value
        and gradient are then those of the whole batch, whatever the lengths, and all that counts examples
        (`num_examples`, tr Σ, batch sizes, schedules) counts tokens.
      * `measure`: bool, may be traced: whether the noise is wanted. False leaves −1 in every scatter, and
        the call costs little more than the gradient alone (but for what `vectorize`, `lanes` and
        `coordinate_wise` compute anyway). `needs_noise(opt_state)` tells. Where it is the same for all
        steps give a Python bool or, for True, nothing: the choice alone costs a wide MLP 5 to 9 % of a step
        on a CPU (tests/benchmarks/accumulation.py).
      * `noise.mean` is the gradient, in the dtype of the parameters; `value` the mean loss over all
        examples; statistics are float32. With no examples at all the value is NaN, gradient and aux
        are 0. Complex parameters have the gradient of `jax.grad`, which is the conjugate of the direction
        of ascent.

    Raises:
      ValueError: `vectorize < 1`, or together with `lanes`; leaves of `groups` that disagree on
        their leading axes or, without `sizes`, on the examples per group; `sizes` of another shape;
        with shard_map's varying check on, groups that are the same on all devices; `trained` or
        `sum_aux` that are no bools, or of another structure; a trained parameter that is an integer, or
        a leaf that is no array; a loss that is no real scalar, or comes with aux unasked.

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

      Sequences of 1 and 3 tokens, the loss a mean over tokens:

      >>> def loss_per_token(w, sequence):
      ...     x, real = sequence
      ...     return 0.5 * jnp.sum(real * (w - x) ** 2) / jnp.sum(real)
      >>> x, real = jnp.array([[1.0, 0.0, 0.0], [3.0, 5.0, 7.0]]), jnp.array([[1, 0, 0], [1, 1, 1]])
      >>> value, noise = value_and_grad_noise(loss_per_token)(
      ...     jnp.array(0.0), (x, real), sizes=jnp.sum(real, axis=1))
      >>> float(value), float(noise.mean), int(noise.num_examples)
      (10.5, -4.0, 4)

    Source: Lau, Liu, Kolar (2024), arXiv 2402.11215 (tests); Chan, Golub, LeVeque (1983)
    (accumulation).
    """
    where = "value_and_grad_noise"
    _validate.positive_int(where, vectorize=vectorize)
    if lanes and vectorize != 1:
        raise ValueError(f"{where}: lanes=True already runs its lanes at once, got {vectorize=}")
    check_bools(where, "sum_aux", sum_aux)
    check_bools(where, "trained", trained)
    return estimator(
        loss_fn,
        has_aux=has_aux,
        sum_aux=sum_aux,
        trained=trained,
        axis_name=axis_name,
        vectorize=vectorize,
        coordinate_wise=coordinate_wise,
        inner_products=inner_products,
        lanes=lanes,
    )


def estimator(
    loss_fn: LossFn, *, axis_name: AxisName = None, **options: Any
) -> Callable[..., tuple[Any, GradientNoise]]:
    """`value_and_grad_noise`, its arguments checked: the other fields of `Options`."""
    given = Options(loss_fn=loss_fn, axes=axis_tuple(axis_name), **options)

    def fn(
        params: PyTree,
        groups: PyTree,
        *args: Any,
        count: Any = None,
        sizes: Any = None,
        measure: Any = None,
    ) -> tuple[Any, GradientNoise]:
        return value_and_noise(
            given, params, groups, args, count=count, sizes=sizes, measure=measure
        )

    return fn
