"""`max_stable_learning_rate`: just below it an optimizer converges on a quadratic, just above not."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from adabatch_jax.curvature import (
    batch_hessian_extremes,
    max_stable_learning_rate,
    transition_batch_size,
)

SHARPNESS = 4.0
SMALL = 1e-6  # gradients this small do not count in Adam's denominator beside its ε
curvatures, noises = st.floats(0.1, 100.0), st.floats(0.01, 1e6)
sizes, betas = st.integers(1, 10**6), st.floats(0.0, 0.99)


def distances(optimizer):
    """|w| in 400 steps on λ w²/2, as a multiple of |w| at the start."""

    def step(carry, _):
        w, state = carry
        updates, state = optimizer.update(SHARPNESS * w, state, w)
        return (w + updates, state), w

    w = jnp.float32(SMALL)
    state = optimizer.init(w)
    if optax.tree.get(state, "count") is not None:  # past Adam's correction of the first averages
        state = optax.tree.set(state, count=jnp.int32(10_000))
    _, path = jax.lax.scan(step, (w, state), length=400)
    return np.abs(path) / SMALL


def build(kind, rate, beta):
    if kind == "average":
        return optax.chain(optax.ema(beta, debias=False), optax.scale(-rate))
    if kind == "sgd":
        return optax.sgd(rate, momentum=beta)
    if kind == "nesterov":
        return optax.sgd(rate, momentum=beta, nesterov=True)
    return optax.adam(rate, b1=beta, eps=2.0, nesterov=kind == "nadam")


OPTIONS = {
    "sgd": {},
    "nesterov": {"nesterov": True},
    "average": {"adaptive": True},
    "adam": {"adaptive": True},
    "nadam": {"adaptive": True, "nesterov": True},
}


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("kind", OPTIONS)
def test_the_bound_separates_convergence_from_divergence(kind, beta):
    preconditioned = SHARPNESS / 2.0 if kind in ("adam", "nadam") else SHARPNESS
    bound = float(max_stable_learning_rate(preconditioned, momentum=beta, **OPTIONS[kind]))
    below, above = (distances(build(kind, k * bound, beta)) for k in (0.99, 1.01))
    assert below[-1] < 0.1 and below.max() < 10
    assert above.max() > 1000  # Adam comes back once its gradients outgrow its ε


def test_by_hand():
    assert float(max_stable_learning_rate(4.0)) == 0.5
    assert float(max_stable_learning_rate(4.0, momentum=0.5)) == 0.75
    assert float(max_stable_learning_rate(4.0, momentum=0.5, nesterov=True)) == 0.375
    assert float(max_stable_learning_rate(4.0, momentum=0.5, adaptive=True)) == 1.5
    np.testing.assert_allclose(max_stable_learning_rate(0.01, momentum=0.9), 380.0, rtol=1e-6)


@pytest.mark.parametrize("batch", [2, 16, 63])
def test_the_bound_of_a_batch_is_that_of_the_mean_square(batch):
    """E‖(I − αH_b) z‖² over batches of a finite data set: b* is about 9."""
    rng, total, dimension = np.random.default_rng(batch), 64, 50
    hessians = rng.normal(size=(total, dimension, dimension))
    hessians = (hessians + hessians.transpose(0, 2, 1)) * 1.5
    hessians[:, 0, 0] += 5.0
    values, vectors = np.linalg.eigh(hessians.mean(axis=0))
    top, z = values[-1], vectors[:, -1]
    products = hessians @ z
    noise = products.var(axis=0, ddof=1).sum()
    order = rng.permuted(np.tile(np.arange(total), (8000, 1)), axis=1)[:, :batch]
    seen = products[order].mean(axis=1)
    bound = float(max_stable_learning_rate(top, noise=noise, batch_size=batch, dataset_size=total))
    lengths = {k: np.sum((z - k * bound * seen) ** 2, axis=1) for k in (0.9, 1.0, 1.1)}
    error = lengths[1.0].std() / np.sqrt(len(order))
    np.testing.assert_allclose(lengths[1.0].mean(), 1.0, atol=4 * error + 1e-5)
    assert lengths[0.9].mean() < 1.0 < lengths[1.1].mean()


@given(value=curvatures, noise=noises, batch=sizes)
def test_the_two_forms(value, noise, batch):
    """The smooth one never exceeds the piecewise one, and is the same above the transition."""
    arguments = dict(noise=noise, batch_size=batch)
    smooth = max_stable_learning_rate(value, **arguments)
    piecewise = max_stable_learning_rate(value, **arguments, piecewise=True)
    np.testing.assert_allclose(smooth, 2 / (value + noise / batch / value), rtol=1e-5)
    batch_value = batch_hessian_extremes(value, 0.0, noise, batch).largest
    np.testing.assert_allclose(piecewise, 2 / batch_value, rtol=1e-5)
    assert smooth <= piecewise * (1 + 1e-6) and smooth <= 2 / value * (1 + 1e-6)
    if batch > 1.001 * transition_batch_size(value, noise):
        assert smooth == piecewise


def test_linear_in_small_batches_flat_in_large_ones():
    batches = jnp.array([1, 2, 4, 10**7, 2 * 10**7])  # b* = 6400
    rates = np.asarray(max_stable_learning_rate(1.0, noise=6400.0, batch_size=batches))
    np.testing.assert_allclose(rates[:3] / rates[0], [1, 2, 4], rtol=1e-3)
    np.testing.assert_allclose(rates[3:], 2.0, rtol=1e-3)


def growth(rate, beta, kind, mean, variance):
    """Of E[w²] in a step on h w²/2, h drawn anew: the radius of what maps E[(w, t)(w, t)ᵀ] on."""
    share = 1.0 - beta if kind == "average" else 1.0

    def matrix(h):
        if kind == "nesterov":
            first = [1.0 - rate * (1.0 + beta) * h, -rate * beta**2]
        else:
            first = [1.0 - rate * share * h, -rate * beta]
        return np.array([first, [share * h, beta]])

    ends = [matrix(mean + s * np.sqrt(variance)) for s in (-1, 1)]
    second_moments = np.mean([np.kron(m, m) for m in ends], axis=0)
    return np.abs(np.linalg.eigvals(second_moments)).max()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("batch", [1, 100, 10_000, 10**6])  # b* = 400
@pytest.mark.parametrize("kind", ["sgd", "average", "nesterov"])
def test_with_noise_the_mean_square_shrinks_up_to_the_bound(kind, batch, beta):
    mean, noise = 0.5, 100.0
    options = {"noise": noise, "batch_size": batch, **OPTIONS[kind]}
    bound = float(max_stable_learning_rate(mean, momentum=beta, **options))
    assert growth(0.999 * bound, beta, kind, mean, noise / batch) < 1
    assert growth(1.001 * bound, beta, kind, mean, noise / batch) > 1


@given(value=curvatures, beta=betas)
def test_the_limits_of_nesterov_with_noise(value, beta):
    """A quiet batch: as without noise. A loud one: 2 (1 − β) / q λ. Without momentum: 2 / (1 + q) λ."""

    def bound(share, momentum=beta):
        noise = share * value**2
        return max_stable_learning_rate(
            value, momentum=momentum, nesterov=True, noise=noise, batch_size=1
        )

    quiet = max_stable_learning_rate(value, momentum=beta, nesterov=True)
    np.testing.assert_allclose(bound(1e-7), quiet, rtol=1e-3)
    np.testing.assert_allclose(bound(1e7), 2 * (1 - beta) / (1e7 * value), rtol=1e-3)
    np.testing.assert_allclose(bound(3.0, momentum=0.0), 2 / (4 * value), rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.99])
def test_without_curvature_it_is_the_largest_bound_of_any(nesterov, beta):
    options = dict(momentum=beta, nesterov=nesterov, noise=64.0, batch_size=4)
    largest = max_stable_learning_rate(jnp.geomspace(0.01, 100.0, 4000), **options).max()
    np.testing.assert_allclose(max_stable_learning_rate(-1.0, **options), largest, rtol=1e-5)


@given(value=curvatures, noise=noises, beta=betas)
def test_the_transition_with_momentum(value, noise, beta):
    """There a batch allows half of the rate that all data allow."""
    batch = transition_batch_size(value, noise, momentum=beta)
    for options in ({}, {"adaptive": True}):
        plain = max_stable_learning_rate(value, momentum=beta, **options)
        noisy = max_stable_learning_rate(
            value, momentum=beta, noise=noise, batch_size=jnp.maximum(batch, 1.0), **options
        )
        np.testing.assert_allclose(plain / noisy, jnp.minimum(batch, 1.0) + 1.0, rtol=1e-4)


def test_the_piecewise_form_with_momentum_takes_the_batch_s_matrix_as_fixed():
    arguments = dict(noise=6400.0, batch_size=16, piecewise=True)
    for options in OPTIONS.values():
        found = max_stable_learning_rate(10.0, momentum=0.9, **arguments, **options)
        alone = max_stable_learning_rate(40.0, momentum=0.9, **options)  # 2ν/√b = 40
        np.testing.assert_allclose(found, alone, rtol=1e-6)


@pytest.mark.parametrize("piecewise", [False, True])
def test_without_curvature_only_noise_bounds(piecewise):
    flat = jnp.array([0.0, -3.0])
    assert max_stable_learning_rate(flat).tolist() == [np.inf, np.inf]
    rates = max_stable_learning_rate(flat, noise=64.0, batch_size=4, piecewise=piecewise)
    assert rates.tolist() == [0.25, 0.25]  # 2 / (2ν/√b)
    for noise, total in [(0.0, None), (-1.0, None), (64.0, 4)]:
        arguments = dict(noise=noise, batch_size=4, dataset_size=total, piecewise=piecewise)
        assert max_stable_learning_rate(flat, **arguments).tolist() == [np.inf, np.inf]
        assert max_stable_learning_rate(4.0, **arguments) == 0.5


@pytest.mark.parametrize("options", [{}, {"piecewise": True}, {"nesterov": True}], ids=str)
def test_arrays_broadcast_under_jit_and_vmap(options):
    values, batches = jnp.array([[5.0], [10.0]]), jnp.array([4, 64, 1024])

    @jax.jit
    def rate(value, batch, beta):
        return max_stable_learning_rate(
            value,
            momentum=beta,
            noise=6400.0,
            batch_size=batch,
            dataset_size=2048,
            **options,
        )

    found = rate(values, batches, 0.9)
    assert found.shape == (2, 3) and found.dtype == jnp.float32
    mapped = jax.vmap(rate, (0, None, None))(values[:, 0], batches, jnp.float32(0.9))
    np.testing.assert_allclose(found, mapped, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"piecewise": True}, {"nesterov": True}], ids=str)
def test_gradients_are_finite_and_nan_stays_nan(options):
    def rate(value, noise, batch):
        return max_stable_learning_rate(value, noise=noise, batch_size=batch, **options)

    for point in [(10.0, 6400.0, 4.0), (0.0, 6400.0, 4.0), (-1.0, 0.0, 4.0), (10.0, 0.0, 4.0)]:
        assert np.all(np.isfinite(jax.grad(rate, argnums=(0, 1, 2))(*point))), point
    for point in [(jnp.nan, 1.0, 4.0), (1.0, jnp.nan, 4.0), (1.0, 1.0, jnp.nan)]:
        assert jnp.isnan(rate(*point))
    assert jnp.isnan(max_stable_learning_rate(jnp.nan))


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan"), None])
def test_momentum_must_lie_below_one(value):
    with pytest.raises(ValueError, match=rf"momentum must lie in \[0.0, 1.0\), got {value!r}"):
        max_stable_learning_rate(4.0, momentum=value)


def test_noise_and_batch_size_belong_together():
    for lonely in ({"noise": 1.0}, {"batch_size": 4}):
        with pytest.raises(ValueError, match="noise and batch_size belong together"):
            max_stable_learning_rate(4.0, **lonely)
    with pytest.raises(ValueError, match="dataset_size must be a positive number, got -1"):
        max_stable_learning_rate(4.0, noise=1.0, batch_size=4, dataset_size=-1)
