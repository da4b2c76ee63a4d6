"""AutoWU's test: what the smoothed losses say about the end of the warm-up and the rate after it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax.learning_rate._autowu_plan import Plan
from adabatch_jax.learning_rate._autowu_state import (
    ScaleByAutowuState,
    Verdict,
    WarmupEnd,
    WarmupMemory,
    WarmupRecord,
)
from adabatch_jax.learning_rate._divergence import LossLevel
from adabatch_jax.learning_rate._posterior_test import LEAST_LOCATION


def decide(
    plan: Plan,
    state: ScaleByAutowuState,
    span: jax.Array,
    progress: jax.Array,
    delay: Any,
    diverged: jax.Array,
    stop: jax.Array,
) -> Verdict:
    """Smooth the losses, vote, and take the rate at the minimum: the branch that costs."""
    history, memory, last = state.loss_history, state.warmup_memory, state.last_warmup_test
    key, draw_key = jax.random.split(memory.draw_key)
    # Optax and tinygp mix dtypes and ranks freely; what users demand of their code is their affair.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        x = (history.positions / span).astype(jnp.float32)
        fitted, draws = plan.smoother.test(
            memory.smoother_state, x, history.losses, history.entries, draw_key, progress
        )
    fitted = jax.tree.map(lambda a, b: a.astype(b.dtype), fitted, memory.smoother_state)
    ok = jnp.isfinite(draws.probability) & jnp.isfinite(draws.location)
    good = jnp.sum(ok.astype(jnp.float32))

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(ok, values, 0.0)) / jnp.maximum(good, 1.0)

    votes = jnp.sum(ok & (draws.probability > plan.confidence), dtype=jnp.int32)
    streak = jnp.where(2 * votes > ok.shape[0], memory.yes_in_a_row + 1, 0).astype(jnp.int32)
    past = streak >= plan.patience
    rate = state.autowu_learning_rate
    place = draws.location
    if plan.peak.at != "minimum":
        # Where the start is as low as that, the losses are too few or too noisy to say that anything
        # has fallen: the lowest point is then the best guess, if it is not the start itself, else the
        # middle, and the lowest rate is the worst.
        guess = jnp.where(place < LEAST_LOCATION + delay, 0.5 + delay, place)
        place = jnp.where(draws.earliest < LEAST_LOCATION + delay, guess, draws.earliest)
    if not plan.smoother.looks_ahead:  # no further than the last loss that was not left out
        place = jnp.minimum(place, x[jnp.maximum(history.entries - 1, 0)])
    peak = mean(plan.between(rate, jnp.maximum(place - delay, 0.0)))
    if isinstance(state.loss_level, LossLevel):  # where the average was lowest, if no draw knows
        lowest = plan.between(rate, state.loss_level.lowest_position / span)
        peak = jnp.where(good > 0, peak, lowest)
    else:
        peak = jnp.where(good > 0, peak, rate)
    factor = jnp.asarray(plan.peak.factor).astype(jnp.float32)
    peak = state.bounded(jnp.minimum(factor * peak, jnp.maximum(peak, rate)))
    # What a test found where nothing had fallen confirms nothing.
    of_this_test = jnp.where(mean(draws.location) < LEAST_LOCATION + delay, jnp.inf, peak)
    if plan.peak.at == "confirmed":
        before = jnp.where(last.tests_made > 0, state.peak_learning_rate, jnp.inf)
        peak = jnp.minimum(peak, before)
    reason = jnp.where(stop, int(WarmupEnd.AT_LIMIT), state.warmup_end)
    reason = jnp.where(past, int(WarmupEnd.MINIMUM_PASSED), reason)
    reason = jnp.where(diverged, int(WarmupEnd.DIVERGED), reason)
    switch = past | diverged | stop
    return Verdict(
        warmup_end=reason.astype(jnp.int32),
        peak_learning_rate=jnp.where(switch, peak, of_this_test),
        warmup_memory=WarmupMemory(fitted, key, streak),
        last_warmup_test=WarmupRecord(
            minimum_probability=mean(draws.probability),
            minimum_location=mean(draws.location),
            tests_made=last.tests_made + 1,
            failed_draws=last.failed_draws + jnp.sum(~ok, dtype=jnp.int32),
        ),
    )
