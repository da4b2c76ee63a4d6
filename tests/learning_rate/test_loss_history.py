"""The loss buffer that thins itself: against NumPy, and where the losses lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax.learning_rate._loss_history import empty_history, record


def fill(capacity, losses, positions, keep):
    def step(history, given):
        return record(history, *given), None

    given = jnp.float32(losses), jnp.float32(positions), jnp.asarray(keep)
    return jax.jit(lambda h, g: jax.lax.scan(step, h, g)[0])(empty_history(capacity), given)


@pytest.mark.parametrize("number", [0, 1, 15, 16, 17, 31, 32, 33, 100, 1000])
def test_entries_are_means_of_equally_many_neighbours(number):
    rng = np.random.default_rng(number)
    losses, positions = rng.normal(size=2 * number), np.cumsum(rng.integers(1, 9, 2 * number))
    keep = rng.random(2 * number) < 0.5
    history = fill(16, losses, positions, keep)
    kept, where = losses[keep], positions[keep]
    stride = int(history.stride)
    count = int(history.entries)
    assert stride == 2 ** max(0, int(np.ceil(np.log2((len(kept) + 1) / 16)))) or len(kept) < 16
    assert count == -(-len(kept) // stride) and count <= 16
    assert int(history.complete) == len(kept) // stride
    for values, found in ((kept, history.losses), (where, history.positions)):
        expected = [values[i : i + stride].mean() for i in range(0, len(values), stride)]
        np.testing.assert_allclose(found[:count], expected, rtol=1e-4, atol=1e-6)


def test_what_is_left_out_leaves_no_trace():
    plain = fill(16, np.arange(10.0), np.arange(10.0), np.ones(10, bool))
    holes = np.array([True, False] * 10)
    spoiled = np.where(holes, np.repeat(np.arange(10.0), 2), np.nan)
    with_holes = fill(16, spoiled, np.repeat(np.arange(10.0), 2), holes)
    jax.tree.map(np.testing.assert_array_equal, plain, with_holes)


def test_an_odd_capacity_is_made_even():
    assert empty_history(17).losses.shape == (18,)
