"""The state of `scale_by_autowu`, and what it tells."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax._clock import as_float, zero_clock
from adabatch_jax._protocols import by_name
from adabatch_jax.learning_rate._autowu_plan import Plan
from adabatch_jax.learning_rate._divergence import LossLevel, no_level
from adabatch_jax.learning_rate._loss_history import LossHistory, empty_history
from adabatch_jax.learning_rate._step_length import StepLength, no_length


class AutowuPhase(enum.IntEnum):
    """Where the schedule stood at the last update: `metrics(opt_state)["phase"]`.

    Example:
      >>> AutowuPhase(2).name
      'DECAY'
    """

    WARMUP = 0
    HOLD = 1
    DECAY = 2


class WarmupEnd(enum.IntEnum):
    """Why the warm-up ended: `metrics(opt_state)["warmup_end"]`.

    Example:
      >>> WarmupEnd(1).name
      'MINIMUM_PASSED'
    """

    RUNNING = 0  # it has not
    MINIMUM_PASSED = 1  # the loss has passed its minimum: back to the rate there
    AT_LIMIT = 2  # no minimum seen: on with the last rate
    DIVERGED = 3  # losses exploded or were not finite, two in a row: back as after a minimum
    NO_FINITE_LOSS = 4  # at the limit without a single finite loss: nothing is known
    NO_WARMUP = 5  # max_warmup_fraction = 0, or a run of `automatic` that is too short for one


class WarmupMemory(NamedTuple):
    """What one test of the warm-up hands on to the next."""

    smoother_state: Any
    draw_key: jax.Array  # PRNG key of the draws
    yes_in_a_row: jax.Array  # int32: tests in a row that said the minimum is past


class WarmupRecord(NamedTuple):
    """What the tests of the warm-up showed."""

    minimum_probability: jax.Array  # float32: of the last test, mean over its draws
    minimum_location: jax.Array  # float32: the same, in [0, 1] of the series so far
    tests_made: jax.Array  # int32
    failed_draws: jax.Array  # int32: draws whose factorisation failed: "no" votes


class Verdict(NamedTuple):
    """The fields of the state that a test changes."""

    warmup_end: jax.Array
    peak_learning_rate: jax.Array
    warmup_memory: WarmupMemory
    last_warmup_test: WarmupRecord


class ScaleByAutowuState(NamedTuple):
    """State of `scale_by_autowu`: of fixed size."""

    autowu_learning_rate: jax.Array  # float32: the rate last applied
    autowu_phase: jax.Array  # int32: AutowuPhase of that step
    warmup_end: jax.Array  # int32: WarmupEnd
    peak_learning_rate: jax.Array  # float32: after the warm-up; before, of the last test alone
    peak_position: jax.Array  # float32: where the warm-up ended, in units of the clock
    autowu_clock: jax.Array  # uint32 [2]: steps or examples so far
    first_increment: (
        jax.Array
    )  # int32: examples of the first step, 0 before it; 1 for the steps clock
    since_test: jax.Array  # uint32: steps or examples since a test was last due
    loss_history: LossHistory
    loss_level: tuple[jax.Array, ...]  # what divergence is told from; () if it is not watched
    step_length: tuple[jax.Array, ...]  # how high it lets the rate be; () without a bound
    warmup_memory: WarmupMemory
    last_warmup_test: WarmupRecord
    nonfinite_losses: jax.Array  # int32: left out
    exploded_losses: jax.Array  # int32: left out for being far above the others
    setbacks: jax.Array  # int32: times the rate was halved after the warm-up

    @property
    def counts_steps(self) -> jax.Array:
        """Bool scalar: whether the clock is that of optimizer steps."""
        return self.first_increment == 1

    def warmup_ended_lately(self) -> jax.Array:
        """Whether less time has passed since the warm-up than it took."""
        ended = self.warmup_end != WarmupEnd.RUNNING
        return ended & (as_float(self.autowu_clock) <= 2.0 * self.peak_position)

    @property
    def losses_left_out(self) -> jax.Array:
        """int32: that were not finite, or far above the others."""
        return self.nonfinite_losses + self.exploded_losses

    def after_dropped_step(self, after: ScaleByAutowuState, used_up: bool) -> ScaleByAutowuState:
        """This state, with what the one after a dropped step knows of bad losses in a row.

        Its clock goes on where the examples of the step are used up.
        """
        level = self.loss_level
        if isinstance(level, LossLevel):
            level = level._replace(bad_in_a_row=LossLevel(*after.loss_level).bad_in_a_row)
        clock = after.autowu_clock if used_up else self.autowu_clock
        return self._replace(loss_level=level, autowu_clock=clock)

    @property
    def minimum_found(self) -> jax.Array:
        """Whether the peak is the rate of a minimum: one that was passed, or lay before an explosion."""
        exploded = (self.warmup_end == WarmupEnd.DIVERGED) & (
            self.last_warmup_test.minimum_location > 0
        )
        return (self.warmup_end == WarmupEnd.MINIMUM_PASSED) | exploded

    def bounded(self, rate: jax.Array) -> jax.Array:
        """The rate, but no higher than `max_relative_step` lets it be."""
        if not isinstance(self.step_length, StepLength):
            return rate
        return jnp.minimum(rate, self.step_length.highest_rate)

    def report_metrics(self) -> dict[str, Any]:
        """The numbers that `adabatch.metrics` shows."""
        ended = self.warmup_end != WarmupEnd.RUNNING
        return {
            "learning_rate": self.autowu_learning_rate,
            "phase": by_name(AutowuPhase, self.autowu_phase),
            "warmup_end": by_name(WarmupEnd, self.warmup_end),
            "minimum_found": self.minimum_found,
            "peak_learning_rate": jnp.where(ended, self.peak_learning_rate, 0.0),
            **self.last_warmup_test._asdict(),
            "nonfinite_losses": self.nonfinite_losses,
            "exploded_losses": self.exploded_losses,
            "setbacks": self.setbacks,
        }


def first_state(plan: Plan) -> ScaleByAutowuState:
    """Before the first step."""

    def number(value: Any) -> jax.Array:
        return jnp.array(value).astype(jnp.float32)

    def count(value: int = 0) -> jax.Array:
        return jnp.array(value, jnp.int32)

    end = WarmupEnd.NO_WARMUP if plan.unsearched else WarmupEnd.RUNNING
    top = plan.max_learning_rate
    return ScaleByAutowuState(
        autowu_learning_rate=number(top if plan.unsearched else plan.min_learning_rate),
        autowu_phase=count(int(AutowuPhase.WARMUP)),
        warmup_end=count(int(end)),
        peak_learning_rate=number(top if plan.unsearched else 0.0),
        peak_position=number(0.0),
        autowu_clock=zero_clock(),
        first_increment=count(int(plan.by_steps)),
        since_test=jnp.zeros((), jnp.uint32),
        loss_history=empty_history(plan.limit + 1 if plan.by_steps else plan.max_losses),
        loss_level=no_level() if plan.watch_divergence else (),
        step_length=() if plan.peak.max_relative_step is None else no_length(),
        warmup_memory=WarmupMemory(
            smoother_state=plan.smoother.init(),
            draw_key=jax.random.PRNGKey(plan.smoother.seed),
            yes_in_a_row=count(),
        ),
        last_warmup_test=WarmupRecord(
            minimum_probability=number(0.0),
            minimum_location=number(0.0),
            tests_made=count(),
            failed_draws=count(),
        ),
        nonfinite_losses=count(),
        exploded_losses=count(),
        setbacks=count(),
    )


def find_schedule(opt_state: Any, where: str) -> ScaleByAutowuState:
    """The state of the one `scale_by_autowu` in an optimizer's state, wherever it sits.

    Raises:
      ValueError: there is none, or more than one; the message begins with `where`.
    """

    def is_schedule(x: Any) -> bool:
        return isinstance(x, ScaleByAutowuState)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_schedule) if is_schedule(x)]
    if len(found) != 1:
        raise ValueError(
            f"{where}: the optimizer must hold one scale_by_autowu, found {len(found)}"
        )
    return found[0]
