"""The Hessian of a batch: a few outliers plus Wigner noise, simulated and inverted."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from scipy.sparse.linalg import eigsh

from adabatch_jax.curvature import (
    batch_hessian_extremes,
    effective_batch_size,
    full_hessian_extremes,
    inverse_effective_batch_size,
    transition_batch_size,
)

DIMENSION = 1000
NOISE = 6400.0  # with λ₁ = 10 the transition is at 64 examples
curvatures, sizes = st.floats(0.1, 100.0), st.integers(1, 10**6)
noises = st.floats(0.01, 1e6)


@pytest.fixture(scope="module")
def simulated():
    """Eigenpairs of diag(10, −8, 0, …) + noise, for batches on both sides of b* = 64 and 100."""
    rng = np.random.default_rng(0)
    square = rng.normal(size=(DIMENSION, DIMENSION))
    noise = (square + square.T) * np.sqrt(NOISE / 2 / DIMENSION)
    np.testing.assert_allclose(np.sum(noise[0] ** 2), NOISE, rtol=0.1)  # ν² = E‖noise · z‖²

    def extremes(inverse):
        matrix = noise * np.sqrt(inverse)
        matrix[0, 0] += 10.0
        matrix[1, 1] -= 8.0
        values, vectors = eigsh(matrix, k=2, which="BE", v0=np.ones(DIMENSION), tol=1e-4)
        return values[-1], values[0], vectors[0, -1] ** 2, vectors[1, 0] ** 2

    return extremes


@pytest.mark.parametrize(
    ("batch", "total"), [(8, None), (64, None), (100, None), (256, None), (1024, None), (192, 384)]
)
def test_as_simulated(simulated, batch, total):
    expected = simulated(float(inverse_effective_batch_size(batch, total)))
    found = batch_hessian_extremes(10.0, -8.0, NOISE, batch, total)
    np.testing.assert_allclose(found[:2], expected[:2], rtol=0.03)
    near = batch in (64, 100)  # where the overlap of a finite matrix vanishes only gradually
    np.testing.assert_allclose(found[2:], expected[2:], atol=0.2 if near else 0.03)


def test_from_examples_drawn_without_replacement():
    """ν² measured on 64 examples, λ₁′ of a quarter of them: no formula of the matrix is assumed."""
    rng, total, batch = np.random.default_rng(1), 64, 16
    examples = rng.normal(size=(total, 300, 300)).astype(np.float32)
    examples = (examples + examples.transpose(0, 2, 1)) * np.sqrt(320 / 2 / 300)
    examples[:, 0, 0] += 10.0
    examples[:, 1, 1] -= 10.0
    values, vectors = np.linalg.eigh(examples.mean(axis=0))
    products = examples @ vectors[:, -1]
    noise = np.sum(products.var(axis=0, ddof=1))
    found = batch_hessian_extremes(values[-1], values[0], noise, batch, total)
    seen = np.linalg.eigvalsh(examples[:batch].mean(axis=0))
    np.testing.assert_allclose(found[:2], [seen[-1], seen[0]], rtol=0.03)
    back = full_hessian_extremes(seen[-1], seen[0], noise, batch, total)
    np.testing.assert_allclose(back[:2], [values[-1], values[0]], rtol=0.03)


def test_without_a_negative_outlier_the_noise_makes_one(simulated):
    found = batch_hessian_extremes(10.0, 0.0, NOISE, 16)
    np.testing.assert_allclose(found.smallest, simulated(1 / 16)[1], rtol=0.03)
    assert found.smallest == -40.0
    assert found.smallest_overlap == 0.0


@given(value=curvatures, noise=noises, batch=sizes)
def test_by_definition(value, noise, batch):
    found = batch_hessian_extremes(value, -value, noise, batch)
    edge = np.sqrt(noise / batch)
    expected = value + noise / batch / value if value > edge else 2 * edge
    np.testing.assert_allclose(found.largest, expected, rtol=1e-5)
    assert found.smallest == -found.largest
    overlap = max(0.0, 1 - noise / value**2 / batch)
    np.testing.assert_allclose(found.largest_overlap, overlap, atol=1e-5)
    assert found.smallest_overlap == found.largest_overlap
    assert found.largest >= value * (1 - 1e-6)


@given(value=curvatures, noise=noises, batch=sizes)
def test_the_inverse_above_the_edge_is_the_identity(value, noise, batch):
    found = full_hessian_extremes(
        *batch_hessian_extremes(value, -value, noise, batch)[:2], noise, batch
    )
    edge = np.sqrt(noise / batch)
    # At the edge λ₁′ has slope 0 in λ₁: a rounding error there becomes its square root.
    tolerance = 1e-5 if value > 1.1 * edge else 2e-3
    np.testing.assert_allclose(found.largest, max(value, edge), rtol=tolerance)
    np.testing.assert_allclose(found.smallest, -found.largest, rtol=1e-6)
    if value < 0.99 * edge:
        assert found.largest_overlap <= 2e-3


def test_what_noise_hides_is_bounded():
    """Any λ₁ up to ν/√𝔟 gives the same batch; below the edge the bound stays."""
    found = full_hessian_extremes(jnp.array([1.0, 20.0, 39.9]), -1.0, NOISE, 16)
    np.testing.assert_allclose(found.largest, 20.0, rtol=1e-6)
    np.testing.assert_allclose(found.smallest, -20.0, rtol=1e-6)
    assert found.largest_overlap.tolist() == [0.0, 0.0, 0.0]


@given(value=curvatures, noise=noises)
def test_continuous_at_the_transition_where_it_is_twice_the_curvature(value, noise):
    transition = float(transition_batch_size(value, noise))
    np.testing.assert_allclose(transition, noise / value**2, rtol=1e-5)
    scale = 10.0 / transition  # batches of at least one example
    sizes = 10.0 * np.array([1 - 1e-4, 1, 1 + 1e-4])
    found = batch_hessian_extremes(value, 0.0, noise * scale, sizes)
    np.testing.assert_allclose(found.largest, 2 * value, rtol=2e-4)
    np.testing.assert_allclose(found.largest_overlap, 0.0, atol=2e-4)


@given(value=curvatures, noise=noises, batch=sizes, more=st.integers(0, 10**6))
def test_a_finite_data_set_acts_by_the_effective_batch_size(value, noise, batch, more):
    total = batch + more
    found = batch_hessian_extremes(value, -value, noise, batch, total)
    other = batch_hessian_extremes(value, -value, noise, effective_batch_size(batch, total))
    for a, b in zip(found, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_without_noise_a_batch_shows_the_full_matrix():
    for noise, batch, total in [(0.0, 4, None), (-3.0, 4, None), (NOISE, 128, 128)]:
        found = batch_hessian_extremes(10.0, -8.0, noise, batch, total)
        assert [float(x) for x in found] == [10.0, -8.0, 1.0, 1.0]
        back = full_hessian_extremes(10.0, -8.0, noise, batch, total)
        assert [float(x) for x in back] == [10.0, -8.0, 1.0, 1.0]


def test_transition_of_flat_and_of_noiseless_losses():
    found = transition_batch_size(
        jnp.array([0.0, 0.0, 2.0, -2.0, 2.0]), jnp.array([1, 0, 0, 8, -1])
    )
    assert found.tolist() == [np.inf, 0.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("formula", [batch_hessian_extremes, full_hessian_extremes])
def test_arrays_broadcast_under_jit_and_vmap(formula):
    values, batches = jnp.array([[5.0], [10.0]]), jnp.array([4, 64, 1024])
    found = jax.jit(formula)(values, -1.0, jnp.float32(NOISE), batches, 2048)
    mapped = jax.vmap(lambda v: formula(v, -1.0, NOISE, batches, 2048))(values[:, 0])
    for a, b in zip(found, mapped, strict=True):
        assert a.shape == (2, 3) and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("formula", [batch_hessian_extremes, full_hessian_extremes])
def test_gradients_are_finite_and_nan_stays_nan(formula):
    def total(*arguments):
        return sum(jnp.sum(x) for x in formula(*arguments, batches, 128.0))

    batches = jnp.array([1.0, 64.0, 128.0])
    for point in [(10.0, -8.0, NOISE), (0.0, 0.0, NOISE), (10.0, 1.0, 0.0), (0.0, 0.0, 0.0)]:
        gradient = jax.grad(total, argnums=(0, 1, 2))(*point)
        assert np.all(np.isfinite(gradient)), (point, gradient)
    assert np.all(np.isnan(formula(jnp.nan, jnp.nan, NOISE, 64)))
    assert np.all(np.isnan(formula(10.0, -8.0, jnp.nan, 64)))
    assert np.all(np.isnan(formula(10.0, -8.0, NOISE, jnp.nan)))


def test_nan_in_one_extreme_leaves_the_other():
    found = batch_hessian_extremes(jnp.nan, -20.0, NOISE, 64)
    assert jnp.isnan(found.largest) and found.smallest == -25.0


def test_the_data_set_must_be_positive():
    with pytest.raises(ValueError, match="dataset_size must be a positive number, got 0"):
        batch_hessian_extremes(10.0, -8.0, NOISE, 64, 0)
