"""`return_to_minimum`: what goes back, what stays, and when."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax import WarmupEnd
from tests.learning_rate.losses import BOWL, FALLING, T

OPTIONS = {"total_steps": T, "steps_per_test": 1, "smoother": "as they are", "patience": 3}


def schedule(**options):
    return adabatch.scale_by_autowu(**(OPTIONS | options))


@functools.cache
def update_of(optimizer):
    """One program for all runs of an optimizer."""
    return jax.jit(lambda g, s, p, v: optimizer.update(g, s, p, value=v))


@functools.cache
def bounded():
    link = schedule(peak={"max_relative_step": 5e-4, "at_limit": "minimum"})
    return adabatch.return_to_minimum(optax.chain(link))


@functools.cache
def watching():
    link = schedule(watch_divergence=True, steps_per_test=2)
    return adabatch.return_to_minimum(optax.chain(optax.scale_by_adam(), link))


class Run(NamedTuple):
    params: list  # before each step, and after the last
    states: list


def run(optimizer, losses, params=None, gradient=None, until=T):
    """Steps along constant gradients, whatever the loss is said to be."""
    params = {"w": jnp.array([1.0, -2.0, 0.3])} if params is None else params
    gradient = jax.tree.map(jnp.ones_like, params) if gradient is None else gradient
    state = optimizer.init(params)
    done = Run([params], [state])
    for loss in np.float32(losses)[:until]:
        updates, state = update_of(optimizer)(gradient, state, params, loss)
        params = optax.apply_updates(params, updates)
        done.params.append(params)
        done.states.append(state)
    return done


def inner(state):
    return state.inner_returning_state


@pytest.fixture(scope="module")
def bowl():
    optimizer = adabatch.return_to_minimum(optax.chain(optax.scale_by_adam(), schedule()))
    return run(optimizer, BOWL, until=30)


def switch_of(done):
    """The step at whose update the warm-up ended."""
    ends = [int(inner(s)[-1].warmup_end) for s in done.states]
    return next(t for t, end in enumerate(ends) if end != WarmupEnd.RUNNING)


def test_the_parameters_are_those_of_the_last_test_at_which_the_minimum_lay_at_present(bowl):
    t = switch_of(bowl)
    taken = [int(s.snapshots_taken) for s in bowl.states]
    last = max(i for i in range(1, t) if taken[i] > taken[i - 1])
    assert 14 <= last <= 16 < t, "the losses are lowest at step 14"
    np.testing.assert_allclose(bowl.params[t]["w"], bowl.params[last - 1]["w"], rtol=2e-7)
    assert (bowl.params[t]["w"] != bowl.params[t - 1]["w"]).all()


def test_the_moments_go_back_and_the_schedule_goes_on(bowl):
    t = switch_of(bowl)
    taken = [int(s.snapshots_taken) for s in bowl.states]
    last = max(i for i in range(1, t) if taken[i] > taken[i - 1])
    before, after = inner(bowl.states[last - 1]), inner(bowl.states[t])
    jax.tree.map(np.testing.assert_array_equal, after[0], before[0])
    assert int(after[0].count) == last - 1 < t - 1
    clock = [int(inner(s)[1].autowu_clock[1]) for s in bowl.states]
    assert clock == list(range(len(clock)))


def test_afterwards_it_stays_out_of_the_way(bowl):
    t = switch_of(bowl)
    plain = optax.chain(optax.scale_by_adam(), schedule())
    state, params = inner(bowl.states[t]), bowl.params[t]
    for k in range(t, 30):
        ones, loss = {"w": jnp.ones(3)}, jnp.float32(BOWL[k])
        updates, state = update_of(plain)(ones, state, params, loss)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], bowl.params[k + 1]["w"], rtol=1e-6)


def test_at_the_limit_with_the_last_rate_nothing_goes_back():
    optimizer = adabatch.return_to_minimum(optax.chain(optax.trace(0.9), schedule()))
    done = run(optimizer, FALLING, until=32)
    t = switch_of(done)
    assert int(inner(done.states[t])[1].warmup_end) == WarmupEnd.AT_LIMIT
    w = np.array([p["w"][0] for p in done.params])
    assert (np.diff(w) < 0).all()


@pytest.mark.parametrize(
    ("losses", "end"),
    [(BOWL, WarmupEnd.MINIMUM_PASSED), (FALLING, WarmupEnd.AT_LIMIT)],
    ids=["bowl", "falling"],
)
def test_above_the_bound_of_the_rate_no_snapshot_is_taken(losses, end):
    """A gradient as long as w; rates pass 5e-4 after ten steps. At the limit it goes back there, too."""
    done = run(bounded(), losses, {"w": jnp.ones((2, 2))}, until=32)
    t = switch_of(done)
    assert int(inner(done.states[t])[0].warmup_end) == end
    taken = [int(s.snapshots_taken) for s in done.states]
    last = max(i for i in range(1, t) if taken[i] > taken[i - 1])
    rates = [float(inner(s)[0].autowu_learning_rate) for s in done.states]
    assert rates[last] <= 5e-4 < rates[last + 1]
    np.testing.assert_allclose(done.params[t]["w"], done.params[last - 1]["w"], rtol=2e-7)
    assert float(inner(done.states[t])[0].peak_learning_rate) <= 5e-4


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
def test_after_a_divergence_everything_is_finite_again(bad):
    """The gradient that comes with the bad loss is NaN and spoils the moments."""
    params = {"w": jnp.array([1.0, 2.0])}
    state = watching().init(params)
    losses = np.where(np.arange(T) < 18, 3.0 - 0.1 * np.arange(T), bad)
    for t in range(20):
        gradient = {"w": jnp.full(2, np.nan if t >= 18 else 1.0, jnp.float32)}
        before = params, inner(state)[0]
        updates, state = update_of(watching())(gradient, state, params, jnp.float32(losses[t]))
        params = optax.apply_updates(params, updates)
        if t == 18:  # the first is left out, and what came with it
            assert int(inner(state)[1].warmup_end) == WarmupEnd.RUNNING
            jax.tree.map(np.testing.assert_array_equal, (params, inner(state)[0]), before)
    assert int(inner(state)[1].warmup_end) == WarmupEnd.DIVERGED
    for leaf in jax.tree.leaves((params, inner(state)[0])):
        assert np.isfinite(leaf).all()
    np.testing.assert_allclose(params["w"], state.snapshot_params["w"], rtol=2e-7)


def test_a_setback_leads_back_to_a_snapshot_that_was_renewed_after_the_warm_up():
    """The loss falls until step 44 and jumps: back to where it was last lowest at a test interval."""
    optimizer = adabatch.return_to_minimum(
        optax.chain(optax.trace(0.9), schedule(watch_divergence=True, steps_per_test=3))
    )
    losses = np.where(np.arange(T) < 45, FALLING, 2.9)
    done = run(optimizer, losses, until=48)
    schedules = [inner(s)[1] for s in done.states]
    assert int(schedules[-1].warmup_end) == WarmupEnd.AT_LIMIT
    (t,) = [i for i in range(1, 49) if int(schedules[i].setbacks) > int(schedules[i - 1].setbacks)]
    assert int(done.states[t].returns_made) == 1 + int(done.states[t - 1].returns_made) == 1
    taken = [int(s.snapshots_taken) for s in done.states]
    last = max(i for i in range(1, t) if taken[i] > taken[i - 1])
    assert 42 <= last <= 45, "the last test interval before the jump"
    np.testing.assert_allclose(done.params[t]["w"], done.params[last - 1]["w"], rtol=1e-6)
    assert done.params[t]["w"][0] > done.params[t - 1]["w"][0]


def test_controller_keys_and_injected_numbers_stay():
    def links(step_size):
        return optax.chain(optax.trace(0.9), optax.scale(step_size))

    optimizer = adabatch.return_to_minimum(
        optax.chain(
            adabatch.adapt_batch_size(
                adabatch.norm_test(1.0), initial_batch_size=8, max_batch_size=8
            ),
            optax.inject_hyperparams(links)(step_size=0.5),
            schedule(),
        )
    )
    params = {"w": jnp.ones(2)}
    state = optimizer.init(params)
    noise = adabatch.GradientNoise({"w": jnp.ones(2)}, *(jnp.float32(1), *map(jnp.int32, (8, 2))))
    step = jax.jit(lambda s, v: optimizer.update(noise.mean, s, params, value=v, noise=noise)[1])
    trace = []
    for loss in np.float32(BOWL[:25]):
        state = step(state, loss)
        trace.append(float(inner(state)[1].inner_state[0].trace["w"][0]))
    controller, injected, autowu = inner(state)
    assert int(autowu.warmup_end) == WarmupEnd.MINIMUM_PASSED
    assert (np.diff(trace) < 0).any(), "the momentum went back"
    assert adabatch.metrics(state)["num_examples"] == 25 * 8
    assert int(controller.updates_seen) == 25
    assert int(injected.count) == 25 and float(injected.hyperparams["step_size"]) == 0.5
    assert not np.array_equal(autowu.warmup_memory.draw_key, jax.random.PRNGKey(0))


def test_inside_adaptive_multi_steps_it_goes_back_once_per_switch():
    optimizer = adabatch.adaptive_multi_steps(
        adabatch.return_to_minimum(
            optax.chain(
                adabatch.adapt_batch_size(
                    adabatch.norm_test(1.0), initial_batch_size=8, max_batch_size=8
                ),
                optax.trace(0.9),
                schedule(),
            )
        ),
        micro_batch_size=4,
    )
    plain = adabatch.return_to_minimum(optax.chain(optax.trace(0.9), schedule()))
    expected = run(plain, BOWL, {"w": jnp.ones(2)}, until=30)
    params = {"w": jnp.ones(2)}
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    found = [params]
    for loss in np.float32(BOWL[:30]):
        for _ in range(2):
            updates, state = step({"w": jnp.ones(2)}, state, params, value=loss)
            params = optax.apply_updates(params, updates)
        found.append(params)
    for a, b in zip(found, expected.params, strict=True):
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-5)


def test_narrow_updates_lead_back_exactly_in_two_steps():
    """The way is 60 times as long as the snapshot: its rounding alone would be a part of that."""
    w = jnp.linspace(0.5, 2.0, 20)
    params = {"a": w.astype(jnp.bfloat16), "b": w.astype(jnp.float16)}
    links = optax.chain(optax.scale(300.0), schedule())
    gradient = jax.tree.map(jnp.sqrt, params)
    done = run(adabatch.return_to_minimum(links), BOWL, params, gradient, until=30)
    t = switch_of(done)
    assert [bool(s.returning) for s in done.states[t - 1 : t + 2]] == [False, True, False]
    assert int(done.states[-1].returns_made) == 1
    for leaf, kept in done.states[t].snapshot_params.items():
        after = [p[leaf] for p in done.params[t : t + 3]]
        assert after[0].dtype == after[1].dtype == kept.dtype
        assert (after[0] != kept).any() and (after[2] != kept).all()
        assert after[1].tolist() == kept.tolist()


def test_without_parameters_it_says_what_it_needs():
    optimizer = adabatch.return_to_minimum(schedule())
    state = optimizer.init({"w": jnp.ones(2)})
    with pytest.raises(
        ValueError, match=r"keeps a snapshot.*optimizer.update\(gradient, state, params"
    ):
        optimizer.update({"w": jnp.ones(2)}, state, value=1.0)


@pytest.mark.parametrize("number", [0, 2])
def test_it_needs_exactly_one_schedule(number):
    links = [schedule() for _ in range(number)]
    optimizer = adabatch.return_to_minimum(optax.chain(optax.scale(1.0), *links))
    with pytest.raises(ValueError, match=f"must hold one scale_by_autowu, found {number}"):
        optimizer.init({"w": jnp.ones(2)})
