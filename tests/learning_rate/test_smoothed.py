"""`smoothed_losses`: what AutoWU saw, read from any state of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adabatch_jax as adabatch
from tests.marks import slow

T = 60
BOWL = np.float32(np.where(np.arange(T) < 14, 3.0 - 0.15 * np.arange(T), 0.1 * np.arange(T) - 0.5))


def state_after(link, losses, **extra_args):
    def step(state, given):
        return link.update({}, state, **given)[1], None

    given = {"value": losses} | extra_args
    return jax.jit(lambda s, x: jax.lax.scan(step, s, x)[0])(link.init({}), given)


@pytest.fixture(scope="module", params=["rbf", *slow("quasisep")])
def state(request):
    link = adabatch.scale_by_autowu(
        total_steps=T, steps_per_test=4, patience=2, smoother=request.param
    )
    return state_after(link, BOWL)


def test_it_shows_the_warm_up_and_its_minimum(state):
    seen = adabatch.learning_rate.smoothed_losses(state)
    assert seen.by_steps
    assert 14 < seen.end < 30
    np.testing.assert_array_equal(seen.positions, np.arange(int(seen.end)))
    np.testing.assert_array_equal(seen.losses, BOWL[: int(seen.end)])
    np.testing.assert_allclose(seen.minimum, 14, atol=1.5)
    assert seen.grid[0] == 0 and abs(seen.grid[-1] - seen.end) <= 1
    assert (seen.deviation > 0).all()
    near = np.interp(seen.positions, seen.grid, seen.mean)
    assert np.abs(near - seen.losses).max() < 0.3


def test_it_agrees_with_the_last_test(state):
    seen = adabatch.learning_rate.smoothed_losses(state)
    location = float(adabatch.metrics(state)["minimum_location"])
    np.testing.assert_allclose(seen.minimum / seen.grid[-1], location, atol=1.5 / 499)


def test_wrapped_and_stacked_states_read_like_one(state):
    plain = adabatch.learning_rate.smoothed_losses(state)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 4), state)
    wrapped = jax.tree.map(nnx.Variable, state)
    for other in (stacked, wrapped, (optax.EmptyState(), state), {"x": state}):
        found = adabatch.learning_rate.smoothed_losses(other)
        jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_before_the_first_test_there_is_no_curve():
    link = adabatch.scale_by_autowu(total_steps=T, steps_per_test=10, smoother="as they are")
    seen = adabatch.learning_rate.smoothed_losses(state_after(link, BOWL[:3]))
    assert len(seen.losses) == 3 and seen.grid.size == 0
    assert np.isnan(seen.minimum) and np.isnan(seen.end)
    assert adabatch.learning_rate.smoothed_losses(link.init({})).losses.size == 0


@pytest.mark.slow
def test_with_more_losses_than_the_dense_smoother_takes():
    """Slow: a dense Gaussian process on many losses."""
    n = 1500
    losses = np.float32(2.0 + np.cos(np.linspace(0, 5, n)))
    link = adabatch.scale_by_autowu(total_steps=2 * n, steps_per_test=n - 10)
    seen = adabatch.learning_rate.smoothed_losses(state_after(link, losses))
    assert len(seen.losses) == n
    np.testing.assert_allclose(seen.minimum, n * np.pi / 5, atol=0.02 * n)


def test_positions_are_examples_with_the_examples_clock():
    link = adabatch.scale_by_autowu(
        total_examples=640, examples_per_test=64, patience=2, smoother="as they are"
    )
    state = state_after(link, BOWL[:20], num_examples=np.full(20, 16, np.int32))
    seen = adabatch.learning_rate.smoothed_losses(state)
    assert not seen.by_steps
    np.testing.assert_array_equal(seen.positions, 16 * np.arange(len(seen.positions)))


def test_it_needs_one_schedule():
    with pytest.raises(ValueError, match=r"smoothed_losses: .* one scale_by_autowu, found 0"):
        adabatch.learning_rate.smoothed_losses(optax.adam(0.1).init({}))
