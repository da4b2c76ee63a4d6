"""A peak that the loss would allow, bounded by the length of the first steps against the parameters."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax import WarmupEnd
from adabatch_jax.learning_rate import Peak, rbf_smoother
from adabatch_jax.learning_rate._step_length import StepLength, measure, no_length
from tests.learning_rate.losses import BOWL, FALLING, T
from tests.marks import slow

PARAMS = {"w": jnp.full((4, 4), 0.5), "b": jnp.full((16,), 100.0)}  # ‖w‖ = 2


@functools.cache
def program():
    """Of every bound: it is an argument, and so the Gaussian process is compiled once."""

    def states(bound, losses, lengths, params):
        options = dict(total_steps=T, steps_per_test=5, patience=2)
        link = adabatch.scale_by_autowu(**options, peak=Peak(max_relative_step=bound))

        def step(state, given):
            loss, length = given
            entries = {"w": length / 4.0, "b": jnp.float32(1000.0)}
            updates = jax.tree.map(lambda p, e: jnp.full(p.shape, e, p.dtype), params, entries)
            return (state := link.update(updates, state, params, value=loss)[1]), state

        return jax.lax.scan(step, link.init(params), (losses, lengths))[1]

    return jax.jit(states)


def run(bound, losses=BOWL, lengths=8.0, params=PARAMS):
    """The states after every step; `lengths` are those of the update of w, all entries alike."""
    lengths = jnp.broadcast_to(jnp.float32(lengths), (T,))
    return program()(bound, jnp.float32(losses), lengths, params)


def peak(bound, **given):
    return float(run(bound, **given).peak_learning_rate[-1])


def test_the_peak_is_at_most_where_a_first_step_is_that_long():
    """With ‖d‖/‖w‖ = 8/2 the bound is a quarter of max_relative_step; vectors do not count."""
    free = peak(1e6)
    assert free > 0.001
    assert peak(4.01 * free) == free
    assert peak(2.0 * free) == pytest.approx(0.5 * free)
    assert peak(0.002) == pytest.approx(0.0005)


def test_it_is_measured_in_float32():
    narrow = {"w": PARAMS["w"].astype(jnp.bfloat16), "b": PARAMS["b"]}
    length = measure(no_length(), narrow, narrow, 0.1, jnp.array(True))
    assert length.highest_rate.dtype == jnp.float32
    assert float(length.highest_rate) == pytest.approx(0.1)


def test_the_longest_of_the_first_steps_counts_and_no_later_one():
    lengths = np.full(T, 8.0)
    lengths[3], lengths[9], lengths[10:12] = 16.0, 4.0, (np.nan, np.inf)
    lengths[24:] = 1e6
    states = run(0.002, FALLING, lengths)
    assert float(states.peak_learning_rate[-1]) == pytest.approx(0.00025)


def test_a_warm_up_at_its_limit_is_bounded_too():
    states = run(0.002, FALLING)
    assert int(states.warmup_end[-1]) == WarmupEnd.AT_LIMIT
    assert float(states.peak_learning_rate[-1]) == pytest.approx(0.0005)


@pytest.mark.parametrize(
    "params",
    [PARAMS | {"w": jnp.zeros((4, 4))}, *slow(PARAMS | {"w": jnp.ones(16)})],
    ids=["zero", "vectors"],
)
def test_without_a_length_there_is_no_bound(params):
    assert peak(0.002, params=params) == peak(1e6)


def test_no_update_does_not_count():
    assert peak(0.002, lengths=0.0) == peak(1e6)


def test_parameters_that_grow_from_zero_are_no_measure():
    """After a step they are as long as that step, which would forbid every rate but its own."""
    ones, length = {"w": jnp.ones((2, 2))}, no_length()
    for params in ({"w": jnp.zeros((2, 2))}, {"w": jnp.full((2, 2), 1e-5)}):
        length = measure(length, ones, params, 0.1, jnp.array(True))
    assert float(length.highest_rate) == np.inf


def test_parameters_that_begin_small_count_as_half_as_long_as_is_usual():
    """Else their own smallness would forbid them to grow: √8 / 2 for eight outputs, on either axis."""
    for shape in ((8, 64), (64, 8)):
        params, ones = {"w": jnp.full(shape, 1e-3)}, {"w": jnp.ones(shape)}
        length = measure(no_length(), ones, params, 0.1, jnp.array(True))
        expected = 0.1 * 0.5 * np.sqrt(8) / np.sqrt(512)
        np.testing.assert_allclose(length.highest_rate, expected, rtol=1e-5)


def test_a_program_for_after_the_warm_up_leaves_the_length_alone():
    options = dict(total_steps=T, steps_per_test=5, max_warmup_fraction=0.2)
    bound = Peak(max_relative_step=0.002)
    params = {"w": PARAMS["w"]}
    link, later = (
        adabatch.scale_by_autowu(smoother=rbf_smoother(warmup_over=over), peak=bound, **options)
        for over in (False, True)
    )
    update = jax.jit(link.update)
    state = link.init(params)
    for loss in FALLING[:13]:
        _, state = update(params, state, params, value=jnp.float32(loss))
    assert (
        int(state.warmup_end) != WarmupEnd.RUNNING and int(state.step_length.directions_seen) == 12
    )
    after = [
        jax.jit(x.update)(params, state, params, value=jnp.float32(1.0))[1] for x in (link, later)
    ]
    for one, other in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="max_relative_step must be a positive number, got 0"):
        Peak(max_relative_step=0)
    bound = Peak(max_relative_step=0.1)
    link = adabatch.scale_by_autowu(total_steps=T, steps_per_test=5, peak=bound)
    with pytest.raises(ValueError, match=r"max_relative_step compares steps with parameters"):
        link.update(PARAMS, link.init(PARAMS), value=jnp.float32(1.0))


@pytest.mark.parametrize(
    ("direction", "bounds"),
    [(optax.scale_by_adam(), True), (optax.trace(0.9), True), (optax.scale_by_rss(0.0), False)],
    ids=["adam", "momentum", "adagrad"],
)
def test_the_recipe_bounds_what_does_not_shrink_by_itself(direction, bounds):
    """AdaGrad's first step says nothing of the later ones."""
    sizes = dict(total_examples=10_000, initial_batch_size=16, max_batch_size=64)
    state = adabatch.automatic(direction, **sizes).init(PARAMS)
    schedule = state.inner_returning_state.inner_schedule
    assert isinstance(schedule.step_length, StepLength) == bounds
    unbounded = adabatch.automatic(
        direction, **sizes, autowu_options={"peak": {"max_relative_step": None}}
    ).init(PARAMS)
    assert unbounded.inner_returning_state.inner_schedule.step_length == ()
