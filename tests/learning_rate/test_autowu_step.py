"""One step of AutoWU, function by function, without an optimizer."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import AutowuPhase, WarmupEnd, scale_by_autowu
from adabatch_jax.learning_rate import Peak, _autowu_step as step, rbf_smoother
from adabatch_jax.learning_rate._autowu_plan import Plan

OPTIONS = dict(total_steps=100, steps_per_test=5, watch_divergence=True)


def plan(**changes):
    """That of `scale_by_autowu(**OPTIONS)`."""
    return Plan(
        **dict(by_steps=True, total=100, interval=5, min_learning_rate=1e-5, max_learning_rate=1.0)
        | dict(max_warmup_fraction=0.5, patience=3, confidence=0.95, warmup="exponential")
        | dict(warmup_unit="step", decay="cosine", cooldown_fraction=None, max_losses=4096)
        | dict(smoother=rbf_smoother(), peak=Peak(), watch_divergence=True)
        | changes
    )


def at(clock, **changes):
    """A state at this step, and its moment."""
    state = scale_by_autowu(**OPTIONS).init({})
    state = state._replace(autowu_clock=jnp.array([0, clock], jnp.uint32), **changes)
    return state, step.moment_of(plan(), state, jnp.int32(1))


ENDED = {"warmup_end": jnp.int32(WarmupEnd.AT_LIMIT), "peak_learning_rate": jnp.float32(0.5)}


@pytest.mark.parametrize(("clock", "rate"), [(0, 1e-5), (25, 10**-2.5)])
def test_the_rate_rises_by_the_same_factor_every_step(clock, rate):
    state = step.with_rate(plan(), *at(clock))
    np.testing.assert_allclose(state.autowu_learning_rate, rate, rtol=1e-5)
    assert int(state.autowu_phase) == AutowuPhase.WARMUP


def test_after_the_warm_up_the_rate_falls_to_zero():
    state = step.with_rate(plan(), *at(99, **ENDED, peak_position=jnp.float32(50)))
    np.testing.assert_allclose(state.autowu_learning_rate, 0.0, atol=1e-7)
    assert int(state.autowu_phase) == AutowuPhase.DECAY


def test_a_loss_that_is_not_finite_is_left_out_and_counted():
    state, diverged = step.with_loss(*at(3), jnp.float32(jnp.nan))
    assert int(state.nonfinite_losses) == 1 and int(state.loss_history.entries) == 0
    assert not diverged


def test_losses_after_the_warm_up_are_not_kept():
    assert int(step.with_loss(*at(3), jnp.float32(1.0))[0].loss_history.entries) == 1
    assert int(step.with_loss(*at(60, **ENDED), jnp.float32(1.0))[0].loss_history.entries) == 0


@pytest.mark.parametrize(("clock", "over"), [(3, False), (4, True)])
def test_a_test_interval_is_over_with_its_last_step(clock, over):
    state, moment = at(clock, since_test=jnp.uint32(clock))
    after, interval_over = step.with_time(plan(), state, moment)
    assert bool(interval_over) is over
    assert after.autowu_clock.tolist() == [0, clock + 1]
    assert int(after.since_test) == (clock + 1) % 5


@pytest.mark.parametrize(
    ("losses", "reason"), [(0, WarmupEnd.NO_FINITE_LOSS), (1, WarmupEnd.AT_LIMIT)]
)
def test_a_warm_up_without_a_minimum_ends_at_its_limit(losses, reason):
    state, moment = at(49, autowu_learning_rate=jnp.float32(0.7))
    history = state.loss_history._replace(complete=jnp.int32(losses))
    state = step.with_end(plan(), state._replace(loss_history=history), moment)
    assert int(state.warmup_end) == reason
    np.testing.assert_allclose(state.peak_learning_rate, 0.7, rtol=1e-6)
    assert float(state.peak_position) == 50


def test_the_program_of_a_run_whose_warm_up_is_over_has_no_test():
    over = plan(smoother=rbf_smoother(warmup_over=True))
    state, moment = at(4)
    assert step.with_test(over, state, moment, jnp.bool_(True), jnp.bool_(False), True) is state
