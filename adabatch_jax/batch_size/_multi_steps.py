"""`adaptive_multi_steps`: gradient accumulation whose length the noise decides."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._axes import AxisName, axis_tuple, checked_axes, to_varying, varying_axes
from adabatch_jax._tree import cast_like, squared_norm, trainable, widen
from adabatch_jax.batch_size._at_most_once import at_most_once, unmoved
from adabatch_jax.batch_size._read import controller_state, get_batch_size, metrics, needs_noise
from adabatch_jax.noise import GradientNoise
from adabatch_jax.noise._gradient_noise import blend, join_noise, pool_noise, unless_measured

PyTree = Any


class AdaptiveMultiStepsState(NamedTuple):
    """State of `adaptive_multi_steps`."""

    emitted: jax.Array  # bool: the last update was a real optimizer step
    gathered_noise: GradientNoise  # of the micro-batches since the last step
    gathered_value: jax.Array  # float32: their mean loss
    micro_batches: jax.Array  # int32: gathered since the last step
    skipped_micro_batches: jax.Array  # int32: micro-batches (per device) with NaN or inf, in all
    averaged_gradient: jax.Array  # bool: this batch's gradients were already averaged over devices
    averaged_gradients_seen: jax.Array  # int32: batches for which that was so
    inner_opt_state: Any

    def report_metrics(self) -> dict[str, Any]:
        """The numbers that `adabatch.metrics` shows."""
        return {
            "micro_batches": self.micro_batches,
            "skipped_micro_batches": self.skipped_micro_batches,
            "averaged_gradients": self.averaged_gradients_seen,
        }


def adaptive_multi_steps(
    optimizer: optax.GradientTransformation,
    *,
    micro_batch_size: int,
    axis_name: AxisName = None,
    coordinate_wise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Like `optax.MultiSteps`, with the number of micro-batches decided by the noise of the gradient.

    Put it around an optimizer that contains `adapt_batch_size`, and leave the training loop as it
    is: every `update` call is one micro-batch. Updates are zero until the batch size kept inside
    `optimizer` is reached; then `optimizer.update` is called once with the mean gradient, with the
    mean of the losses if `value=` was passed, and with `noise=` measured between the micro-batches
    (and between devices). Every other extra argument is forwarded. The batch size and all shapes of
    the loop stay as they are, so nothing is ever recompiled.

    `update` reads `value=` (loss of the micro-batch) and `noise=` (a `GradientNoise` of the
    micro-batch, for groups finer than it; `updates` must then be `noise.mean`). Inner-product tests
    need it, with one call covering the whole batch: inner products of different calls refer to
    different means and are reported as NaN, which holds the batch size. Links inside also get
    `emit=` (traced bool): false only under `vmap`, where those whose batch is not complete are called
    with the others, and what they return is dropped.

    The optimizer runs in a loop of one turn or none, so a call that completes no batch costs its gradient
    and a running mean. Such a loop has no derivative in reverse mode (`jax.grad` of a training run).

    A micro-batch whose gradient or loss (`value=`) holds NaN or inf, or whose gradient is longer than
    1e15, is skipped and counted; the batch takes one more. If every one is skipped, no step is ever made:
    in `metrics`, `micro_batches` (since the last step) and `skipped_micro_batches` then grow while
    `num_examples` stands still. Only a `return_to_minimum` inside is told, once that would have filled a
    batch, and goes back to its snapshot.

    Under sharded `jit` no device has a gradient of its own. An unchanged loop works, and measures the
    noise between its calls; with `value, noise = value_and_grad_noise(loss_fn, lanes=True)(params, groups)`
    and `update(noise.mean, …, noise=noise, value=value)` it is measured between the lanes, too. With
    parameters sharded as well (FSDP) the gathered gradient is sharded like them.

    Args:
      optimizer: contains one `adapt_batch_size`.
      micro_batch_size: examples per device behind each gradient. Times the number of devices it
        must divide the initial batch size; batches are rounded up to a multiple of it. Without
        `axis_name`, so under sharded `jit` too, all examples of a call.
      axis_name: name, or names, of the device axis under `pmap` or `shard_map`: hand in each
        device's *own* gradient and loss, neither averaged nor summed. Gradients that somebody
        averaged already are recognised (no scatter at all between devices): the batch size is then
        held and `metrics` counts `averaged_gradients`. A mean over one of two axes alone shows only
        to shard_map's varying check. With `noise=` the noise must be merged over
        the devices already, as `value_and_grad_noise(..., axis_name=...)` does.
      coordinate_wise: also keep per-coordinate scatter, for `coordinate_norm_test`.

    Returns:
      A `GradientTransformationExtraArgs`; `has_updated(state)` tells real steps. Under
      `optax.inject_hyperparams` every argument belongs to static_args.

    Raises:
      ValueError: `micro_batch_size` is not a positive integer or does not divide the initial batch
        size; fewer than two micro-batches in the first batch and no `noise=`; with shard_map's varying
        check on, a gradient that is the same on all devices.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from adabatch_jax import adapt_batch_size, has_updated, norm_test
      >>> optimizer = adaptive_multi_steps(
      ...     optax.chain(adapt_batch_size(norm_test(0.5), initial_batch_size=2, max_batch_size=64),
      ...                 optax.sgd(0.5)),
      ...     micro_batch_size=1)
      >>> state = optimizer.init(jnp.array(0.0))
      >>> for gradient in (1.0, 3.0):
      ...     update, state = optimizer.update(jnp.array(gradient), state)
      ...     print(float(update), bool(has_updated(state)), int(get_batch_size(state)))
      0.0 False 2
      -1.0 True 2

    Source: Lau, Liu, Kolar (2024), arXiv 2402.11215, for the test; the interface is that of
    `optax.MultiSteps`.
    """
    _validate.positive_int("adaptive_multi_steps", micro_batch_size=micro_batch_size)
    optimizer = optax.with_extra_args_support(optimizer)
    axes = axis_tuple(axis_name)

    def init(params: PyTree) -> AdaptiveMultiStepsState:
        inner = optimizer.init(params)
        _check_first_batch(controller_state(inner).next_batch_size, micro_batch_size, 1, 1)
        scatter = None
        if coordinate_wise:
            scatter = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)
        return AdaptiveMultiStepsState(
            emitted=jnp.zeros((), bool),
            gathered_noise=GradientNoise(
                mean=jax.tree.map(jnp.zeros_like, widen(params)),
                scatter=jnp.zeros((), jnp.float32),
                num_examples=jnp.zeros((), jnp.int32),
                num_groups=jnp.zeros((), jnp.int32),
                coordinate_scatter=scatter,
            ),
            gathered_value=jnp.zeros((), jnp.float32),
            micro_batches=jnp.zeros((), jnp.int32),
            skipped_micro_batches=jnp.zeros((), jnp.int32),
            averaged_gradient=jnp.zeros((), bool),
            averaged_gradients_seen=jnp.zeros((), jnp.int32),
            inner_opt_state=inner,
        )

    def update(
        updates: PyTree,
        state: AdaptiveMultiStepsState,
        params: PyTree | None = None,
        *,
        noise: GradientNoise | None = None,
        value: Any = None,
        hold_batch_size: Any = False,
        **extra_args: Any,
    ) -> tuple[PyTree, AdaptiveMultiStepsState]:
        devices = 1
        for axis in axes:
            devices *= jax.lax.axis_size(axis)
        # Whether there will be a test is known before: the controller moves only when a batch is full.
        measure = needs_noise(state.inner_opt_state)
        if noise is None:
            _check_first_batch(_initial_size(optimizer, updates), micro_batch_size, devices, 2)
            found, loss, skipped = _measure(updates, value, micro_batch_size, coordinate_wise, axes)
        else:
            found, loss, skipped = _given(noise, value, measure)
        joint = join_noise(state.gathered_noise, found, measure)
        n_old = state.gathered_noise.num_examples.astype(jnp.float32)
        mean_loss = blend(n_old, state.gathered_value, found.num_examples.astype(jnp.float32), loss)
        if noise is not None and noise.inner_product_scatter is not None:
            alone = state.gathered_noise.num_examples == 0
            scatter = jnp.where(alone, noise.inner_product_scatter, jnp.nan)
            joint = joint._replace(inner_product_scatter=scatter)

        averaged = state.averaged_gradient
        if noise is None and devices > 1 and not checked_axes(axes):
            # Devices that hold the same gradient differ by the rounding of a mean over them.
            rounding = 1e-12 + 1e-16 * devices**2  # squared and relative, float32
            alike = found.scatter <= rounding * found.num_examples * found.squared_norm
            averaged = averaged | (alike & (found.num_groups > 1) & (found.squared_norm > 0))

        size = get_batch_size(state.inner_opt_state)
        emit = joint.num_examples >= size
        told, returns = mean_loss, _returns_made(state.inner_opt_state)
        may_return = returns is not None and value is not None
        if may_return:  # as many calls as fill a batch, all skipped
            lost = (state.micro_batches + 1) * micro_batch_size * devices >= size
            lost &= joint.num_examples == 0
            emit |= lost
            told = jnp.where(lost, jnp.nan, told)
        if value is not None:
            extra_args["value"] = told.astype(jnp.asarray(value).dtype)
        held = jnp.asarray(hold_batch_size).astype(bool) | averaged
        noise = unless_measured(joint._replace(mean=cast_like(joint.mean, updates)), measure)

        def act(turn: jax.Array, inner: PyTree) -> tuple[PyTree, PyTree]:
            seen, given, more = unmoved((noise, params, extra_args), turn)
            new_updates, new = optimizer.update(
                seen.mean, inner, given, noise=seen, hold_batch_size=held, emit=emit, **more
            )
            if may_return:  # a lost batch may only lead back
                kept = ~lost | (_returns_made(new) > returns)
                new = jax.tree.map(lambda x, y: jnp.where(kept, x, y), new, inner)
            return new_updates, new

        new_updates, inner = at_most_once(emit, act, updates, state.inner_opt_state)
        if may_return:
            emit &= ~lost | (_returns_made(inner) > returns)
        new_updates = jax.tree.map(lambda u: jnp.where(emit, u, jnp.zeros_like(u)), new_updates)
        empty = jnp.where(emit, 0, 1)
        # The running mean needs no clearing: without examples a side has no weight in a merge.
        counts = ("num_examples", "num_groups")
        gathered = joint._replace(
            **{k: getattr(joint, k).astype(jnp.int32) * empty for k in counts},
            inner_product_scatter=None,
        )
        return new_updates, AdaptiveMultiStepsState(
            emitted=emit,
            gathered_noise=gathered,
            gathered_value=mean_loss,
            micro_batches=(state.micro_batches + 1) * empty,
            skipped_micro_batches=state.skipped_micro_batches + skipped,
            averaged_gradient=averaged & ~emit,
            averaged_gradients_seen=state.averaged_gradients_seen
            + (averaged & emit).astype(jnp.int32),
            inner_opt_state=inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _measure(
    updates: PyTree, value: Any, size: int, coordinate_wise: bool, axes: tuple[str, ...]
) -> tuple[GradientNoise, jax.Array, jax.Array]:
    """The micro-batch as one group, or one per device; those that are not finite have no examples."""
    checked = checked_axes(axes)
    same = sorted(checked - varying_axes(updates))
    if same:
        raise ValueError(
            f"adaptive_multi_steps: the gradient is the same on all devices of axis {same[0]!r}, so "
            "the noise between them cannot be seen: inside shard_map cast the parameters with "
            f"jax.lax.pcast(params, {same[0]!r}, to='varying') before differentiating, and do not "
            "average the gradient"
        )
    loss = jnp.zeros((), jnp.float32) if value is None else jnp.asarray(value).astype(jnp.float32)
    wide = widen(updates)
    # The loss too: a label out of range makes it NaN and leaves a gradient that looks like any other.
    finite = trainable(squared_norm(wide)) & jnp.isfinite(loss)
    alone = GradientNoise(
        mean=wide,  # NaN and all: a merge ignores a side without examples
        scatter=jnp.zeros((), jnp.float32),
        num_examples=jnp.where(finite, size, 0).astype(jnp.int32),
        num_groups=finite.astype(jnp.int32),
        coordinate_scatter=jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), wide)
        if coordinate_wise
        else None,
    )
    skipped = (~finite).astype(jnp.int32)
    if not axes:
        return alone, loss, skipped

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.psum(to_varying(x, checked), axes)

    pooled, both = pool_noise(alone, jnp.stack([loss]), total)
    groups = jax.lax.axis_size(axes)
    return pooled, both[0], groups - pooled.num_groups


def _given(
    noise: GradientNoise, value: Any, measure: jax.Array
) -> tuple[GradientNoise, jax.Array, jax.Array]:
    """The noise that the caller measured; as if it had no examples where it is not finite.

    Without `measure` the scatter need not have been measured.
    """
    loss = jnp.zeros((), jnp.float32) if value is None else jnp.asarray(value).astype(jnp.float32)
    finite = trainable(noise.squared_norm) & jnp.isfinite(loss)
    finite &= jnp.isfinite(noise.scatter) | ~measure
    kept = noise._replace(
        mean=widen(noise.mean),
        num_examples=jnp.where(finite, noise.num_examples, 0).astype(jnp.int32),
        num_groups=jnp.where(finite, noise.num_groups, 0).astype(jnp.int32),
    )
    return kept, loss, (~finite).astype(jnp.int32)


def _returns_made(inner: PyTree) -> Any:
    """How often `return_to_minimum` has gone back; None where there is none inside."""
    return metrics(inner).get("returns_made")


def _initial_size(optimizer: optax.GradientTransformation, updates: PyTree) -> Any:
    """The initial batch size, read from `init` at trace time: a tracer where it is not static."""
    seen = []

    def probe(params: PyTree) -> Any:
        seen.append(controller_state(optimizer.init(params)).next_batch_size)
        return ()

    jax.eval_shape(probe, updates)
    return seen[0]


def _check_first_batch(first: Any, micro: int, devices: int, least: int) -> None:
    if isinstance(first, jax.core.Tracer) or jnp.ndim(first):
        return
    first, step = int(first), micro * devices
    over = f"micro_batch_size={micro}" + (f" on {devices} devices" if devices > 1 else "")
    if first % step:
        raise ValueError(f"adaptive_multi_steps: {over} does not divide initial batch size {first}")
    groups = first // micro
    if groups < least:
        raise ValueError(
            f"adaptive_multi_steps: {over} leaves a first batch of {first} examples with {groups} "
            "group, and noise shows only between two or more: use a smaller micro_batch_size or pass "
            "noise= from value_and_grad_noise"
        )
