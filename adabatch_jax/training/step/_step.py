"""The fused training step: gradient and noise, then decision and update; and the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adabatch_jax as adabatch
from adabatch_jax._dropped import state_after_dropped_step
from adabatch_jax._tree import trainable
from adabatch_jax._types import PyTree
from adabatch_jax.batch_size import returns_made
from adabatch_jax.training.models import Apply, losses_and_logits, masked_mean, mean_per_example

Data = tuple[jax.Array, jax.Array]  # inputs and labels, on the device


def make_gradient(
    apply: Apply,
    *,
    coordinate_wise: bool = False,
    inner_products: bool = False,
    axis_name: str | None = None,
    constant: bool = False,
) -> Callable[..., tuple[jax.Array, adabatch.GradientNoise]]:
    """Builds the first half of the step, arguments as for `make_step`.

    Returns:
      `gradient(params, opt_state, data, indices, sizes, count) -> (mean loss, noise)`.
    """

    def loss_fn(params: PyTree, group: dict[str, jax.Array], data: Data) -> jax.Array:
        index, size = group["index"], group["size"]
        losses, _ = losses_and_logits(apply, params, data[0][index], data[1][index])
        return masked_mean(losses, size)

    value_and_grad = adabatch.value_and_grad_noise(
        loss_fn,
        axis_name=axis_name,
        coordinate_wise=coordinate_wise,
        inner_products=inner_products,
    )

    def gradient(
        params: PyTree,
        opt_state: PyTree,
        data: Data,
        indices: jax.Array,
        sizes: jax.Array,
        count: jax.Array,
    ) -> tuple[jax.Array, adabatch.GradientNoise]:
        groups = {"index": indices, "size": sizes}
        measure = False if constant else adabatch.needs_noise(opt_state)
        return value_and_grad(params, groups, data, count=count, sizes=sizes, measure=measure)

    return gradient


def make_update(
    apply: Apply,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    curvature: np.ndarray | None = None,
) -> Callable[..., tuple[PyTree, PyTree, dict[str, Any]]]:
    """Builds the second half of the step, which no size of a batch has a part in.

    Returns:
      `update(params, opt_state, data, value, noise) -> (params, opt_state, report)`, all as for
      `make_step`; `value` and `noise` as its first half returns them.
    """

    def curvature_arguments(rows: jax.Array, data: Data) -> dict[str, Any]:
        """The loss on fixed examples: of a group, and the mean of all."""

        def of_group(params: PyTree, group: jax.Array) -> jax.Array:
            return jnp.mean(losses_and_logits(apply, params, data[0][group], data[1][group])[0])

        def value_fn(params: PyTree) -> jax.Array:
            return of_group(params, rows.reshape(-1))

        return {"value_fn": value_fn, "loss_fn": of_group, "groups": rows}

    def update(
        params: PyTree,
        opt_state: PyTree,
        data: Data,
        value: jax.Array,
        noise: adabatch.GradientNoise,
    ) -> tuple[PyTree, PyTree, dict[str, Any]]:
        more = {} if curvature is None else curvature_arguments(jnp.asarray(curvature), data)
        updates, new_state = optimizer.update(
            noise.mean, opt_state, params, value=value, noise=noise, **more
        )
        new_params = optax.apply_updates(params, updates)
        finite = jnp.isfinite(value) & trainable(noise.squared_norm)
        finite &= jnp.isfinite(noise.scatter) | ~adabatch.needs_noise(opt_state)
        returns = returns_made(new_state)
        if returns is not None:  # a step back to AutoWU's snapshot is made whatever the loss is
            finite |= returns > returns_made(opt_state)

        def keep(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

        opt_state = keep(new_state, state_after_dropped_step(opt_state, new_state, used_up=True))
        report = {**adabatch.metrics(opt_state), "loss": value, "skipped": ~finite}
        return keep(new_params, params), opt_state, report

    return update


def make_step(
    apply: Apply,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    coordinate_wise: bool = False,
    inner_products: bool = False,
    curvature: np.ndarray | None = None,
    axis_name: str | None = None,
    constant: bool = False,
) -> Callable[..., tuple[PyTree, PyTree, dict[str, Any]]]:
    """Builds the step.

    The data set lies on the device and only example numbers travel: group j of a batch is the row
    `indices[j]`, of which the first `sizes[j]` count.

    Args:
      apply: `(params, inputs as stored [B, …]) -> logits [B, classes]`, or [B, L, classes] for sequences.
      optimizer: chain with one `adapt_batch_size` in it.
      coordinate_wise: measure what the coordinate-wise test needs.
      inner_products: measure what the inner-product tests need.
      curvature: int [num_groups, group_size], the examples on which the curvature is measured.
      axis_name: the device axis over which the groups are spread; None: a single device.
      constant: the batch never grows, so no step measures the noise: known while compiling, that is free.

    Returns:
      `step(params, opt_state, data, indices, sizes, count) -> (params, opt_state, report)` with
      `data = (inputs, labels)`, `indices` int32 [num_groups, micro_batch_size], `sizes` int32
      [num_groups], `count` int32: groups in use. A step whose loss or gradient is not finite, or
      whose gradient is longer than 1e15, changes nothing but `report["skipped"]` and the clocks of the
      schedules: its examples are used up, and a decay over examples ends with the run. Unless it leads
      back to the snapshot of `return_to_minimum`. `report` holds `adabatch.metrics` of the state
      besides, where `batch_size` is that of the last step that was not skipped.
    """
    gradient = make_gradient(
        apply,
        coordinate_wise=coordinate_wise,
        inner_products=inner_products,
        axis_name=axis_name,
        constant=constant,
    )
    update = make_update(apply, optimizer, curvature=curvature)

    def step(
        params: PyTree,
        opt_state: PyTree,
        data: Data,
        indices: jax.Array,
        sizes: jax.Array,
        count: jax.Array,
    ) -> tuple[PyTree, PyTree, dict[str, Any]]:
        value, noise = gradient(params, opt_state, data, indices, sizes, count)
        return update(params, opt_state, data, value, noise)

    return step


def make_evaluation(apply: Apply) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Builds `evaluate(params, inputs, labels) -> (mean loss, accuracy)`, float32 scalars.

    Slices of a fixed size keep the memory bounded; the mean is over all examples.
    """
    slice_size = 1000

    @jax.jit
    def sums(
        params: PyTree, inputs: jax.Array, labels: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        losses, logits = losses_and_logits(apply, params, inputs, labels)
        right = mean_per_example((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))
        return jnp.sum(jnp.where(real, losses, 0.0)), jnp.sum(jnp.where(real, right, 0.0))

    def evaluate(params: PyTree, inputs: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        total = len(labels)
        results = []
        for start in range(0, total, slice_size):
            index = jnp.arange(start, start + slice_size)
            real = index < total
            index = jnp.minimum(index, total - 1)
            results.append(sums(params, inputs[index], labels[index], real))
        losses, rights = zip(*results, strict=True)
        return sum(losses) / total, sum(rights) / total

    return evaluate
