"""The state of `adapt_batch_size`, and what it tells."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax._clock import as_int
from adabatch_jax._protocols import by_name
from adabatch_jax._types import PyTree
from adabatch_jax._validate import is_traced


class BatchSizeStatus(enum.IntEnum):
    """What the last update did to the batch size, and why: `metrics(opt_state)["test_status"]`.

    Example:
      >>> BatchSizeStatus(6).name
      'NOT_FINITE'
    """

    NOT_TESTED = 0  # no update yet, or between two tests (`test_interval`)
    PASSED = 1  # tested: the batch is large enough
    CHANGED = 2  # tested: the batch size moved
    HELD = 3  # `hold_batch_size=True`
    AT_MAXIMUM = 4  # monotone and as large as it may get: the test is switched off
    TOO_FEW_GROUPS = 5  # fewer than two groups: no variance; a batch that may shrink grows to two
    NOT_FINITE = 6  # NaN or inf in the gradient or its noise
    ZERO_GRADIENT = 7  # nothing to compare the variance with


class SizeMemory(NamedTuple):
    """What one test of the batch size hands on to the next; `evidence_ema` is () without smoothing."""

    evidence_ema: PyTree  # (numerator, denominator), not yet corrected for its start
    evidence_weight: jax.Array  # float32: 1 − decay^tests
    two_group_examples: jax.Array  # int32: below it a batch was one group; 0: none was


class SizeRecord(NamedTuple):
    """What the last test of the batch size showed. No decision reads it."""

    display_ema: jax.Array  # float32 [2]: tr Σ and the de-biased ‖∇F‖², for the noise scale
    test_numerator: jax.Array  # float32: what the last test compared …
    test_denominator: jax.Array  # float32: … with what
    test_degrees_of_freedom: jax.Array  # int32: groups − 1; 0 where no noise was looked at
    required_batch_size: jax.Array  # float32: what the last test asked for
    test_status: jax.Array  # int32: BatchSizeStatus
    skipped_tests: jax.Array  # int32: tests without usable evidence; saturates

    @property
    def noise_scale(self) -> jax.Array:
        """tr Σ / ‖∇F‖², averaged over some ten tests: 0 before the first, +inf where no signal shows."""
        trace, square = self.display_ema[0], self.display_ema[1]
        scale = jnp.where(square > 0, trace / jnp.where(square > 0, square, 1.0), jnp.inf)
        return jnp.where((trace > 0) | (square > 0), scale, 0.0)


class Decision(NamedTuple):
    """The fields of the state that a test changes."""

    next_batch_size: jax.Array
    size_memory: SizeMemory
    last_size_test: SizeRecord

    @classmethod
    def first(cls, size: Any, evidence: PyTree) -> Decision:
        """Before any test: the first `size`, and zero evidence, () without an average."""
        return cls(
            next_batch_size=size,
            size_memory=SizeMemory(
                evidence_ema=evidence,
                evidence_weight=jnp.zeros((), jnp.float32),
                two_group_examples=jnp.zeros((), jnp.int32),
            ),
            last_size_test=SizeRecord(
                display_ema=jnp.zeros((2,), jnp.float32),
                test_numerator=jnp.zeros((), jnp.float32),
                test_denominator=jnp.zeros((), jnp.float32),
                test_degrees_of_freedom=jnp.zeros((), jnp.int32),
                required_batch_size=jnp.zeros((), jnp.float32),
                test_status=jnp.array(int(BatchSizeStatus.NOT_TESTED), jnp.int32),
                skipped_tests=jnp.zeros((), jnp.int32),
            ),
        )


class AdaptBatchSizeState(NamedTuple):
    """State of `adapt_batch_size`."""

    next_batch_size: jax.Array  # int32: examples of the next optimizer step
    largest_batch_size: jax.Array  # int32: max_batch_size
    last_batch_size: jax.Array  # int32: examples of the last step; before it, of the first
    examples_clock: jax.Array  # uint32 [2]: examples used so far
    last_gradient_norm: jax.Array  # float32: ‖ḡ‖ of the last step's batch
    updates_seen: jax.Array  # int32: saturates
    updates_until_test: jax.Array  # int32: 0 where the next update is due for a test
    test_due: jax.Array  # bool: the next update looks at the noise, unless it is held
    size_memory: SizeMemory
    last_size_test: SizeRecord

    @property
    def may_change(self) -> bool:
        """Whether the first batch may be followed by another; True where that is traced."""
        sizes = self.next_batch_size, self.largest_batch_size
        return any(map(is_traced, sizes)) or bool(np.any(np.not_equal(*jax.device_get(sizes))))

    def after_dropped_step(self, after: AdaptBatchSizeState, used_up: bool) -> AdaptBatchSizeState:
        """This state, with the clock of the one after a dropped step whose examples are used up."""
        return self._replace(examples_clock=after.examples_clock) if used_up else self

    def report_metrics(self) -> dict[str, Any]:
        """The numbers that `adabatch.metrics` shows."""
        last = self.last_size_test
        tested = (last.test_status == BatchSizeStatus.PASSED) | (
            last.test_status == BatchSizeStatus.CHANGED
        )
        # Zeros, not NaN, where nothing was measured: jax_debug_nans would stop a healthy run.
        return {
            "batch_size": self.last_batch_size,
            "next_batch_size": self.next_batch_size,
            "num_examples": as_int(self.examples_clock),
            "optimizer_steps": self.updates_seen,
            "gradient_norm": self.last_gradient_norm,
            "noise_scale": last.noise_scale,
            "noise_numerator": jnp.where(tested, last.test_numerator, 0.0),
            "noise_denominator": jnp.where(tested, last.test_denominator, 0.0),
            "degrees_of_freedom": jnp.where(tested, last.test_degrees_of_freedom, 0),
            "required_batch_size": jnp.where(tested, last.required_batch_size, 0.0),
            "test_status": by_name(BatchSizeStatus, last.test_status),
            "skipped_tests": last.skipped_tests,
        }
