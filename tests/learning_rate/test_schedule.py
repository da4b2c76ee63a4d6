"""`scale_by_example_schedule`: Optax's schedules, over examples instead of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import scale_by_example_schedule

SCHEDULES = {
    "cosine": optax.cosine_decay_schedule(0.3, decay_steps=5000),
    "warmup": optax.warmup_cosine_decay_schedule(0.0, 0.5, 1000, 5000, 0.01),
    "constant": optax.constant_schedule(0.2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_the_schedule_at_the_examples_used_before_the_step(noise_of_batch, name):
    link = scale_by_example_schedule(SCHEDULES[name])
    update, state = jax.jit(link.update), link.init(jnp.ones(2))
    batches = [64, 64, 128, 500, 1000, 2000, 4000]
    before = np.concatenate([[0], np.cumsum(batches)])
    for batch, examples in zip(batches, before[:-1], strict=True):
        updates, state = update(jnp.ones(2), state, noise=noise_of_batch(batch))
        expected = float(SCHEDULES[name](float(examples)))
        np.testing.assert_allclose(updates, [-expected] * 2, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(state.scheduled_learning_rate, expected, rtol=1e-5, atol=1e-7)


def test_examples_may_be_given_by_hand(noise_of_batch):
    link = scale_by_example_schedule(optax.linear_schedule(1.0, 0.0, 1000))
    state = link.init(jnp.ones(1))
    _, state = link.update(jnp.ones(1), state, num_examples=250, noise=noise_of_batch(999))
    updates, _ = link.update(jnp.ones(1), state, num_examples=250)
    assert updates.tolist() == [-0.75]


def test_a_number_is_a_constant_rate(noise_of_batch):
    link = scale_by_example_schedule(0.25)
    updates, _ = link.update(jnp.ones(1), link.init(jnp.ones(1)), noise=noise_of_batch(8))
    assert updates.tolist() == [-0.25]


def test_the_sign_may_stay(noise_of_batch):
    link = scale_by_example_schedule(0.25, flip_sign=False)
    updates, _ = link.update(jnp.ones(1), link.init(jnp.ones(1)), noise=noise_of_batch(8))
    assert updates.tolist() == [0.25]


def test_the_clock_runs_on_beyond_32_bits(noise_of_batch):
    link = scale_by_example_schedule(lambda examples: examples)
    state = link.init(jnp.ones(1))._replace(schedule_clock=jnp.array([0, 2**32 - 10], jnp.uint32))
    _, state = link.update(jnp.ones(1), state, noise=noise_of_batch(64))
    assert state.schedule_clock.tolist() == [1, 54]
    updates, _ = link.update(jnp.ones(1), state, noise=noise_of_batch(64))
    np.testing.assert_allclose(updates, [-(2.0**32 + 54)], rtol=1e-7)


def test_updates_keep_their_dtype(noise_of_batch):
    link = scale_by_example_schedule(0.5)
    updates = jnp.ones(2, jnp.bfloat16)
    updates, _ = link.update(updates, link.init(updates), noise=noise_of_batch(8))
    assert updates.dtype == jnp.bfloat16
    assert updates.tolist() == [-0.5, -0.5]


def test_a_rate_may_be_injected(noise_of_batch):
    link = optax.inject_hyperparams(scale_by_example_schedule)(0.5)
    state = link.init(jnp.ones(1))
    state.hyperparams["schedule"] = jnp.float32(0.125)
    updates, _ = link.update(jnp.ones(1), state, noise=noise_of_batch(8))
    assert updates.tolist() == [-0.125]


def test_missing_examples_say_how_to_pass_them():
    link = scale_by_example_schedule(0.1)
    with pytest.raises(ValueError, match=r"scale_by_example_schedule .*noise=noise.*num_examples="):
        jax.eval_shape(link.update, jnp.ones(1), link.init(jnp.ones(1)))
