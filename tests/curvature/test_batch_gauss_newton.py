"""The Gauss-Newton matrix of a batch: an outlier on a Marchenko-Pastur bulk, simulated and inverted."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from scipy.sparse.linalg import eigsh

from adabatch_jax.curvature import (
    batch_gauss_newton_extremes,
    full_gauss_newton_extremes,
    gauss_newton_noise,
)
from tests.marks import slow

DIMENSION = 1000
values, noises, ratios = st.floats(0.1, 100.0), st.floats(0.01, 100.0), st.floats(1e-3, 1e3)


def simulate(largest, noise, batch, seed=0):
    """Extremes of Xᵀ X / b and the squared overlap of its top eigenvector with the first axis.

    The outlier's coordinate is ±√λ₁, so that only the noise fluctuates.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, DIMENSION)) * np.sqrt(noise)
    x[:, 0] = rng.choice([-1.0, 1.0], batch) * np.sqrt(largest)
    matrix, start = x.T @ x / batch, np.ones(DIMENSION)
    (top,), vectors = eigsh(matrix, k=1, which="LA", v0=start, tol=1e-4)
    if batch <= DIMENSION:
        smallest = 0.0  # no more examples than directions
    else:
        # As the largest of another matrix: a small eigenvalue converges slowly.
        shifted = top * np.eye(DIMENSION) - matrix
        smallest = (
            top - eigsh(shifted, k=1, which="LA", v0=start, tol=1e-4, return_eigenvectors=False)[0]
        )
    return top, smallest, vectors[0, 0] ** 2


@pytest.mark.parametrize(
    ("largest", "noise", "batch"),
    [
        (5.0, 1.0, 4000),
        (5.0, 1.0, 2000),
        (5.0, 1.0, 500),
        (9.0, 1.0, 100),
        (1.2, 1.0, 4000),
        (0.5, 1.0, 2000),
        (2.0, 1.0, 500),
        (2.0, 0.5, 100),
    ],
)
def test_as_simulated(largest, noise, batch):
    found = batch_gauss_newton_extremes(largest, noise, DIMENSION / batch)
    top, bottom, overlap = simulate(largest, noise, batch)
    np.testing.assert_allclose(found.largest, top, rtol=0.03)
    np.testing.assert_allclose(found.smallest, bottom, rtol=0.03, atol=1e-6)
    np.testing.assert_allclose(found.overlap, overlap, atol=0.03)


@pytest.mark.parametrize(
    ("largest", "batch"),
    [(1.0, 100), (3.0, 600), *slow((1.0, 400), (1.0, 760), (3.0, 400), (1.5, 760))],
)
def test_near_the_whole_data_set_as_simulated(largest, batch):
    """Rows without replacement out of 800 in 200 dimensions, whose matrix is I but for one outlier."""
    directions, total = 200, 800
    rng, seen = np.random.default_rng(batch), []
    for _ in range(4):
        rows = np.linalg.qr(rng.normal(size=(total, directions)))[0] * np.sqrt(total)
        rows[:, 0] *= np.sqrt(largest)
        part = rows[rng.permutation(total)[:batch]]
        values, vectors = np.linalg.eigh(part.T @ part / batch)
        seen.append((values[-1], max(values[0], 0.0), vectors[0, -1] ** 2))
    ratio = directions * (1 / batch - 1 / total)
    found = batch_gauss_newton_extremes(largest, 1.0, ratio, dataset_ratio=directions / total)
    top, bottom, overlap = np.mean(seen, axis=0)
    np.testing.assert_allclose(found.largest, top, rtol=0.03)
    np.testing.assert_allclose(found.smallest, bottom, rtol=0.05, atol=0.01)
    np.testing.assert_allclose(found.overlap, overlap, atol=0.03)


@given(value=values, noise=noises, batch=st.integers(1, 799), share=st.floats(0.0, 0.9))
def test_near_the_whole_data_set_the_maps_are_inverse_and_the_fit_is_exact(
    value, noise, batch, share
):
    ratio, options = 800 * share * (1 / batch - 1 / 800), dict(dataset_ratio=share)
    found = batch_gauss_newton_extremes(value, noise, ratio, **options)
    full = full_gauss_newton_extremes(found.largest, noise, ratio, **options)
    if found.overlap > 0.05:
        np.testing.assert_allclose(full.largest, value, rtol=1e-3)
        np.testing.assert_allclose(full.overlap, found.overlap, atol=1e-2)
    else:
        assert full.largest >= value * (1 - 1e-3)
    if share > 0.01 and ratio > 0.01:
        fit = gauss_newton_noise(
            [share / ratio], [found.largest], value, num_parameters=share, **options
        )
        assert found.overlap <= 0.05 or value < noise or np.isclose(fit, noise, rtol=0.02)


@given(value=values, noise=noises, ratio=ratios)
def test_by_definition(value, noise, ratio):
    found = batch_gauss_newton_extremes(value, noise, ratio)
    spread, size = np.sqrt(ratio), value / noise
    if size > 1 + spread:
        top = value * (1 + ratio * noise / (value - noise))
        overlap = (1 - ratio / (size - 1) ** 2) / (1 + ratio / (size - 1))
    else:
        top, overlap = noise * (1 + spread) ** 2, 0.0
    np.testing.assert_allclose(found.largest, top, rtol=1e-4)
    np.testing.assert_allclose(found.overlap, overlap, atol=1e-4)
    bottom = noise * (1 - spread) ** 2 if ratio < 1 else 0.0
    np.testing.assert_allclose(found.smallest, bottom, rtol=1e-4, atol=1e-6 * noise)
    assert found.largest >= value * (1 - 1e-6)


@given(noise=noises, ratio=ratios)
def test_continuous_at_the_transition(noise, ratio):
    threshold = noise * (1 + np.sqrt(ratio))
    near = threshold * np.array([1 - 1e-5, 1, 1 + 1e-5])
    found = batch_gauss_newton_extremes(near, noise, ratio)
    np.testing.assert_allclose(found.largest, noise * (1 + np.sqrt(ratio)) ** 2, rtol=1e-4)


@given(value=values, noise=noises, ratio=ratios)
def test_the_inverse_above_the_edge_is_the_identity(value, noise, ratio):
    batch = batch_gauss_newton_extremes(value, noise, ratio)
    found = full_gauss_newton_extremes(batch.largest, noise, ratio)
    threshold = noise * (1 + np.sqrt(ratio))
    tolerance = 1e-4 if value > 1.1 * threshold else 4e-3
    np.testing.assert_allclose(found.largest, max(value, threshold), rtol=tolerance)
    np.testing.assert_allclose(found.smallest, noise, rtol=1e-6)
    if value > 1.1 * threshold:
        np.testing.assert_allclose(found.overlap, batch.overlap, atol=1e-3)


def test_what_noise_hides_is_bounded():
    found = full_gauss_newton_extremes(jnp.array([1.0, 8.0, 9.0]), 1.0, 4.0)
    assert found.largest.tolist() == [3.0, 3.0, 3.0]
    assert found.overlap.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("noise", "ratio"), [(0.0, 4.0), (-1.0, 4.0), (1.0, 0.0), (1.0, -2.0)])
def test_without_noise_a_batch_shows_the_full_matrix(noise, ratio):
    for formula in (batch_gauss_newton_extremes, full_gauss_newton_extremes):
        found = formula(5.0, noise, ratio)
        assert float(found.largest) == 5.0
        assert float(found.overlap) == 1.0


@pytest.mark.parametrize("formula", [batch_gauss_newton_extremes, full_gauss_newton_extremes])
def test_arrays_broadcast_under_jit_and_vmap(formula):
    largest, ratio = jnp.array([[5.0], [10.0]]), jnp.array([0.0, 0.25, 4.0])
    found = jax.jit(formula)(largest, 1.0, ratio)
    mapped = jax.vmap(lambda v: formula(v, 1.0, ratio))(largest[:, 0])
    for a, b in zip(found, mapped, strict=True):
        assert a.shape == (2, 3) and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("formula", [batch_gauss_newton_extremes, full_gauss_newton_extremes])
def test_gradients_are_finite_and_nan_stays_nan(formula):
    def total(*arguments):
        return sum(jnp.sum(x) for x in formula(*arguments))

    for point in [(5.0, 1.0, 4.0), (1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (9.0, 1.0, 4.0)]:
        gradient = jax.grad(total, argnums=(0, 1, 2))(*point)
        assert np.all(np.isfinite(gradient)), (point, gradient)
    for point in [(jnp.nan, 1.0, 4.0), (5.0, jnp.nan, 4.0), (5.0, 1.0, jnp.nan)]:
        found = formula(*point)
        assert jnp.isnan(found.largest) and jnp.isnan(found.overlap)


@pytest.mark.slow
@given(value=values, noise=noises, count=st.integers(1, 10**6), number=st.integers(1, 4))
def test_the_fit_recovers_the_noise_of_the_formula(value, noise, count, number):
    """Slow: many fits."""
    sizes = 16.0 * 4.0 ** np.arange(number)
    extremes = batch_gauss_newton_extremes(value, noise, count / sizes).largest
    rise = float(extremes[0]) / value - 1
    if rise < 1e-3:
        return  # float32 cannot show it
    found = gauss_newton_noise(sizes, extremes, value, num_parameters=count)
    # Near λ₁ = σ²(1 + √γ) and γ ≪ 1 the extreme hardly depends on σ²'s own digits.
    np.testing.assert_allclose(found, noise, rtol=1e-3 / min(1.0, rise))
    other = gauss_newton_noise(sizes / count, extremes, value)
    np.testing.assert_allclose(other, found, rtol=1e-4)


@pytest.mark.parametrize(
    ("largest", "noise"), [(5.0, 1.0), *slow((20.0, 0.1), (2.5, 1.0), (1.0, 1.0))]
)
def test_the_fit_recovers_the_noise_of_a_simulation(largest, noise):
    sizes = np.array([125, 250, 500, 1000])
    extremes = [simulate(largest, noise, size, seed=size)[0] for size in sizes]
    found = gauss_newton_noise(sizes, extremes, largest, num_parameters=DIMENSION)
    np.testing.assert_allclose(found, noise, rtol=0.03)
    # What is to be done with it: the extreme of a size that was not measured.
    predicted = batch_gauss_newton_extremes(largest, found, DIMENSION / 2000).largest
    np.testing.assert_allclose(predicted, simulate(largest, noise, 2000)[0], rtol=0.03)


def test_errors_of_measurement_on_both_sides_average_out():
    """One extreme above and one below λ₁ = 5: cutting the second off at 0 would give 0.003."""
    found = gauss_newton_noise([100, 100], [5.06, 4.96], 5.0, num_parameters=1000)
    np.testing.assert_allclose(found, 0.001, rtol=0.15)


def test_the_fit_by_hand():
    """σ² ≪ λ₁: least squares of the relative error of λ₁ + γσ²."""
    sizes, extremes, count = np.array([10.0, 20.0]), np.array([6.0, 5.6]), 10**6
    gamma, weight = count / sizes, 1 / extremes**2
    expected = np.sum(weight * gamma * (extremes - 5)) / np.sum(weight * gamma**2)
    found = gauss_newton_noise(sizes, extremes, 5.0, num_parameters=count)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_no_sharper_than_the_full_matrix_is_no_noise():
    assert float(gauss_newton_noise([10, 20], [4.9, 4.0], 5.0, num_parameters=100)) == 0.0
    assert float(gauss_newton_noise([10, 20], [5.0, 5.0], 5.0, num_parameters=100)) == 0.0
    assert float(gauss_newton_noise([np.inf, np.inf], [5.0, 6.0], 5.0)) == 0.0
    assert float(gauss_newton_noise([10, 20], [0.0, 0.0], 0.0)) == 0.0


def test_the_fit_under_jit_vmap_and_grad():
    sizes, largest = jnp.array([10, 20, 40]), jnp.array([5.0, 6.0])
    extremes = jax.vmap(lambda v: batch_gauss_newton_extremes(v, 0.5, 100 / sizes).largest)(largest)
    both = jnp.broadcast_to(sizes, (2, 3))
    found = jax.jit(gauss_newton_noise)(both, extremes, largest, num_parameters=100)
    assert found.shape == (2,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, 0.5, rtol=1e-4)
    mapped = jax.vmap(lambda e, v: gauss_newton_noise(sizes, e, v, num_parameters=100))
    np.testing.assert_allclose(mapped(extremes, largest), found, rtol=1e-6)
    slope = jax.grad(lambda e: gauss_newton_noise(sizes, e, 5.0, num_parameters=100))
    for e in (extremes[0], jnp.full(3, 5.0), jnp.zeros(3)):
        assert np.all(np.isfinite(slope(e)))
    assert jnp.isnan(gauss_newton_noise([10, 20], [jnp.nan, 6.0], 5.0))
    assert jnp.isnan(gauss_newton_noise([10, 20], [6.0, 6.0], jnp.nan))


@pytest.mark.parametrize("sizes", [[10.0], 10.0, [[10.0, 20.0]]])
def test_the_shapes_must_agree(sizes):
    with pytest.raises(ValueError, match=r"same shape \[\.\.\., k\], got"):
        gauss_newton_noise(sizes, [6.0, 5.5], 5.0)
    with pytest.raises(ValueError, match=r"got \(\) and \(\)"):
        gauss_newton_noise(10.0, 6.0, 5.0)


def test_the_number_of_parameters_must_be_positive():
    with pytest.raises(ValueError, match="num_parameters must be a positive number, got 0"):
        gauss_newton_noise([10.0, 20.0], [6.0, 5.5], 5.0, num_parameters=0)
