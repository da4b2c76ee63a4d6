"""`adaptive_multi_steps`: gradient accumulation whose length the noise decides."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._axes import axis_tuple
from adabatch_jax._dropped import state_after_dropped_step
from adabatch_jax._loss import loss_of_call
from adabatch_jax._tree import cast_like, wide, widen
from adabatch_jax._types import AxisName, PyTree
from adabatch_jax.batch_size._call import check_call, check_first_batch, is_complete
from adabatch_jax.batch_size._gather import Wrapping, averaged_already, call_of, gather
from adabatch_jax.batch_size._read_state import (
    controller_state,
    find_controller,
    needs_noise,
    returns_made,
)
from adabatch_jax.batch_size._run_if import run_if, unmoved
from adabatch_jax.batch_size._step_schedules import warn_of_step_schedules
from adabatch_jax.batch_size._trained import Leaves, moved_leaves
from adabatch_jax.noise import GradientNoise

_MOST_OFFERED = 2**30
_SUMS = ("value", "num_examples")  # of a call; the links inside are told those of the batch


class AdaptiveMultiStepsState(NamedTuple):
    """State of `adaptive_multi_steps`."""

    emitted: jax.Array  # bool: the last update was a real optimizer step
    skipped_call: jax.Array  # bool: the last call, or a device's part of it, was left out
    gathered_noise: GradientNoise  # of the micro-batches since the last step
    gathered_value: jax.Array  # float32: their mean loss
    last_loss: jax.Array  # float32: that of the last complete batch; 0 before, and without `value=`
    micro_batches: jax.Array  # int32: gathered since the last step
    examples_offered: jax.Array  # int32: behind those, the skipped ones included
    largest_call: jax.Array  # int32: most examples that one call has brought so far
    skipped_micro_batches: jax.Array  # int32: micro-batches (per device) with NaN or inf, in all
    averaged_gradient: jax.Array  # bool: this batch's gradients were already averaged over devices
    averaged_gradients_seen: jax.Array  # int32: batches for which that was so
    inner_opt_state: Any

    # The names of `optax.MultiStepsState`, for code that was written for it.
    @property
    def mini_step(self) -> jax.Array:
        """int32: calls since the last optimizer step."""
        return self.micro_batches

    @property
    def gradient_step(self) -> jax.Array:
        """int32: optimizer steps so far."""
        return find_controller(self.inner_opt_state).updates_seen

    @property
    def acc_grads(self) -> PyTree:
        """The mean gradient of these calls, in float32 at least; before the first it means nothing."""
        return self.gathered_noise.mean

    def report_metrics(self) -> dict[str, Any]:
        """The numbers that `adabatch.metrics` shows."""
        return {
            "loss": self.last_loss,
            "micro_batches": self.micro_batches,
            "skipped_micro_batches": self.skipped_micro_batches,
            "averaged_gradients": self.averaged_gradients_seen,
        }


def adaptive_multi_steps(
    optimizer: optax.GradientTransformation,
    *,
    micro_batch_size: int | None,
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

    `update` reads, all by keyword:

    * `value=`, or without it `loss=`: the mean loss of the micro-batch, a scalar. Links inside get the
      mean over the batch as `value=`, and by the name of the call.
    * `num_examples=`: what stands behind *this* call's gradient, traced, in the unit of the batch sizes.
      Calls are weighted by it, so that a ragged micro-batch counts for what it holds. With a loss
      averaged over tokens give the number of its tokens, and all batch sizes in tokens: the gradient
      is then that of the whole batch, not a mean of means. A float is rounded. 0 is an empty call,
      which is passed over.
    * `noise=`: a `GradientNoise` of the micro-batch, for groups finer than it; `updates` must then be
      `noise.mean`, and `noise.num_examples` counts. Inner-product tests need it, with one call
      covering the whole batch: inner products of different calls refer to different means, count as not
      measured, and hold the batch size.

    Links inside are told the sum over the batch, never one call's number. They also get `emit=` (traced
    bool): false only under `vmap`, where those whose batch is not complete are called with the others, and
    what they return is dropped; `batch_size_multiple=`, the examples that one call adds, to which
    `adapt_batch_size` rounds, so that a batch is as large as `get_batch_size` said; and `trained=` where
    parameters are frozen.

    No batch exceeds `max_batch_size`: one that the next call would carry beyond it ends before. (A call
    that tells a larger number than any call before it may be too large by itself.) Where calls tell their
    size, a batch that is to be tested takes at least two of them.

    The optimizer runs in a loop of one turn or none, so a call that completes no batch costs its gradient
    and a running mean. Such a loop has no derivative in reverse mode (`jax.grad` of a training run).

    A micro-batch whose gradient or loss (`value=`) holds NaN or inf, or whose gradient is longer than
    1e15, is skipped and counted; the batch takes one more. `metrics` says so in that very call
    (`skipped`), and `unless_skipped` keeps what the loop carries besides. If every one is skipped, no
    step is ever made: in `metrics`, `micro_batches` (since the last step) and `skipped_micro_batches`
    then grow while `num_examples` stands still. Only a `return_to_minimum` inside is told, once that
    would have filled a batch, and goes back to its snapshot.

    `init` warns of a schedule inside that counts optimizer steps, of Optax or AutoWU: of a batch that grows
    there are fewer, and it would not come to its end. `by_examples` is the remedy.

    Frozen parameters do not count in noise, test and noise scale. They are found in the program of
    `optimizer.update`: their update is zero whatever the gradient is (`optax.set_to_zero` within
    `partition`, `masked`, `freeze`; see `trained_parameters`). A NaN in the gradient of such a parameter
    does no harm, unless something inside reads it even so, as a global norm does. A `noise=` that is
    handed in must have been measured without them (`value_and_grad_noise(..., trained=...)`).

    Under sharded `jit` no device has a gradient of its own. An unchanged loop works, and measures the
    noise between its calls; with `value, noise = value_and_grad_noise(loss_fn, lanes=True)(params, groups)`
    and `update(noise.mean, …, noise=noise, value=value)` it is measured between the lanes, too. With
    parameters sharded as well (FSDP) the gathered gradient is sharded like them.

    Args:
      optimizer: contains one `adapt_batch_size`.
      micro_batch_size: examples per device behind each gradient. Times the number of devices it
        must divide the initial batch size; batches are rounded up to a multiple of it. Without
        `axis_name`, so under sharded `jit` too, all examples of a call. None: every call tells
        `num_examples=` or `noise=`.
      axis_name: name, or names, of the device axis under `pmap` or `shard_map`: hand in each
        device's *own* gradient, loss and number, neither averaged nor summed. Gradients that somebody
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
        size; fewer than two micro-batches in the first batch and neither `noise=` nor `num_examples=`;
        parameters that are no arrays; a gradient of another structure or shape than they; `value=` or
        `num_examples=` that is no scalar; `batch_size=`; neither number nor noise with
        `micro_batch_size=None`; with shard_map's varying check on, a gradient that is the same on all
        devices.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from adabatch_jax import adapt_batch_size, get_batch_size, has_updated, norm_test
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
    if micro_batch_size is not None:
        _validate.positive_int("adaptive_multi_steps", micro_batch_size=micro_batch_size)
    optimizer = optax.with_extra_args_support(optimizer)
    wrapping = Wrapping(micro_batch_size, axis_tuple(axis_name), coordinate_wise)
    moved = _Moved(optimizer)

    def init(params: PyTree) -> AdaptiveMultiStepsState:
        _validate.arrays("adaptive_multi_steps", params=params)
        inner = optimizer.init(params)
        if controller_state(inner).may_change:
            warn_of_step_schedules("adaptive_multi_steps", inner)
        if micro_batch_size is not None:
            check_first_batch(controller_state(inner).next_batch_size, micro_batch_size, 1, 1)
        scatter = None
        if coordinate_wise:
            scatter = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)
        return AdaptiveMultiStepsState(
            emitted=jnp.zeros((), bool),
            skipped_call=jnp.zeros((), bool),
            gathered_noise=GradientNoise(
                mean=jax.tree.map(jnp.zeros_like, widen(params)),
                scatter=jnp.zeros((), jnp.float32),
                num_examples=jnp.zeros((), jnp.int32),
                num_groups=jnp.zeros((), jnp.int32),
                coordinate_scatter=scatter,
            ),
            gathered_value=jnp.zeros((), jnp.float32),
            last_loss=jnp.zeros((), jnp.float32),
            micro_batches=jnp.zeros((), jnp.int32),
            examples_offered=jnp.zeros((), jnp.int32),
            largest_call=jnp.zeros((), jnp.int32),
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
        num_examples: Any = None,
        batch_size: Any = None,
        hold_batch_size: Any = False,
        trace_only: bool = False,
        **extra_args: Any,
    ) -> tuple[PyTree, AdaptiveMultiStepsState]:
        by_other_name = value is None and "loss" in extra_args
        value = loss_of_call(value, extra_args)
        if trace_only:  # `trained_parameters` asks what the optimizer moves
            more = extra_args | {"noise": noise, "value": value, "trace_only": True}
            answer, inner = optimizer.update(updates, state.inner_opt_state, params, **more)
            return answer, state._replace(inner_opt_state=inner)
        told = dict(
            value=value,
            num_examples=num_examples,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
        )
        before = state.gathered_noise
        check_call(updates, before, noise, told)
        controller = controller_state(state.inner_opt_state)
        # Whether there will be a test is known before: the controller moves only when a batch is full.
        measure = needs_noise(state.inner_opt_state)
        unit = wrapping.unit()
        extra_args["batch_size_multiple"] = 1 if unit is None else unit

        parts = moved(updates, state, params, noise, {k: told[k] for k in _SUMS}, extra_args)
        if not all(parts.trained):
            structure = jax.tree.structure(updates)
            extra_args["trained"] = jax.tree.unflatten(structure, parts.trained)
        if noise is None and num_examples is None and micro_batch_size is not None:
            first = _initial_size(optimizer, updates)
            check_first_batch(first, micro_batch_size, wrapping.num_devices(), 2)
        size = micro_batch_size if num_examples is None else num_examples
        call = call_of(wrapping, parts, updates, noise, value, size, before, measure)
        along = None if noise is None else noise.inner_product_scatter
        gathered = gather(parts, before, state.gathered_value, call, along, measure)
        joint, averaged = gathered.noise, state.averaged_gradient
        if noise is None:
            averaged |= averaged_already(wrapping, call.noise)

        largest_call = jnp.maximum(state.largest_call, call.offered)
        offered = jnp.minimum(state.examples_offered, _MOST_OFFERED) + call.offered
        next_call = largest_call if unit is None else unit
        emit = is_complete(joint, controller, next_call, measure, told=unit is None)
        told_loss, returns = gathered.loss, returns_made(state.inner_opt_state)
        may_return = returns is not None and value is not None
        if may_return:  # as many calls as fill a batch, all skipped
            lost = (offered >= controller.next_batch_size) & (joint.num_examples == 0)
            emit |= lost
            told_loss = jnp.where(lost, jnp.nan, told_loss)
        if value is not None:  # in float32 at least: a mean of bfloat16 losses is none any more
            extra_args["value"] = told_loss.astype(wide(jnp.result_type(value)))
            if by_other_name:
                extra_args["loss"] = extra_args["value"]
        if num_examples is not None:
            extra_args["num_examples"] = joint.num_examples
        held = jnp.asarray(hold_batch_size).astype(bool) | averaged
        gradient = gathered.gradient(parts, updates)
        shown = gathered.shown(parts, updates, before, measure)

        def act(turn: jax.Array, inner: PyTree) -> tuple[PyTree, PyTree]:
            mean, seen, given, more = unmoved((gradient, shown, params, extra_args), turn)
            new_updates, new = optimizer.update(
                mean, inner, given, noise=seen, hold_batch_size=held, emit=emit, **more
            )
            if may_return:  # a lost batch may only lead back
                kept = ~lost | (returns_made(new) > returns)
                dropped = state_after_dropped_step(inner, new, used_up=False)
                new = optax.tree.where(kept, new, dropped)
            return new_updates, new

        new_updates, inner = run_if(emit, act, updates, state.inner_opt_state)
        if may_return:
            emit &= ~lost | (returns_made(inner) > returns)
        new_updates = jax.tree.map(lambda u: jnp.where(emit, u, jnp.zeros_like(u)), new_updates)
        empty = jnp.where(emit, 0, 1)
        return new_updates, AdaptiveMultiStepsState(
            emitted=emit,
            skipped_call=(call.skipped > 0) | (call.noise.num_examples == 0),
            gathered_noise=gathered.left(parts, before, empty),
            gathered_value=gathered.loss,
            last_loss=jnp.where(emit & (joint.num_examples > 0), gathered.loss, state.last_loss),
            micro_batches=(state.micro_batches + 1) * empty,
            examples_offered=offered * empty,
            largest_call=largest_call,
            skipped_micro_batches=state.skipped_micro_batches + call.skipped,
            averaged_gradient=averaged & ~emit,
            averaged_gradients_seen=state.averaged_gradients_seen
            + (averaged & emit).astype(jnp.int32),
            inner_opt_state=inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)


class _Moved:
    """Which leaves the optimizer moves, found once for every kind of argument."""

    def __init__(self, optimizer: optax.GradientTransformationExtraArgs) -> None:
        self.optimizer = optimizer
        self.found: dict[Any, Leaves] = {}

    def __call__(
        self,
        updates: PyTree,
        state: AdaptiveMultiStepsState,
        params: PyTree,
        noise: GradientNoise | None,
        sums: dict[str, Any],
        extra_args: dict[str, Any],
    ) -> Leaves:
        leaves, structure = jax.tree.flatten((updates, state, params))
        sums = {name: jnp.asarray(x) for name, x in sums.items() if x is not None}
        told = (noise is None, *sorted(sums), *sorted(extra_args))
        key = (structure, tuple(jnp.shape(x) for x in leaves), told)
        if key not in self.found:
            seen = state.gathered_noise
            if noise is not None:
                seen = seen._replace(inner_product_scatter=noise.inner_product_scatter)

            def update(updates: PyTree, inner: PyTree, params: PyTree, told: PyTree) -> Any:
                told["noise"] = seen._replace(mean=cast_like(told.pop("mean"), updates))
                return self.optimizer.update(updates, inner, params, **told, **more)

            more = extra_args | {"trace_only": True}
            arrays = dict(hold_batch_size=state.emitted, emit=state.emitted, mean=seen.mean, **sums)
            self.found[key] = moved_leaves(update, updates, state.inner_opt_state, params, arrays)
        return self.found[key]


def _initial_size(optimizer: optax.GradientTransformation, updates: PyTree) -> Any:
    """The initial batch size, read from `init` at trace time: a tracer where it is not static.

    `update` sees a state whose batch size is traced, and `optimizer` does not tell its arguments. But the
    `init` of `adapt_batch_size` leaves a static size concrete while it is traced, so a probe can keep
    it; what `eval_shape` itself returns would be shapes alone. No array is made.
    """
    seen = []

    def probe(params: PyTree) -> Any:
        seen.append(controller_state(optimizer.init(params)).next_batch_size)
        return ()

    jax.eval_shape(probe, updates)
    return seen[0]
