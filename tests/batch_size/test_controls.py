"""Controls: what the controller must do where the right answer is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import (
    GradientNoise,
    adapt_batch_size,
    adaptive_multi_steps,
    get_batch_size,
    metrics,
    norm_test,
    split_groups,
    value_and_grad_noise,
)
from tests.marks import slow

NOISE_SCALE, DIMENSION, GROUPS, STEPS, SEEDS = 400.0, 100, 8, 400, 20


def loss(params, group):
    x, y = group
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


PARAMS = {"w": jnp.linspace(-0.7, 1.1, 12).reshape(4, 3), "v": jnp.array([1.0, -0.5, 0.3])}


def examples(repeated):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 4)).astype(np.float32), rng.normal(size=64).astype(np.float32)
    return (np.tile(x[:1], (64, 1)), np.tile(y[:1], 64)) if repeated else (x, y)


def make_optimizer(options):
    controller = adapt_batch_size(
        norm_test(0.1), initial_batch_size=64, max_batch_size=8192, **options
    )
    return optax.chain(controller, optax.sgd(0.05))


def fused(options):
    """A run of 50 steps on the same 64 examples: → final state, batch sizes."""
    optimizer, measure = make_optimizer(options), value_and_grad_noise(loss)

    def step(carry, batch):
        params, state = carry
        _, noise = measure(params, split_groups(batch, 8))
        updates, state = optimizer.update(noise.mean, state, params, noise=noise)
        return (optax.apply_updates(params, updates), state), get_batch_size(state)

    def run(batch):
        start = PARAMS, optimizer.init(PARAMS)
        (_, state), sizes = jax.lax.scan(lambda c, _: step(c, batch), start, length=50)
        return state, sizes

    return run


def drop_in(options):
    """The same in an unchanged loop over micro-batches of eight."""
    optimizer = adaptive_multi_steps(make_optimizer(options), micro_batch_size=8)

    def step(carry, micro_batch):
        params, state = carry
        gradient = jax.grad(loss)(params, micro_batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), get_batch_size(state)

    def run(batch):
        start = PARAMS, optimizer.init(PARAMS)
        batches = jax.tree.map(lambda x: jnp.concatenate([x] * 50), batch)
        (_, state), sizes = jax.lax.scan(step, start, split_groups(batches, 8 * 50))
        return state, sizes

    return run


@pytest.mark.parametrize("make_run", [fused, drop_in])
@pytest.mark.parametrize("options", [{}, *slow({"debias": True, "ema_decay": 0.9})], ids=str)
def test_one_example_repeated_never_grows_the_batch(make_run, options):
    run = jax.jit(make_run(options))
    state, sizes = run(examples(repeated=True))
    assert np.all(np.asarray(sizes) == 64)
    assert metrics(state)["num_examples"] == 50 * 64  # every step was taken …
    assert int(metrics(state)["skipped_tests"]) == 0  # … and tested
    _, sizes = run(examples(repeated=False))
    assert sizes[-1] > 64  # different examples do grow it


@functools.cache
def batch_sizes(eta, monotone):
    """[seeds, steps]: batch sizes at fixed parameters, ‖∇F‖² = 1 and tr Σ = N."""
    controller = adapt_batch_size(
        norm_test(eta),
        initial_batch_size=64,
        max_batch_size=2**20,
        ema_decay=0.9,
        debias=True,
        monotone=monotone,
    )
    gradient = jnp.full(DIMENSION, DIMENSION**-0.5)
    deviation = np.sqrt(NOISE_SCALE / DIMENSION)

    def step(state, key):
        size = get_batch_size(state)
        per_group = size / GROUPS
        noise = jax.random.normal(key, (GROUPS, DIMENSION)) * deviation / jnp.sqrt(per_group)
        means = gradient[None] + noise
        mean = means.mean(0)
        scatter = per_group * jnp.sum((means - mean[None]) ** 2)
        noise = GradientNoise(mean, scatter, size, jnp.int32(GROUPS))
        _, state = controller.update(mean, state, noise=noise)
        return state, size

    def run(key):
        return jax.lax.scan(step, controller.init(gradient), jax.random.split(key, STEPS))[1]

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), SEEDS)))


@pytest.mark.parametrize("eta", [1.0, *slow(0.5)])
def test_at_fixed_parameters_the_batch_settles_at_the_noise_scale(eta):
    settled = batch_sizes(eta, monotone=False)[:, STEPS // 2 :].mean(1)
    np.testing.assert_allclose(settled, NOISE_SCALE / eta**2, rtol=0.2)  # each of the seeds


@pytest.mark.parametrize("eta", slow(0.5, 1.0))
def test_the_monotone_form_overshoots(eta, record_property):
    target = NOISE_SCALE / eta**2
    settled = {m: batch_sizes(eta, monotone=m)[:, STEPS // 2 :].mean(1) for m in (False, True)}
    overshoot = settled[True] / target
    report = f"median {np.median(overshoot):.2f}, largest {overshoot.max():.2f}"
    record_property(f"monotone batch over N/η² at η={eta}", report)
    print(f"\nη = {eta}: the monotone batch settles at this multiple of N/η²: {report}")
    assert np.all(settled[True] >= settled[False])
