"""The schedule around the test: curves, clocks, phases, divergence, bad input."""

from __future__ import annotations

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax import AutowuPhase, WarmupEnd
from adabatch_jax.learning_rate import (
    Peak,
    _autowu_preset,
    _autowu_step,
    quasisep_smoother,
    rbf_smoother,
)
from adabatch_jax.learning_rate._divergence import follow, no_level
from adabatch_jax.learning_rate._posterior_test import Draws
from tests.learning_rate.losses import BOWL, FALLING, T, as_they_are
from tests.marks import slow

RNG = np.random.default_rng(0)


@functools.cache  # equal options, the same link, hence the same compiled program
def schedule(**options):
    given = {"total_steps": T, "steps_per_test": 5, "smoother": "as they are"} | options
    return adabatch.scale_by_autowu(**given)


@functools.cache
def program(link):
    def step(state, given):
        updates, state = link.update(jnp.ones(()), state, **given)
        return state, (updates, state)

    return jax.jit(lambda s, x: jax.lax.scan(step, s, x)[1])


def run(link, losses, **extra_args):
    """The states after every step, stacked; extra arguments are sequences."""
    given = {"value": losses} | extra_args
    given = {name: jnp.asarray(values) for name, values in given.items()}
    given["value"] = given["value"].astype(jnp.float32)
    return program(link)(link.init({}), given)


def rates(link, losses, **extra_args):
    return np.asarray(run(link, losses, **extra_args)[1].autowu_learning_rate)


def rise(steps, low=1e-5, high=1.0, top=30):
    return low * (high / low) ** (np.arange(steps) / top)


def test_it_multiplies_by_minus_the_rate():
    updates, states = run(schedule(), FALLING)
    np.testing.assert_allclose(updates, -states.autowu_learning_rate)
    updates, states = run(schedule(flip_sign=False), FALLING)
    np.testing.assert_allclose(updates, states.autowu_learning_rate)


def test_the_warm_up_is_exponential_linear_or_by_epochs():
    np.testing.assert_allclose(rates(schedule(), FALLING)[:30], rise(30), rtol=1e-4)
    linear = 1e-5 + (1.0 - 1e-5) * np.arange(30) / 30
    np.testing.assert_allclose(rates(schedule(warmup="linear"), FALLING)[:30], linear, rtol=1e-5)
    by_epoch = rise(30)[np.arange(30) // 5 * 5]
    got = rates(schedule(warmup_unit="epoch"), FALLING)[:30]
    np.testing.assert_allclose(got, by_epoch, rtol=1e-4)


def test_at_the_limit_the_last_rate_decays():
    _, states = run(schedule(), FALLING)
    t = np.arange(30, T)
    expected = rise(30)[-1] * 0.5 * (1 + np.cos(np.pi * (t - 29) / 30))
    np.testing.assert_allclose(states.autowu_learning_rate[30:], expected, rtol=1e-4, atol=1e-7)
    assert int(states.warmup_end[-1]) == WarmupEnd.AT_LIMIT
    assert int(states.last_warmup_test.tests_made[-1]) == 5  # at 5, 10, … 25, and none at the limit
    assert states.autowu_phase.tolist() == [AutowuPhase.WARMUP] * 30 + [AutowuPhase.DECAY] * 30


def test_no_warm_up_starts_at_the_top():
    _, states = run(schedule(max_warmup_fraction=0.0, max_learning_rate=0.5), FALLING)
    expected = 0.25 * (1 + np.cos(np.pi * np.arange(1, T + 1) / T))
    np.testing.assert_allclose(states.autowu_learning_rate, expected, rtol=1e-5, atol=1e-7)
    assert int(states.warmup_end[0]) == WarmupEnd.NO_WARMUP


@pytest.mark.parametrize("decay", ["cosine", "half_cosine"])
def test_held_with_a_factor_and_then_decayed(decay):
    link = schedule(decay=decay, cooldown_fraction=0.25, peak=Peak(hold_factor=0.5))
    _, states = run(link, FALLING)
    t, start = np.arange(30, T), 45.0
    held = rise(30)[-1] * 0.5 ** ((np.minimum(t, start) - 30) // 5)
    s = np.maximum((t + 1 - start) / (T - start), 0.0)
    shape = 0.5 * (1 + np.cos(np.pi * s))
    if decay == "half_cosine":
        shape = 0.5 + 0.5 * np.cos(0.5 * np.pi * (1 + s))
    expected = np.where(t < start, held, held * shape)
    np.testing.assert_allclose(states.autowu_learning_rate[30:], expected, rtol=1e-4, atol=1e-7)
    assert int(states.autowu_phase[44]) == AutowuPhase.HOLD
    assert int(states.autowu_phase[45]) == AutowuPhase.DECAY


def test_a_cooldown_ends_a_warm_up_that_still_runs():
    _, states = run(schedule(cooldown_fraction=0.75), FALLING)
    assert int(states.peak_position[-1]) == 15
    expected = rise(15)[-1] * 0.5 * (1 + np.cos(np.pi * (np.arange(15, T) - 14) / 45))
    np.testing.assert_allclose(states.autowu_learning_rate[15:], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
def test_past_the_minimum_it_goes_back_to_the_rate_there():
    """Slow: programs with both Gaussian processes."""
    for smoother in ("rbf", "quasisep"):
        _, states = run(schedule(smoother=smoother, patience=2), BOWL)
        assert int(states.warmup_end[-1]) == WarmupEnd.MINIMUM_PASSED
        assert 15 < int(states.peak_position[-1]) < 30
        assert rise(30)[11] < float(states.peak_learning_rate[-1]) < rise(30)[17]


def test_the_peak_may_lie_above_or_below_the_rate_at_the_minimum():
    """But not above the last rate tried."""

    def last(factor):
        link = schedule.__wrapped__(patience=2, peak=Peak(factor=factor))
        step = lambda s, v: (link.update({}, s, value=v)[1], None)
        return jax.lax.scan(step, link.init({}), jnp.float32(BOWL))[0]

    states = jax.jit(lambda x: jax.lax.map(last, x))(jnp.array([0.5, 1.0, 1.5, 100.0]))
    peaks = np.asarray(states.peak_learning_rate)
    end = int(states.peak_position[-1])
    np.testing.assert_allclose(peaks[0::2], np.array([0.5, 1.5]) * peaks[1], rtol=1e-5)
    np.testing.assert_allclose(peaks[3], rise(30)[end - 1], rtol=1e-5)


def test_the_peak_is_at_the_minimum_or_at_the_earliest_rate_as_good():
    seen = Draws(jnp.ones(1), location=jnp.full(1, 0.8), earliest=jnp.full(1, 0.5))
    known = rbf_smoother()._replace(test=lambda state, *_: (state, seen))
    for at, place in [("minimum", 0.8), ("earliest", 0.5)]:
        _, states = run(schedule(patience=1, smoother=known, peak=Peak(at=at)), BOWL)
        last = float(states.autowu_learning_rate[4])  # of the first five steps, then comes the test
        expected = 1e-5 * (last / 1e-5) ** place
        np.testing.assert_allclose(states.peak_learning_rate[-1], expected, rtol=1e-4)


def test_where_nothing_has_fallen_for_sure_the_lowest_point_is_the_best_guess():
    """Not the lowest rate: a curve that is as low at its start says nothing against the others."""
    seen = Draws(jnp.ones(1), location=jnp.full(1, 0.8), earliest=jnp.full(1, 0.01))
    known = rbf_smoother()._replace(test=lambda state, *_: (state, seen))
    _, states = run(schedule(patience=1, smoother=known, peak=Peak(at="earliest")), BOWL)
    last = float(states.autowu_learning_rate[4])
    np.testing.assert_allclose(
        states.peak_learning_rate[-1], 1e-5 * (last / 1e-5) ** 0.8, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("first", "step", "place"), [(0.4, 4, 0.4), (0.95, 9, 0.3)], ids=["first", "second"]
)
def test_a_confirmed_rate_is_the_lower_of_the_last_two_tests(first, step, place):
    def test(state, x, y, count, *_):
        earliest = jnp.where(count <= 5, first, 0.3)
        return state, Draws(jnp.ones(1), jnp.full(1, 0.9), earliest[None])

    known = rbf_smoother()._replace(test=test)
    _, states = run(schedule(patience=2, smoother=known, peak=Peak(at="confirmed")), BOWL)
    last = float(states.autowu_learning_rate[step])
    np.testing.assert_allclose(states.peak_learning_rate[-1], 1e-5 * (last / 1e-5) ** place, 1e-4)
    undecided = jax.tree.map(lambda x: x[4], states)
    assert adabatch.metrics(undecided)["peak_learning_rate"] == 0


@pytest.mark.slow
def test_noise_before_the_loss_has_begun_to_fall_is_no_minimum():
    """A plateau of 32 noisy losses, a fall, a rise: 24 runs, at most one of which may end early.

    Slow: 24 runs, each with five tests of a Gaussian process.
    """
    w = 70
    part = np.arange(w) / w
    fall = np.sin(0.5 * np.pi * np.clip((part - 0.45) / 0.35, 0, 1)) ** 2
    curve = 2.9 - 2.4 * fall + 40.0 * np.maximum(part - 0.8, 0.0) ** 2
    noise = np.random.default_rng(0).normal(size=(24, w)) * np.sqrt(curve / 2.9)
    link = adabatch.scale_by_improved_autowu(total_steps=5 * w)

    def end_of(losses):
        step = lambda s, v: (link.update({}, s, value=v)[1], None)
        return jax.lax.scan(step, link.init({}), losses)[0].peak_position

    ends = jax.jit(lambda x: jax.lax.map(end_of, x))(jnp.float32(curve + 0.3 * noise))
    assert (np.asarray(ends) < 0.6 * w).sum() <= 1


def test_the_preset_goes_as_far_beyond_as_suits_the_direction(monkeypatch):
    def peak_alone(**options):
        return optax.GradientTransformation(lambda params: options["peak"], lambda *given: given)

    def preset(**options):
        params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
        return adabatch.scale_by_improved_autowu(total_steps=100, **options).init(params)

    monkeypatch.setattr(_autowu_preset, "scale_by_autowu", peak_alone)
    decay = optax.add_decayed_weights(0.1, mask={"kernel": True, "bias": False})
    lamb = optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio())
    plain = Peak(at="confirmed", factor=4.0, at_limit="minimum", ramp_fraction=0.5)
    assert preset() == preset(direction=optax.scale_by_adam()) == plain
    assert preset(direction=optax.chain(optax.scale_by_adam(), decay)) == plain
    assert preset(direction=lamb) == replace(plain, factor=1.0)
    assert preset(direction=optax.scale_by_rss(0.0)) == replace(plain, at="earliest", factor=8.0)
    assert preset(direction=lamb, peak={"at": "minimum"}) == replace(
        plain, at="minimum", factor=1.0
    )
    assert preset(direction=lamb, peak=Peak()) == Peak()


@pytest.mark.parametrize("cooldown", [None, *slow(0.2)])
def test_after_the_warm_up_the_rate_may_rise_once_more(cooldown):
    common = dict(patience=2, cooldown_fraction=cooldown)
    _, plain = run(schedule(**common), BOWL)
    _, ramped = run(schedule(peak=Peak(ramp_fraction=0.5), **common), BOWL)
    end = int(plain.peak_position[-1])
    since = np.maximum(np.arange(T) - end, 0)
    factor = np.where(np.arange(T) < end, 1.0, np.minimum(1 / 3 + 2 / 3 * since / (0.5 * end), 1.0))
    expected = factor * plain.autowu_learning_rate
    np.testing.assert_allclose(ramped.autowu_learning_rate, expected, rtol=1e-5, atol=1e-9)


def test_at_the_limit_it_may_go_back_too():
    """With more patience than there are tests."""
    _, last = run(schedule(patience=9), BOWL)
    _, back = run(schedule(patience=9, peak=Peak(at_limit="minimum")), BOWL)
    assert int(last.warmup_end[-1]) == int(back.warmup_end[-1]) == WarmupEnd.AT_LIMIT
    np.testing.assert_allclose(last.peak_learning_rate[-1], rise(30)[-1], rtol=1e-4)
    assert rise(30)[11] < float(back.peak_learning_rate[-1]) < rise(30)[17]


@pytest.mark.parametrize(
    ("steps", "per_test", "fraction"), [(60, 7, 0.37), *slow((61, 5, 0.5), (53, 4, 1))]
)
def test_with_a_constant_batch_examples_and_steps_are_one_clock(steps, per_test, fraction):
    b, losses = 96, BOWL[:steps] if steps <= T else np.append(BOWL, 6.0)
    common = dict(max_warmup_fraction=fraction, cooldown_fraction=0.2, patience=2)
    common |= dict(smoother="as they are")
    by_steps = adabatch.scale_by_autowu(total_steps=steps, steps_per_test=per_test, **common)
    by_examples = adabatch.scale_by_autowu(
        total_examples=b * steps, examples_per_test=b * per_test, **common
    )
    got = rates(by_examples, losses, num_examples=np.full(steps, b, np.int32))
    np.testing.assert_allclose(got, rates(by_steps, losses), rtol=1e-5, atol=1e-9)


def test_a_growing_batch_moves_on_by_its_examples():
    link = adabatch.scale_by_autowu(
        total_examples=6000, examples_per_test=500, smoother="as they are"
    )
    sizes = np.array([100] * 10 + [400] * 5, np.int32)
    got = rates(link, FALLING[:15], num_examples=sizes)
    position = np.cumsum(sizes) - sizes
    np.testing.assert_allclose(got, 1e-5 * (1e5) ** (position / 3000), rtol=1e-4)


def test_examples_do_not_wrap():
    total = 2**36
    link = adabatch.scale_by_autowu(
        total_examples=total, examples_per_test=2**30, smoother="as they are"
    )
    got = rates(link, FALLING, num_examples=np.full(T, 2**30, np.int32))
    np.testing.assert_allclose(got[:32], 1e-5 * (1e5) ** (np.arange(32) / 32), rtol=1e-3)


def test_without_a_finite_loss_the_warm_up_ends_at_its_limit_and_says_so():
    for options in ({}, {"watch_divergence": True, "peak": Peak(at_limit="minimum")}):
        link = schedule(**options)
        _, states = run(link, np.full(T, np.nan))
        last = jax.tree.map(lambda x: x[-1], states)
        shown = adabatch.metrics(last)
        assert shown["warmup_end"] == WarmupEnd.NO_FINITE_LOSS
        assert shown["nonfinite_losses"] == T and shown["tests_made"] == 0
        assert int(states.peak_position[-1]) == 30
        np.testing.assert_allclose(states.peak_learning_rate[-1], rise(30)[-1], rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
def test_a_divergence_ends_the_warm_up_at_once(bad):
    losses = np.where(np.arange(T) < 18, 3.0 - 0.1 * np.arange(T), bad)
    _, states = run(schedule(watch_divergence=True, patience=9), losses)
    assert int(states.warmup_end[-1]) == WarmupEnd.DIVERGED
    assert int(states.peak_position[-1]) == 20  # at the second
    assert bool(states.minimum_found[-1])
    assert rise(30)[12] < float(states.peak_learning_rate[19]) < rise(30)[18]
    assert np.max(states.loss_history.losses[-1]) < 5.0  # higher would be taken for noise
    _, states = run(schedule(patience=9), losses)
    assert int(states.warmup_end[-1]) == WarmupEnd.AT_LIMIT and not bool(states.minimum_found[-1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9, 30.0])
@pytest.mark.parametrize("at", [3, 17, 40])
def test_one_bad_loss_is_left_out(at, bad):
    """During the warm-up and after it; among the first eight it cannot be seen, and does no harm."""
    link = schedule(watch_divergence=True, patience=9)
    losses = 3.0 - 2.0 * np.arange(T) / T + 0.05 * np.random.default_rng(0).normal(size=T)
    _, clean = run(link, losses)
    _, states = run(link, np.where(np.arange(T) == at, bad, losses))
    assert int(states.warmup_end[-1]) == int(clean.warmup_end[-1]) == WarmupEnd.AT_LIMIT
    assert int(states.setbacks[-1]) == 0
    shown = adabatch.metrics(jax.tree.map(lambda x: x[-1], states))
    assert shown["nonfinite_losses"] == (not np.isfinite(bad))
    assert shown["exploded_losses"] == (bool(np.isfinite(bad)) and at > 8)
    entries = 30 - (at < 30 and (at > 8 or not np.isfinite(bad)))
    assert int(states.loss_history.entries[-1]) == entries


def healthy(win, first, rng, steps=2000):
    """Losses that do not diverge; what is won and the noise of the first are in units of later noise."""
    deviation = np.r_[np.full(8, first), np.linspace(first, 1, 92), np.ones(steps - 100)]
    mean = 1 - win * (1 - np.exp(-np.maximum(np.arange(steps) - 50, 0) / 100))
    return mean + deviation * rng.normal(size=steps)


def test_noise_is_no_setback_and_an_explosion_is():
    """The first losses of a layer that starts at zero are all alike; those of short texts are noisy."""
    rng = np.random.default_rng(0)
    cases = [healthy(win, first, rng) for win in (0.3, 3.0, 10.0) for first in (0.0, 0.25, 1.0)]
    steps = np.arange(2000)
    fall = np.interp(steps, [0, 1000], [3.0, 1.0]) + 0.1 * rng.normal(size=2000)
    growths = (0.2, 3.0)  # doubling every five steps, and eightfold at every step
    cases += [fall + 2.0 ** np.clip(growth * (steps - 1000), -99, 20) for growth in growths]
    for units in (1.0, 1e-6, 1e6):

        def setbacks(losses):
            def step(level, given):
                position, loss = given
                level, _, _, diverged = follow(level, loss, position, position < 100)
                return level, diverged & (position >= 100)

            return jax.lax.scan(step, no_level(), (jnp.arange(2000.0), losses))[1].sum()

        found = jax.jit(jax.vmap(setbacks))(jnp.float32(units * np.array(cases)))
        assert found[:-2].tolist() == [0] * 9
        assert (found[-2:] > 0).all()


def test_a_setback_after_the_warm_up_halves_the_rate_and_there_is_a_limit():
    losses = np.where(np.arange(T) < 40, FALLING, 2.9)
    link = schedule(watch_divergence=True)
    _, states = run(link, losses)
    assert int(states.setbacks[-1]) == 1
    peaks = np.asarray(states.peak_learning_rate)
    np.testing.assert_allclose(peaks[-1], 0.5 * peaks[35])
    _, states = run(link, np.where(np.arange(T) < 34, FALLING, 3.0 * 2.0 ** (np.arange(T) - 34.0)))
    assert int(states.setbacks[-1]) == _autowu_step.MAX_SETBACKS
    peaks = np.asarray(states.peak_learning_rate)
    np.testing.assert_allclose(peaks[-1], 0.5**_autowu_step.MAX_SETBACKS * peaks[33])


@pytest.mark.slow
def test_the_seed_decides_the_draws():
    """Slow: three programs, each with a dense Gaussian process on 1,400 losses."""
    n, rng = 1400, np.random.default_rng(1)
    losses = 2.0 + np.cos(np.linspace(0, 3, n)) + 0.3 * rng.normal(size=n)
    options = dict(total_steps=2 * n, steps_per_test=n // 2 - 50)
    first, again, other = (
        run(adabatch.scale_by_autowu(smoother=rbf_smoother(seed=s), **options), losses)[1]
        for s in (3, 3, 4)
    )
    chex.assert_trees_all_equal(first, again)
    assert int(first.last_warmup_test.tests_made[-1]) == 2
    assert (
        first.last_warmup_test.minimum_probability != other.last_warmup_test.minimum_probability
    ).any()


def counted():
    """A smoother, and what counts the executions of its test."""
    calls, plain = [], as_they_are()

    def test(*args):
        jax.debug.callback(lambda: calls.append(1))
        return plain.test(*args)

    return plain._replace(test=test), calls


def test_the_test_runs_when_it_is_due_and_at_most_once_per_optimizer_step():
    smoother, calls = counted()
    optimizer = adabatch.adaptive_multi_steps(
        optax.chain(
            adabatch.adapt_batch_size(
                adabatch.norm_test(1.0), initial_batch_size=8, max_batch_size=8
            ),
            schedule(steps_per_test=2, smoother=smoother),
        ),
        micro_batch_size=2,
    )
    step = jax.jit(lambda s, g, v: optimizer.update(g, s, value=v)[1])
    state = optimizer.init(jnp.zeros(()))
    for loss in np.repeat(FALLING, 4):
        state = step(state, jnp.float32(RNG.normal()), jnp.float32(loss))
    jax.effects_barrier()
    inner = state.inner_opt_state[1]
    assert len(calls) == int(inner.last_warmup_test.tests_made) == 14  # of 60 steps in 240 calls
    assert int(inner.warmup_end) == WarmupEnd.AT_LIMIT


@pytest.mark.slow
def test_after_the_warm_up_a_program_without_the_test_goes_on_with_the_same_numbers():
    """Slow: two programs, one with a Gaussian process, and both again to compare their size."""
    options = dict(steps_per_test=2, watch_divergence=True)
    losses = np.concatenate([BOWL[:40], np.full(T - 40, 9.0)]).astype(np.float32)
    link, later = (
        schedule(smoother=quasisep_smoother(warmup_over=over), **options) for over in (False, True)
    )
    _, states = run(link, losses)
    assert int(states.warmup_end[30]) == WarmupEnd.MINIMUM_PASSED
    assert int(states.setbacks[-1]) > int(states.setbacks[30])
    after = jax.tree.map(lambda leaf: leaf[30], states)
    _, went_on = program(later)(after, {"value": jnp.asarray(losses[31:])})
    chex.assert_trees_all_close(went_on, jax.tree.map(lambda leaf: leaf[31:], states), rtol=1e-6)

    def size(link):
        return len(jax.jit(link.update).lower({}, after, value=0.0).as_text())

    assert size(later) < size(link) / 4


def test_a_factorisation_that_fails_is_a_no_and_is_counted():
    two_of_five = jnp.array([1.0, 1.0, jnp.nan, jnp.nan, jnp.nan])
    seen = Draws(two_of_five, two_of_five, two_of_five)
    failing = rbf_smoother()._replace(test=lambda state, *_: (state, seen))
    _, states = run(schedule(patience=1, smoother=failing), BOWL)
    assert int(states.warmup_end[-1]) == WarmupEnd.AT_LIMIT
    assert (
        int(states.last_warmup_test.failed_draws[-1])
        == 3 * int(states.last_warmup_test.tests_made[-1])
        == 15
    )


@pytest.mark.slow
def test_the_state_goes_on_after_a_trip_through_numpy():
    """Slow: a program with a Gaussian process, called step by step."""
    link = schedule(smoother="quasisep", watch_divergence=True)
    step = jax.jit(lambda s, v: link.update({}, s, value=v)[1])
    straight = stopped = link.init({})
    for loss in np.float32(BOWL):
        straight, stopped = step(straight, loss), step(stopped, loss)
        leaves, form = jax.tree.flatten(stopped)
        stopped = jax.tree.unflatten(form, [jnp.asarray(np.asarray(x)) for x in leaves])
    chex.assert_trees_all_equal(straight, stopped)


@pytest.mark.parametrize("smoother", ["as they are", *slow("quasisep")])
def test_nothing_that_is_reported_is_nan(smoother):
    """From the first step to the last, on the host, where `jax_debug_nans` looks at every number."""
    link = schedule(smoother=smoother, watch_divergence=True)
    step = jax.jit(lambda s, v: link.update({}, s, value=v)[1])
    state = link.init({})
    with jax.debug_nans(True):
        for loss in np.float32(BOWL):
            shown = adabatch.metrics(state := step(state, loss))
            assert all(np.isfinite(v) for v in shown.values())
    assert (
        int(state.last_warmup_test.tests_made) > 0
        and int(shown["warmup_end"]) == WarmupEnd.AT_LIMIT
    )


def test_a_loss_is_one_number():
    link = schedule()
    with pytest.raises(ValueError, match=r"value= must be one loss, a scalar, got shape \(4,\)"):
        link.update({}, link.init({}), value=jnp.ones(4))


def test_narrow_losses_are_followed_in_float32():
    link = schedule(watch_divergence=True)
    for dtype in (jnp.bfloat16, jnp.float16):
        state = link.update({}, link.init({}), value=jnp.asarray(2.3, dtype))[1]
        floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}


def test_a_run_can_be_differentiated_through():
    """Its decisions are steps, so that what it does to a parameter is to multiply it."""
    link = schedule(total_steps=20, steps_per_test=4, max_learning_rate=0.5)

    def end(start):
        def step(carry, _):
            at, state = carry
            update, state = link.update(2.0 * at, state, value=1.0 + at**2)
            return (at + update, state), None

        return jax.lax.scan(step, (start, link.init(start)), length=12)[0][0]

    value, slope = jax.jit(jax.value_and_grad(end))(jnp.float32(3.0))
    assert 0 < value < 2
    np.testing.assert_allclose(slope, value / 3.0, rtol=1e-6)


@pytest.mark.parametrize("smoother", ["rbf", "quasisep"])
def test_its_adam_does_not_hide_the_user_s(smoother):
    optimizer = adabatch.return_to_minimum(
        optax.chain(optax.scale_by_adam(), schedule(smoother=smoother))
    )
    state = optimizer.init({"w": jnp.ones(2)}).inner_returning_state
    assert int(optax.tree.get(state, "count")) == 0
    assert set(optax.tree.get(state, "mu")) == {"w"}


STEPS = {"total_steps": 100, "steps_per_test": 10}
EXAMPLES = {"total_examples": 100, "examples_per_test": 10}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got neither"),
        (STEPS | EXAMPLES, "give total_steps and steps_per_test, or total_examples"),
        ({"total_steps": 100, "examples_per_test": 10}, "'examples_per_test': 10"),
        (STEPS | {"total_steps": 0}, "total_steps must be a positive integer, got 0"),
        (STEPS | {"steps_per_test": 2.5}, "steps_per_test must be a positive integer, got 2.5"),
        (STEPS | {"total_steps": 20}, "total_steps=20 .* too short for one test"),
        (EXAMPLES | {"total_examples": 20}, "total_examples=20 .* too short for one test"),
        (
            STEPS | {"total_steps": 18, "steps_per_test": 2},
            "warm-up of 9 steps too short .*10 needed",
        ),
        (
            EXAMPLES | {"total_examples": 300, "initial_batch_size": 16},
            "150 examples, 9 steps of 16",
        ),
        (STEPS | {"min_learning_rate": 1.0}, "min_learning_rate=1.0 must be below"),
        (STEPS | {"min_learning_rate": 0.0}, "min_learning_rate must be a positive number, got 0"),
        (STEPS | {"max_warmup_fraction": 1.5}, "max_warmup_fraction must lie in .*, got 1.5"),
        (STEPS | {"cooldown_fraction": -0.1}, "cooldown_fraction must lie in .*, got -0.1"),
        (STEPS | {"peak": {"hold_factor": 0.0}}, "hold_factor must be a positive number, got 0.0"),
        (STEPS | {"peak": {"hold_factor": 1.1}}, "Peak: hold_factor must lie in .*, got 1.1"),
        (STEPS | {"peak": {"factor": 0.0}}, "Peak: factor must be a positive number, got 0.0"),
        (STEPS | {"peak": {"ramp_fraction": -0.5}}, "ramp_fraction must lie in .*, got -0.5"),
        (STEPS | {"confidence": 1.0}, "confidence must lie in .*, got 1.0"),
        (STEPS | {"patience": 0}, "patience must be a positive integer, got 0"),
        (STEPS | {"max_losses": 8}, "max_losses must be at least 16, got 8"),
        (STEPS | {"warmup": "cubic"}, "warmup must be one of .*, got 'cubic'"),
        (STEPS | {"warmup_unit": "day"}, "warmup_unit must be one of .*, got 'day'"),
        (STEPS | {"decay": "linear"}, "decay must be one of .*, got 'linear'"),
        (STEPS | {"smoother": "mean"}, "smoother must be one of .*, got 'mean'"),
        (STEPS | {"smoother": rbf_smoother}, "smoother must be one of rbf, quasisep.*, got <func"),
        (STEPS | {"peak": {"at": "end"}}, "Peak: at must be one of .*, got 'end'"),
        (STEPS | {"peak": {"at_limit": "stop"}}, "at_limit must be one of .*, got 'stop'"),
        (STEPS | {"peak": {"place": 1}}, "scale_by_autowu: peak must be .*factor, .*{'place': 1}"),
        (STEPS | {"peak": 4.0}, "scale_by_autowu: peak must be a Peak, .*got 4.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        adabatch.scale_by_autowu(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "total_steps or total_examples, got None and None"),
        ({"total_steps": 10, "total_examples": 10}, "got 10 and 10"),
        ({"total_steps": -1}, "total_steps must be a positive integer, got -1"),
        ({"total_steps": 100, "num_tests": 0}, "num_tests must be a positive integer, got 0"),
        ({"total_steps": 4}, "too short for one test"),
        ({"total_steps": 49}, "warm-up of 9 steps too short"),
    ],
)
def test_bad_options_of_the_preset_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        adabatch.scale_by_improved_autowu(**options)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (optax.adam(1e-3), "without sign and learning rate"),
        (optax.masked(optax.identity(), {}), "give peak={'factor': …} instead"),
    ],
)
def test_a_bad_direction_of_the_preset_is_named_by_init(direction, message):
    link = adabatch.scale_by_improved_autowu(total_steps=100, direction=direction)
    with pytest.raises(ValueError, match=message):
        link.init({"w": jnp.ones(2)})


def test_what_update_needs_is_said():
    link = schedule()
    with pytest.raises(ValueError, match="value=loss"):
        link.update({}, link.init({}))
    link = adabatch.scale_by_autowu(**(EXAMPLES | {"total_examples": 1000}))
    with pytest.raises(ValueError, match="num_examples="):
        link.update({}, link.init({}), value=1.0)
