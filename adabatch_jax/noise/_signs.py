"""Gradient noise from random balanced signs: one backward pass more, and the batch stays whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._axes import axis_tuple, reshard_like, to_varying, varying_axes
from adabatch_jax._tree import abs_squared, cast_like, squared_norm, widen
from adabatch_jax._types import AxisName, LossFn, PyTree
from adabatch_jax.noise._accumulate import Tally, accumulate, first, pool_devices, prepare
from adabatch_jax.noise._arguments import (
    check_bools,
    check_in_turn,
    explained,
    take_apart,
    taken_apart_loss,
    to_arrays,
)
from adabatch_jax.noise._aux import join_aux, split_aux
from adabatch_jax.noise._gradient_noise import GradientNoise


def value_and_grad_signs(
    losses_fn: LossFn,
    *,
    num_signs: int = 1,
    has_aux: bool = False,
    sum_aux: PyTree = False,
    trained: PyTree = None,
    axis_name: AxisName = None,
    coordinate_wise: bool = False,
) -> Callable[..., tuple[Any, GradientNoise]]:
    """Value, mean gradient and its noise from one forward pass, for a batch that cannot be split.

    Half of the n examples, drawn anew for every micro-batch, get the sign +1 and half −1; of an odd
    number one gets 0. With m signs in use, Σ s_i = 0, and over the draw E s_i² = m/n, E s_i s_j =
    −m/(n (n − 1)). Hence, with h_i = g_i − ḡ,

        E ‖Σ s_i g_i‖² = (m/n) (Σ ‖h_i‖² + Σ ‖h_i‖² / (n − 1)) = m · Σ ‖h_i‖² / (n − 1):

    ‖Σ s_i g_i‖² / m is the trace of the examples' covariance, ddof 1, without bias. The forward pass is
    pulled back once for the mean gradient and once for each of the k sign vectors.

    **Degrees of freedom.** Over Gaussian examples and signs the estimate has the relative variance
    2/(r ν_k) with 1/ν_k = 1/k + (1 − 1/k)/(n − 1); r = (tr Σ)²/tr(Σ²) is the effective rank of the
    covariance. So the relative standard error is √(2/ν_k), with ν_k about k, where all gradients lie on
    one line, and smaller elsewhere. `noise` counts ν_k, rounded, degrees of freedom for each
    micro-batch, as if it were one group more than that. Merging adds one for every further
    micro-batch, from the scatter between them, of which signs see nothing: nothing is counted twice.

    **When.** One sign vector is worth two groups, drawn at random: it *is* their scatter. Where a
    batch can be split, `value_and_grad_noise` gives as much or more for less time. Signs are for
    batches that cannot be (the nodes of many graphs in one array, packed sequences), and for those
    so small that half of one takes as long as the whole. `recommend_estimator` compares.

    With `axis_name` the result is merged over the devices, as by `value_and_grad_noise`. Under sharded
    `jit` the examples of a micro-batch may be sharded instead; every sign vector then costs one more
    all-reduce of a gradient.

    Args:
      losses_fn: `losses_fn(params, micro_batch, *args)`, the losses [B] of the examples, which must
        not depend on each other; or `(losses, aux)` with `has_aux`.
      num_signs: k ≥ 1, sign vectors for each micro-batch; static.
      has_aux: whether `losses_fn` returns auxiliary data. Float and complex leaves come back as means
        weighted by examples; integers, booleans and PRNG keys are those of the first micro-batch with
        examples.
      sum_aux: which leaves of aux are added up over the micro-batches instead, and
      trained: which parameters are trained: both as for `value_and_grad_noise`.
      axis_name: name, or names, of the device axis under `pmap` or `shard_map`: value, gradient and
        noise come back merged over all devices. Each device draws signs of its own.
      coordinate_wise: also keep `coordinate_scatter`: unbiased for every coordinate by itself, with
        about k degrees of freedom each.

    Returns:
      A function `fn(params, groups, key, *args, count=None, sizes=None)` returning `(value, noise)`, or
      `((value, aux), noise)` with `has_aux`.

      * `groups`: pytree, micro-batches along the first axis of every leaf; a whole batch is
        `split_groups(batch, 1)`.
      * `key`: PRNG key of the signs. Give every step its own.
      * `count`: int, may be traced: only the first `count` micro-batches are computed.
      * `sizes`: integers [num_groups], real examples in each micro-batch: the first rows of it. Default:
        all B. Losses of other rows are ignored; their derivatives must be finite. A micro-batch of size
        0 is ignored, even if NaN.
      * `noise.mean` is the gradient, in the dtype of the parameters; statistics are float32.
        `inner_product_scatter` is None. With no examples at all the value is NaN, gradient and aux are 0.

    Raises:
      ValueError: `num_signs < 1`; `groups` without leaves, or leaves that disagree on their first
        axis; `sizes` of another shape; losses that are no real vector; `trained`, `sum_aux`, parameters
        and leaves that `value_and_grad_noise` refuses; with shard_map's varying check on,
        groups that are the same on all devices.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from adabatch_jax import split_groups
      >>> def losses_fn(w, x):
      ...     return 0.5 * (w - x) ** 2
      >>> fn = jax.jit(value_and_grad_signs(losses_fn, num_signs=2))
      >>> examples = split_groups(jnp.array([1.0, 1.0, 3.0, 3.0]), 1)
      >>> value, noise = fn(jnp.array(0.0), examples, jax.random.key(0))
      >>> float(value), float(noise.mean)
      (2.5, -2.0)
      >>> int(noise.num_groups) - 1  # degrees of freedom
      2
      >>> def trace(key):
      ...     return fn(jnp.array(0.0), examples, key)[1].trace
      >>> keys = jax.random.split(jax.random.key(0), 3000)
      >>> bool(abs(jnp.mean(jax.vmap(trace)(keys)) - jnp.var(examples, ddof=1)) < 0.1)
      True

    Source: ours. Random signs as in Hutchinson (1990); the balance makes the mean gradient drop out.
    """
    where = "value_and_grad_signs"
    _validate.positive_int(where, num_signs=num_signs)
    check_bools(where, "sum_aux", sum_aux)
    check_bools(where, "trained", trained)
    axes = axis_tuple(axis_name)

    def pull_back(
        pull: Any, losses: jax.Array, real: jax.Array, share: jax.Array, signs: jax.Array
    ) -> tuple[PyTree, jax.Array, PyTree]:
        """The mean gradient, Σ_k ‖v_k‖², and the squares of v_k by coordinate if asked for."""

        def along(weights: jax.Array) -> PyTree:
            weights = to_varying(weights.astype(losses.dtype) * share, varying_axes(losses))
            return pull(reshard_like(weights, losses))[0]

        def squares(signs: jax.Array) -> tuple[jax.Array, PyTree]:
            signed = widen(along(signs))
            square = jax.tree.map(lambda x: abs_squared(x).astype(jnp.float32), signed)
            return squared_norm(signed), square if coordinate_wise else None

        # One after the other: at once (vmap) dense layers take longer, and the memory is that of all.
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(squares, signs[0])
        )
        start = to_varying(zeros, varying_axes((losses, signs)))
        total, coordinates = jax.lax.fori_loop(
            0,
            num_signs,
            lambda k, so_far: jax.tree.map(jnp.add, so_far, squares(signs[k])),
            start,
        )
        return along(real), total, coordinates

    def fn(
        params: PyTree,
        groups: PyTree,
        key: jax.Array,
        *args: Any,
        count: Any = None,
        sizes: Any = None,
    ) -> tuple[Any, GradientNoise]:
        groups = to_arrays(where, "groups", groups)
        parts = take_apart(where, params, trained)
        num_groups = _num_groups(groups)
        check_in_turn(where, groups)
        for axis in axes:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        params = prepare(where, parts.trained, groups, axes)

        def losses_and_aux(p: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
            with explained(where):
                out = losses_fn(parts.whole(p), batch, *args)
            return taken_apart_loss(where, "losses_fn", out, has_aux)

        shape = jax.eval_shape(losses_and_aux, params, first(groups, 1))
        length = _num_losses(shape[0])
        sizes = _checked_sizes(sizes, num_groups, length)
        bound = num_groups if count is None else jnp.clip(count, 0, num_groups).astype(jnp.int32)
        keys = jax.random.split(key, num_groups)
        varying = varying_axes((params, parts.frozen, groups, keys, args, sizes, bound))

        def gradient(group: tuple[PyTree, jax.Array], size: jax.Array) -> Tally:
            batch, key = group
            losses, pull, aux = jax.vjp(lambda p: losses_and_aux(p, batch), params, has_aux=True)
            real = jnp.arange(length, dtype=jnp.int32) < size
            n = jnp.maximum(size, 1)
            examples = n.astype(jnp.float32)
            signs = _balanced_signs(key, num_signs, real, size)
            # A sign times the share is exact in any dtype, so that the sum of all stays 0.
            share = (1.0 / examples).astype(losses.dtype)
            mean, squares, coordinates = pull_back(pull, losses, real, share, signs)

            used = jnp.maximum(size - size % 2, 1).astype(jnp.float32)
            freedom = freedom_of_signs(num_signs, n)
            # E Σ_k ‖v_k‖² is so many traces; the scatter is to be `freedom` of them.
            traces = num_signs * used * jnp.square(share.astype(jnp.float32))
            scale = freedom.astype(jnp.float32) / traces
            noise = GradientNoise(
                mean=widen(mean),
                scatter=scale * squares,
                num_examples=size,
                num_groups=jnp.minimum(freedom + 1, size),
                coordinate_scatter=jax.tree.map(lambda x: scale * x, coordinates),
            )
            loss = jnp.sum(jnp.where(real, widen(losses), 0.0))
            value = loss / examples.astype(loss.dtype)
            return Tally(noise, value, *split_aux(where, aux, sum_aux))

        total = pool_devices(
            accumulate(
                ((groups, keys), sizes), bound, gradient, vectorize=1, lanes=False, varying=varying
            ),
            axes,
        )
        noise = total.noise._replace(
            mean=parts.filled(cast_like(total.noise.mean, params)),
            coordinate_scatter=parts.filled(total.noise.coordinate_scatter, jnp.float32),
        )
        value = jnp.where(noise.num_examples == 0, jnp.nan, total.value)
        if not has_aux:
            return value, noise
        return (value, join_aux(where, shape[1], sum_aux, total[2:])), noise

    return fn


def freedom_of_signs(number: Any, size: Any) -> Any:
    """k (n − 1)/(n + k − 2), rounded: the degrees of freedom of k sign vectors over n ≥ 1 examples."""
    # From 1/ν = 1/k + (1 − 1/k)/(n − 1). Rounded as ⌊a/d + ½⌋ = (2a + d) // 2d, in integers, so that
    # Python's and traced ones agree. Only for one vector over one example d is 0. There 1 // (n k) is 1,
    # and 0 everywhere else, which makes that 0 degrees of freedom instead of 0/0.
    denominator = size + number - 2 + 1 // (size * number)
    return (2 * number * (size - 1) + denominator) // (2 * denominator)


def _balanced_signs(key: jax.Array, num_signs: int, real: jax.Array, size: jax.Array) -> jax.Array:
    """+1 for half of the real examples, -1 for half, 0 for an odd one and the rest: [num_signs, B]."""

    def one(key: jax.Array) -> jax.Array:
        drawn = jax.random.uniform(key, real.shape, jnp.float32)
        drawn = jnp.where(real, drawn, 2.0)  # the rest come last
        rank = jnp.argsort(jnp.argsort(drawn)).astype(jnp.int32)
        half = size // 2
        return jnp.where(rank < half, 1, jnp.where(rank < 2 * half, -1, 0))

    return jax.vmap(one)(jax.random.split(key, num_signs))


def _num_groups(groups: PyTree) -> int:
    shapes = {jnp.shape(x)[:1] for x in jax.tree.leaves(groups)}
    if len(shapes) != 1 or shapes & {(), (0,)}:
        raise ValueError(
            "value_and_grad_signs: groups needs leaves that share a first axis [num_groups], got "
            f"{sorted(shapes)}"
        )
    return shapes.pop()[0]


def _num_losses(losses: Any) -> int:
    if len(losses.shape) != 1 or not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(
            "value_and_grad_signs: losses_fn must return the losses [B] of the examples, real numbers, "
            f"got shape {losses.shape} of {losses.dtype}"
        )
    return losses.shape[0]


def _checked_sizes(sizes: Any, num_groups: int, length: int) -> jax.Array:
    if sizes is None:
        return jnp.full((num_groups,), length, jnp.int32)
    if jnp.shape(sizes) != (num_groups,):
        raise ValueError(
            f"value_and_grad_signs: sizes must have shape {(num_groups,)}, got {jnp.shape(sizes)}"
        )
    return jnp.clip(jnp.asarray(sizes), 0, length).astype(jnp.int32)
