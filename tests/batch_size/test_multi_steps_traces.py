"""A run from 64 to 8192 examples through eight sizes: nothing is compiled twice."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import (
    adapt_batch_size,
    adaptive_multi_steps,
    get_batch_size,
    has_updated,
    norm_test,
    value_and_grad_noise,
)

MICRO, LARGEST = 32, 8192
SIZES = [64, 128, 256, 512, 1024, 2048, 4096, 8192]


@pytest.fixture(scope="module")
def optimizer():
    """Doubles at every test: the examples have no mean, so that all of the gradient is noise."""
    controller = adapt_batch_size(
        norm_test(0.1), initial_batch_size=64, max_batch_size=LARGEST, growth_limit=2.0
    )
    return optax.chain(controller, optax.sgd(1e-3))


@pytest.fixture(scope="module")
def micro_batches():
    x = np.random.default_rng(0).normal(size=(LARGEST // MICRO, MICRO, 3))
    return x.astype(np.float32)


def loss(w, x):
    return 0.5 * jnp.mean(jnp.sum((w[None] - x) ** 2, axis=-1))


def test_the_drop_in_step_is_traced_once(optimizer, micro_batches):
    optimizer = adaptive_multi_steps(optimizer, micro_batch_size=MICRO)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, x):
        value, gradient = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(gradient, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = jnp.zeros(3)
    state, taken, calls = optimizer.init(params), [], 0
    for k in range(sum(SIZES) // MICRO):
        size = int(get_batch_size(state))
        params, state = step(params, state, micro_batches[k % len(micro_batches)])
        calls += MICRO
        if has_updated(state):
            taken.append((size, calls))
            calls = 0
    assert taken == [(size, size) for size in SIZES]  # each batch used just its examples


def test_the_fused_step_is_traced_once_and_computes_just_its_groups(optimizer, micro_batches):
    executed = []

    def counted(w, x):
        jax.debug.callback(lambda _: executed.append(1), x[0, 0])
        return loss(w, x)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, groups):
        count = get_batch_size(state) // MICRO
        _, noise = value_and_grad_noise(counted)(params, groups, count=count)
        updates, state = optimizer.update(noise.mean, state, params, noise=noise)
        return optax.apply_updates(params, updates), state

    params = jnp.zeros(3)
    state, taken = optimizer.init(params), []
    for _ in SIZES:
        executed.clear()
        taken.append(int(get_batch_size(state)))
        params, state = jax.block_until_ready(step(params, state, micro_batches))
        jax.effects_barrier()
        assert len(executed) == taken[-1] // MICRO
    assert taken == SIZES
