"""The fused training step: gradient, noise, decision and update in one compiled call per batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adabatch_jax as adabatch
from adabatch_jax._tree import trainable
from adabatch_jax.training._ladder import Rung
from adabatch_jax.training._stream import masked_mean

PyTree = Any
Apply = Callable[[PyTree, jax.Array], jax.Array]


def losses_and_logits(
    apply: Apply, params: PyTree, inputs: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of each example, [B], and logits [B, …, classes], float32.

    `labels` are [B], or [B, L] where an example is a sequence. `inputs` come as they are stored.
    """
    logits = apply(params, inputs).astype(jnp.float32)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _per_example(losses), logits


def _per_example(values: jax.Array) -> jax.Array:
    """Means over all axes but the first."""
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def make_step(
    apply: Apply,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    coordinate_wise: bool = False,
    inner_products: bool = False,
    curvature: np.ndarray | None = None,
    axis_name: str | None = None,
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

    Returns:
      `step(params, opt_state, data, indices, sizes, count) -> (params, opt_state, report)` with
      `data = (inputs, labels)`, `indices` int32 [num_groups, micro_batch_size], `sizes` int32
      [num_groups], `count` int32: groups in use. A step whose loss or gradient is not finite, or
      whose gradient is longer than 1e15, changes nothing but `report["skipped"]`, unless it leads back
      to the snapshot of `return_to_minimum`.
    """

    def loss_fn(
        params: PyTree, group: dict[str, jax.Array], data: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        index, size = group["index"], group["size"]
        losses, _ = losses_and_logits(apply, params, data[0][index], data[1][index])
        return masked_mean(losses, size)

    def curvature_arguments(rows: jax.Array, data: tuple[jax.Array, jax.Array]) -> dict[str, Any]:
        """The loss on fixed examples: of a group, and the mean of all."""

        def of_group(params: PyTree, group: jax.Array) -> jax.Array:
            return jnp.mean(losses_and_logits(apply, params, data[0][group], data[1][group])[0])

        def value_fn(params: PyTree) -> jax.Array:
            return of_group(params, rows.reshape(-1))

        return {"value_fn": value_fn, "loss_fn": of_group, "groups": rows}

    value_and_grad = adabatch.value_and_grad_noise(
        loss_fn,
        axis_name=axis_name,
        coordinate_wise=coordinate_wise,
        inner_products=inner_products,
    )

    def step(
        params: PyTree,
        opt_state: PyTree,
        data: tuple[jax.Array, jax.Array],
        indices: jax.Array,
        sizes: jax.Array,
        count: jax.Array,
    ) -> tuple[PyTree, PyTree, dict[str, Any]]:
        groups = {"index": indices, "size": sizes}
        measure = adabatch.needs_noise(opt_state)
        value, noise = value_and_grad(
            params, groups, data, count=count, sizes=sizes, measure=measure
        )
        more = {} if curvature is None else curvature_arguments(jnp.asarray(curvature), data)
        updates, new_state = optimizer.update(
            noise.mean, opt_state, params, value=value, noise=noise, **more
        )
        new_params = optax.apply_updates(params, updates)
        shown, before = adabatch.metrics(new_state), adabatch.metrics(opt_state)
        finite = jnp.isfinite(value) & trainable(noise.squared_norm)
        finite &= jnp.isfinite(noise.scatter) | ~measure
        if "returns_made" in shown:  # a step back to AutoWU's snapshot is made whatever the loss is
            finite |= shown["returns_made"] > before["returns_made"]

        def keep(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

        opt_state = keep(new_state, opt_state)
        report = {"loss": value, "skipped": ~finite, **adabatch.metrics(opt_state)}
        return keep(new_params, params), opt_state, report

    return step


class CompiledSteps:
    """The step, compiled once for each rung of the ladder: when first needed, or before in the background.

    Only XLA works in the background. Tracing stays on the caller's thread, whose JAX settings it obeys.

    Attributes:
      seconds_waited: for compilations, by the caller.
    """

    def __init__(self, make: Callable[[Rung], Callable[..., Any]]) -> None:
        """`make(rung)` builds the step, whose parameters and optimizer state will be donated."""
        self._make = make
        self._compiled: dict[Rung, Future[Callable[..., Any]]] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="compilation")
        self.seconds_waited = 0.0

    @property
    def compilations(self) -> int:
        """How many times the step has been compiled, what is under way included."""
        return len(self._compiled)

    def __contains__(self, rung: Rung) -> bool:
        return rung in self._compiled

    def prepare(self, rung: Rung, *arguments: Any) -> None:
        """Starts to compile the step of this rung, if nobody has; `arguments` as for the call."""
        if rung not in self._compiled:
            lowered = jax.jit(self._make(rung), donate_argnums=(0, 1)).lower(*arguments)
            self._compiled[rung] = self._background.submit(_compile, lowered)

    def __call__(self, rung: Rung, *arguments: Any) -> Any:
        """Runs the step of this rung."""
        start = time.perf_counter()
        self.prepare(rung, *arguments)
        compiled = self._compiled[rung].result()
        self.seconds_waited += time.perf_counter() - start
        return compiled(*arguments)

    def close(self) -> None:
        """Waits for a compilation that nobody needs any more, and begins no other."""
        self._background.shutdown(cancel_futures=True)


def _compile(lowered: Any) -> Callable[..., Any]:
    return lowered.compile()


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
        right = _per_example((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))
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
