"""Adam that follows the batch size: its definition in NumPy, Optax's Adam, invariants."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax import linear_scaling, sqrt_scaling
from adabatch_jax.learning_rate import follow_batch_size, scaled_beta
from adabatch_jax.optimizers import scale_by_batch_adam

BASE = 64
SIZES = [64, 16, 640, 128, 128, 1000, 8, 64, 4096, 32]


def run(link, gradients, sizes):
    """All updates, and the last state."""
    state, step, history = link.init(gradients[0]), jax.jit(link.update), []
    for g, size in zip(gradients, sizes, strict=True):
        u, state = step(g, state, num_examples=jnp.int32(size))
        history.append(u)
    return history, state


def reference(gradients, sizes, *, b1, b2, eps, scale_betas, rate):
    """In float64: moments, then a division by 1 − ∏ β."""
    m = v = 0.0
    product_1 = product_2 = 1.0
    history = []
    for g, size in zip(gradients, sizes, strict=True):
        kappa = size / BASE
        beta_1, beta_2 = (max(0, 1 - kappa * (1 - b)) if scale_betas else b for b in (b1, b2))
        m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g * g
        product_1, product_2 = product_1 * beta_1, product_2 * beta_2
        root = np.sqrt(v / (1 - product_2))
        history.append((m / (1 - product_1)) / (root + eps * rate(kappa) / kappa))
    return history


@pytest.mark.parametrize("scale_betas", [True, False])
@pytest.mark.parametrize(
    ("scaling", "rate"), [(None, np.sqrt), (sqrt_scaling(), np.sqrt), (linear_scaling(), float)]
)
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_it_is_its_definition(scale_betas, scaling, rate, eps):
    rng = np.random.default_rng(1)
    gradients = [rng.normal(0.3, 10.0 ** rng.uniform(-2, 2), size=5) for _ in SIZES]
    options = dict(b1=0.9, b2=0.99, eps=eps, scale_betas=scale_betas)
    link = scale_by_batch_adam(**options, scaling=scaling, base_batch_size=BASE)
    got, _ = run(link, [jnp.float32(g) for g in gradients], SIZES)
    for u, wanted in zip(got, reference(gradients, SIZES, **options, rate=rate), strict=True):
        np.testing.assert_allclose(u, wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("scale_betas", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
def test_at_the_base_it_is_adam(scale_betas, nesterov):
    rng = np.random.default_rng(2)
    gradients = [
        {"w": jnp.float32(rng.normal(size=(4, 3))), "b": jnp.float32(rng.normal(size=3))}
        for _ in range(30)
    ]
    options = dict(scale_betas=scale_betas, nesterov=nesterov)
    ours, _ = run(scale_by_batch_adam(**options, base_batch_size=BASE), gradients, [BASE] * 30)
    theirs = optax.scale_by_adam(nesterov=nesterov)
    state = theirs.init(gradients[0])
    for g, u in zip(gradients, ours, strict=True):
        wanted, state = theirs.update(g, state)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), u, wanted)


def test_a_constant_gradient_is_its_own_average_and_optax_forgets_that():
    g = jnp.array([3.0, -0.7, 1e-4])
    gradients = [g] * len(SIZES)
    ours, state = run(scale_by_batch_adam(eps=0.0, base_batch_size=BASE), gradients, SIZES)
    np.testing.assert_allclose(state.batch_adam_mu, g, rtol=1e-6)
    np.testing.assert_allclose(state.batch_adam_nu, g * g, rtol=1e-6)
    for u in ours:
        np.testing.assert_allclose(u, jnp.sign(g), rtol=1e-6)

    betas = {
        name: follow_batch_size(scaled_beta(b), base_batch_size=BASE)
        for name, b in {"b1": 0.9, "b2": 0.999}.items()
    }
    theirs = optax.inject_hyperparams(optax.scale_by_adam)(**betas, eps=0.0)
    history, _ = run(theirs, gradients, SIZES)
    assert max(float(jnp.max(jnp.abs(u - jnp.sign(g)))) for u in history) > 0.3


def test_a_step_on_more_examples_is_as_many_steps_on_the_base():
    """To first order in κ (1 − β): what the averages remember is counted in examples."""
    rng = np.random.default_rng(4)
    means = rng.normal(1.0, 0.5, size=(200, 3))
    options = dict(b1=0.999, b2=0.9999, base_batch_size=BASE)
    small, state = run(
        scale_by_batch_adam(**options), [jnp.float32(g) for g in np.repeat(means, 4, 0)], [64] * 800
    )
    large, other = run(scale_by_batch_adam(**options), [jnp.float32(g) for g in means], [256] * 200)
    np.testing.assert_allclose(small[-1], large[-1], rtol=5e-3)
    np.testing.assert_allclose(state.batch_adam_weight1, other.batch_adam_weight1, rtol=5e-3)
    np.testing.assert_allclose(state.batch_adam_weight2, other.batch_adam_weight2, rtol=5e-3)


def test_tiny_batches_lose_no_digits():
    """1 − β₂ is 1e-7 here, two steps of float32 below 1."""
    link = scale_by_batch_adam(eps=0.0, base_batch_size=10_000)
    rng = np.random.default_rng(5)
    gradients = rng.normal(1.0, 0.5, size=(20, 4))
    history, state = run(link, [jnp.float32(g) for g in gradients], [1] * 20)
    expected = gradients.mean(0) / np.sqrt((gradients**2).mean(0))
    np.testing.assert_allclose(history[-1], expected, rtol=1e-4)
    np.testing.assert_allclose(state.batch_adam_weight2, 20e-7, rtol=1e-4)


def test_at_the_limit_only_the_last_gradient_counts():
    gradients = [jnp.array([1e4, 1.0]), jnp.array([1e-3, -2.0])]
    _, state = run(scale_by_batch_adam(base_batch_size=1), gradients, [10, 1000])
    np.testing.assert_array_equal(state.batch_adam_mu, gradients[1])
    np.testing.assert_array_equal(state.batch_adam_nu, gradients[1] ** 2)
    assert float(state.batch_adam_beta1) == float(state.batch_adam_beta2) == 0.0


def test_the_batch_is_read_from_the_noise_or_by_hand():
    link, g = scale_by_batch_adam(base_batch_size=BASE), jnp.ones(2)
    fields = jnp.ones(2), jnp.float32(1), jnp.int32(256), jnp.int32(2)
    noise = adabatch.GradientNoise(*fields)
    for given, beta in [
        ({"noise": noise}, 0.6),
        ({"num_examples": 128}, 0.8),
        ({"noise": noise, "num_examples": 128}, 0.8),
        ({"noise": noise, "base_batch_size": 128}, 0.8),
        ({"num_examples": 0}, 1 - 0.1 / BASE),
        ({"num_examples": float("nan")}, 0.9),
        ({"num_examples": float("inf")}, 0.9),
    ]:
        updates, state = link.update(g, link.init(g), **given)
        np.testing.assert_allclose(state.batch_adam_beta1, beta, rtol=1e-6)
        np.testing.assert_allclose(updates, 1.0, rtol=1e-6)


def test_metrics_show_what_was_used():
    controller = adabatch.adapt_batch_size(
        adabatch.norm_test(1.0), initial_batch_size=BASE, max_batch_size=512
    )
    link = optax.chain(controller, scale_by_batch_adam(base_batch_size=BASE))
    params = jnp.zeros(2)
    state = link.init(params)
    before = adabatch.metrics(state)
    fields = jnp.ones(2), jnp.float32(1), jnp.int32(256), jnp.int32(2)
    _, state = link.update(jnp.ones(2), state, params, noise=adabatch.GradientNoise(*fields))
    after = adabatch.metrics(state)
    assert before.keys() == after.keys() == jax.jit(adabatch.metrics)(state).keys()
    names = ("adam_beta1", "adam_beta2", "adam_eps")
    np.testing.assert_allclose([before[k] for k in names], [0.9, 0.999, 1e-8], rtol=1e-6)
    np.testing.assert_allclose([after[k] for k in names], [0.6, 0.996, 5e-9], rtol=1e-6)


def test_moments_are_float32_and_updates_keep_their_dtype():
    link, g = scale_by_batch_adam(base_batch_size=BASE), jnp.ones(2, jnp.bfloat16)
    updates, state = link.update(g, link.init(g), num_examples=128)
    assert updates.dtype == jnp.bfloat16
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32"}


def test_it_is_a_direction_for_automatic():
    optimizer = adabatch.automatic(
        scale_by_batch_adam(base_batch_size=BASE),
        scaling=sqrt_scaling(),
        total_examples=100_000,
        initial_batch_size=BASE,
        max_batch_size=512,
        autowu_options={"smoother": "as they are"},
    )
    params = jnp.ones(2)
    fields = jnp.ones(2), jnp.float32(1), jnp.int32(BASE), jnp.int32(2)
    noise, state = adabatch.GradientNoise(*fields), optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(noise.mean, state, params, noise=noise, value=1.0)
    assert (updates < 0).all()
    np.testing.assert_allclose(adabatch.metrics(state)["adam_beta1"], 0.9, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, "b1 must lie in .*, got 1.0"),
        ({"b2": -0.1}, "b2 must lie in .*, got -0.1"),
        ({"eps": -1.0}, "eps must lie in .*, got -1.0"),
        ({"base_batch_size": 0}, "base_batch_size must be a positive number, got 0"),
        ({"scaling": "sqrt"}, "scaling must be callable, got 'sqrt'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=f"scale_by_batch_adam: {message}"):
        scale_by_batch_adam(**{"base_batch_size": BASE} | options)


def test_a_missing_batch_size_says_how_to_pass_it():
    link, g = scale_by_batch_adam(base_batch_size=BASE), jnp.ones(2)
    with pytest.raises(ValueError, match=r"scale_by_batch_adam needs .*noise=noise.*num_examples="):
        jax.eval_shape(link.update, g, link.init(g))
