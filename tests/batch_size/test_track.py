"""`track_noise_scale`: the noise scale in a loop that is not changed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import (
    BatchSizeStatus,
    get_batch_size,
    metrics,
    norm_test,
    track_noise_scale,
)

BATCH, DIMENSION, NOISE_SCALE = 64, 500, 400.0


def run(optimizer, calls, *, noise_scale=NOISE_SCALE, broken=None):
    """Gradients of a loss with this noise scale, in batches of `BATCH`: the numbers after every call."""
    params = jnp.zeros(DIMENSION)

    def step(state, given):
        key, bad = given
        spread = (noise_scale / BATCH) ** 0.5  # of a batch; every entry of ∇F is 1
        gradient = 1.0 + spread * jax.random.normal(key, (DIMENSION,))
        gradient = jnp.where(bad, jnp.nan, gradient)
        updates, state = optimizer.update(gradient, state, params)
        return state, (updates, gradient, metrics(state))

    keys = jax.random.split(jax.random.key(0), calls)
    bad = jnp.arange(calls) == (-1 if broken is None else broken)
    first = optimizer.init(params)
    state, seen = jax.jit(lambda: jax.lax.scan(step, first, (keys, bad)))()
    return state, seen


def test_the_noise_scale_of_successive_gradients():
    _, (updates, gradients, shown) = run(track_noise_scale(batch_size=BATCH, interval=1), 400)
    np.testing.assert_array_equal(updates, gradients)
    # Averages of ten and more pairs, each of 500 coordinates: 3 % of standard error, of which many.
    late = np.asarray(shown["noise_scale"])[50:]
    assert abs(late.mean() / NOISE_SCALE - 1) < 0.05
    assert late.std() / NOISE_SCALE < 0.2


def test_it_asks_for_what_the_criterion_asks_for_on_average():
    link = track_noise_scale(norm_test(2.0), batch_size=BATCH, interval=1, ema_decay=0.99)
    state, _ = run(link, 400)
    required = float(metrics(state)["required_batch_size"])
    assert abs(required / (NOISE_SCALE / 4) - 1) < 0.1
    with pytest.raises(ValueError, match="no batch-size controller"):
        get_batch_size(state)


def test_one_call_in_so_many_measures():
    link = track_noise_scale(batch_size=BATCH, interval=5)
    _, (_, _, shown) = run(link, 17)
    seen = np.asarray(shown["noise_scale"])
    changes = np.flatnonzero(np.diff(np.concatenate([[0], seen]))) + 1
    np.testing.assert_array_equal(changes, [6, 11, 16])  # calls, from 1: a pair needs one before


@pytest.mark.parametrize(("eta", "status"), [(1.0, "CHANGED"), (4.0, "PASSED")])
def test_the_status_tells_whether_the_batch_is_large_enough(eta, status):
    state, _ = run(track_noise_scale(norm_test(eta), batch_size=BATCH, interval=1), 100)
    assert metrics(state)["test_status"].name == status


def test_a_bad_gradient_is_left_out():
    link = track_noise_scale(batch_size=BATCH, interval=1)
    state, (_, _, shown) = run(link, 40, broken=20)
    status = np.asarray(shown["test_status"])
    assert set(np.flatnonzero(status == BatchSizeStatus.NOT_FINITE)) == {20, 21}
    assert np.isfinite(shown["noise_scale"]).all()
    assert metrics(state)["test_status"] is BatchSizeStatus.CHANGED


def test_around_multi_steps_it_sees_the_micro_batches():
    inner = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4)
    state, _ = run(optax.chain(track_noise_scale(batch_size=BATCH, interval=1), inner), 100)
    assert abs(metrics(state)["noise_scale"] / NOISE_SCALE - 1) < 0.3


def test_noise_that_is_passed_takes_the_place_of_a_pair(make_noise):
    link = track_noise_scale(batch_size=None, interval=2)
    noise = make_noise(trace=100, square=4)
    state = link.init(noise.mean)
    assert state.previous_gradient == ()
    seen = []
    for _ in range(4):
        _, state = link.update(noise.mean, state, noise=noise)
        seen.append(float(metrics(state)["noise_scale"]))
    np.testing.assert_allclose(seen, [0, *[100 / (4 - 100 / 64)] * 3], rtol=1e-5)
    with pytest.raises(ValueError, match="batch_size=None: every call must pass noise="):
        link.update(noise.mean, state)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got 0"):
        track_noise_scale(batch_size=0)
    with pytest.raises(ValueError, match="interval must be a positive integer, got 0"):
        track_noise_scale(batch_size=8, interval=0)
    with pytest.raises(ValueError, match=r"ema_decay must lie in \[0.0, 1.0\), got 1"):
        track_noise_scale(batch_size=8, ema_decay=1.0)
