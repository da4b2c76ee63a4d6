"""One step of AutoWU as pure functions: its rate, what its loss shows, the test, the end of the warm-up."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax._clock import advance, as_float
from adabatch_jax._types import PyTree
from adabatch_jax.learning_rate._autowu_plan import Plan
from adabatch_jax.learning_rate._autowu_state import (
    AutowuPhase,
    ScaleByAutowuState,
    Verdict,
    WarmupEnd,
)
from adabatch_jax.learning_rate._decision import decide
from adabatch_jax.learning_rate._divergence import LossLevel, follow
from adabatch_jax.learning_rate._loss_history import record
from adabatch_jax.learning_rate._step_length import StepLength, measure

MAX_SETBACKS = 6  # down to 1/64 of the peak: by more than that it cannot have been too high


class Moment(NamedTuple):
    """When a step is made, in units of the clock."""

    position: jax.Array  # float32: where it begins …
    end: jax.Array  # … and ends
    increment: jax.Array  # int32: its length
    first_increment: jax.Array  # int32: that of the first step
    top: jax.Array  # float32: W, the end of the longest warm-up
    clock: jax.Array  # uint32 [2]: `end`, exactly
    rises: jax.Array  # bool: it belongs to the warm-up


def moment_of(plan: Plan, state: ScaleByAutowuState, increment: jax.Array) -> Moment:
    """The moment of a step of so many examples, or of one step."""
    first = jnp.where(state.first_increment > 0, state.first_increment, increment)
    clock = advance(state.autowu_clock, increment)
    return Moment(
        position=as_float(state.autowu_clock),
        end=as_float(clock),
        increment=increment,
        first_increment=first,
        top=plan.top(first),
        clock=clock,
        rises=state.warmup_end == WarmupEnd.RUNNING,
    )


def with_direction(
    plan: Plan, state: ScaleByAutowuState, moment: Moment, direction: PyTree, params: PyTree
) -> ScaleByAutowuState:
    """The state that has seen the length of one more direction, where there is a bound by length."""
    length, unsearched = state.step_length, plan.unsearched
    if not isinstance(length, StepLength) or (plan.smoother.warmup_over and not unsearched):
        return state
    bound = plan.peak.max_relative_step
    wanted = moment.rises | unsearched
    return state._replace(step_length=measure(length, direction, params, bound, wanted, unsearched))


def with_rate(plan: Plan, state: ScaleByAutowuState, moment: Moment) -> ScaleByAutowuState:
    """The state with the rate and the phase of this step."""
    length, peak = state.step_length, state.peak_learning_rate
    factor, held = plan.falling(moment.position, moment.end, state.peak_position)
    if plan.unsearched and isinstance(length, StepLength):
        peak = jnp.minimum(peak, length.highest_rate)
        factor *= length.share_seen
    rate = jnp.where(moment.rises, plan.rising(moment.position, moment.top), peak * factor)
    phase = jnp.where(held, int(AutowuPhase.HOLD), int(AutowuPhase.DECAY))
    phase = jnp.where(moment.rises, int(AutowuPhase.WARMUP), phase)
    return state._replace(
        autowu_learning_rate=rate.astype(jnp.float32),
        autowu_phase=phase.astype(jnp.int32),
        peak_learning_rate=peak,
    )


def with_loss(
    state: ScaleByAutowuState, moment: Moment, loss: jax.Array
) -> tuple[ScaleByAutowuState, jax.Array]:
    """The state that has seen this loss, and whether it diverged; after the warm-up a setback follows."""
    finite = jnp.isfinite(loss)
    kept, left_out, diverged = loss, ~finite, jnp.zeros((), bool)
    level = state.loss_level
    if isinstance(level, LossLevel):
        level, kept, left_out, diverged = follow(level, loss, moment.position, moment.rises)
    setback = diverged & ~moment.rises & (finite | state.warmup_ended_lately())
    setback &= state.setbacks < MAX_SETBACKS
    seen = ~left_out & moment.rises
    return state._replace(
        peak_learning_rate=jnp.where(setback, 0.5, 1.0) * state.peak_learning_rate,
        loss_history=record(state.loss_history, kept, moment.position, seen),
        loss_level=level,
        nonfinite_losses=state.nonfinite_losses + (~finite).astype(jnp.int32),
        exploded_losses=state.exploded_losses + (left_out & finite).astype(jnp.int32),
        setbacks=state.setbacks + setback.astype(jnp.int32),
    ), diverged


def with_time(
    plan: Plan, state: ScaleByAutowuState, moment: Moment
) -> tuple[ScaleByAutowuState, jax.Array]:
    """The state whose clocks stand at the end of the step, and whether a test interval is over."""
    since = state.since_test + jnp.maximum(moment.increment, 0).astype(jnp.uint32)
    return state._replace(
        autowu_clock=moment.clock,
        first_increment=moment.first_increment.astype(jnp.int32),
        since_test=since % np.uint32(plan.interval),
    ), since >= np.uint32(plan.interval)


def with_test(
    plan: Plan,
    state: ScaleByAutowuState,
    moment: Moment,
    interval_over: jax.Array,
    diverged: jax.Array,
    emit: jax.Array,
) -> ScaleByAutowuState:
    """The state after the test, where one is due: the part of a step that costs."""
    if not plan.tests:
        return state
    last = _last(plan, moment)
    at_end = moment.rises & (moment.end >= last)
    stop = at_end & (plan.peak.at_limit == "minimum")
    diverged &= moment.rises
    # One loss alone has no minimum; and without `emit` the result would be dropped.
    due = interval_over & ~at_end
    due = (due | diverged | stop) & moment.rises & (state.loss_history.entries > 1) & emit
    # The paper's x = 1 lies one step past the last loss. A smoother that does not look ahead takes the last
    # loss for the present, and that loss answers to the rate of the step before.
    ahead = plan.smoother.looks_ahead
    span = moment.end if ahead else jnp.maximum(moment.position, 1.0)
    delay = 0.0 if ahead else moment.increment.astype(jnp.float32) / span

    def test(state: ScaleByAutowuState) -> Verdict:
        return decide(plan, state, span, span / last, delay, diverged, stop)

    def wait(state: ScaleByAutowuState) -> Verdict:
        return Verdict(*(getattr(state, name) for name in Verdict._fields))

    return state._replace(**jax.lax.cond(due, test, wait, state)._asdict())


def with_end(plan: Plan, state: ScaleByAutowuState, moment: Moment) -> ScaleByAutowuState:
    """The state that notes the end of the warm-up.

    Without a test that ended it, the warm-up goes on from its last rate at the limit.
    """
    quits = moment.rises & (moment.end >= _last(plan, moment))
    quits &= state.warmup_end == WarmupEnd.RUNNING
    known = state.loss_history.entries > 0
    reason = jnp.where(known, int(WarmupEnd.AT_LIMIT), int(WarmupEnd.NO_FINITE_LOSS))
    ended = jnp.where(quits, reason, state.warmup_end).astype(jnp.int32)
    switches = moment.rises & (ended != WarmupEnd.RUNNING)
    level = state.loss_level
    if isinstance(level, LossLevel):  # the next loss may be that of other parameters
        level = level._replace(begun=level.begun & ~switches)
    rate = state.bounded(state.autowu_learning_rate)
    return state._replace(
        warmup_end=ended,
        peak_learning_rate=jnp.where(quits, rate, state.peak_learning_rate),
        peak_position=jnp.where(switches, moment.end, state.peak_position),
        loss_level=level,
    )


def _last(plan: Plan, moment: Moment) -> jax.Array:
    """Where a warm-up ends at the latest: at W, or where the cooldown begins."""
    return jnp.minimum(moment.top, jnp.float32(plan.cooldown_start))
