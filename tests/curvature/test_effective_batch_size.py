"""𝔟: a batch drawn without replacement from a finite data set is less noisy."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from adabatch_jax.curvature import effective_batch_size, inverse_effective_batch_size


@given(batch=st.integers(1, 2**20), more=st.integers(0, 2**20))
def test_by_definition(batch, more):
    total = batch + more
    expected = (total - batch) / (batch * total)
    np.testing.assert_allclose(inverse_effective_batch_size(batch, total), expected, rtol=1e-6)
    size = 1 / expected if more else np.inf
    np.testing.assert_allclose(effective_batch_size(batch, total), size, rtol=1e-6)
    assert effective_batch_size(batch, total) >= batch * (1 - 1e-6)
    np.testing.assert_allclose(inverse_effective_batch_size(batch), 1 / batch, rtol=1e-6)


@pytest.mark.parametrize(("batch", "total"), [(1, 8), (3, 8), (7, 8)])
def test_it_is_the_variance_of_a_mean_without_replacement(batch, total):
    """Over every subset: Var of the batch's mean = (Bessel-corrected variance of one) / 𝔟."""
    values = np.random.default_rng(0).normal(size=total)
    subsets = [
        [values[i] for i in range(total) if mask >> i & 1]
        for mask in range(2**total)
        if mask.bit_count() == batch
    ]
    means = np.mean(subsets, axis=1)
    expected = np.mean((means - values.mean()) ** 2) / values.var(ddof=1)
    np.testing.assert_allclose(inverse_effective_batch_size(batch, total), expected, rtol=1e-5)


def test_the_whole_data_set_and_more_has_no_noise():
    assert inverse_effective_batch_size(jnp.array([128, 129, 10**6]), 128).tolist() == [0, 0, 0]
    assert effective_batch_size(128, 128) == np.inf


def test_sizes_below_one_count_as_one():
    assert inverse_effective_batch_size(jnp.array([-3, 0, 1])).tolist() == [1, 1, 1]
    assert inverse_effective_batch_size(0, 4) == inverse_effective_batch_size(1, 4)


def test_arrays_broadcast_and_large_data_sets_fit():
    found = inverse_effective_batch_size(jnp.array([[1], [2]]), jnp.array([4.0, 8.0, 16.0]))
    assert found.shape == (2, 3)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(inverse_effective_batch_size(1024, 5 * 10**9), 1 / 1024, rtol=1e-6)


def test_nan_stays_nan_and_gradients_are_finite():
    assert jnp.isnan(inverse_effective_batch_size(jnp.nan, 8))
    assert jnp.isnan(effective_batch_size(jnp.array(4.0), jnp.array(jnp.nan)))
    assert np.isfinite(jax.grad(effective_batch_size)(8.0, 8.0))


@pytest.mark.parametrize("value", [0, -5, float("nan"), True])
def test_the_data_set_must_be_positive(value):
    with pytest.raises(ValueError, match=f"dataset_size must be .*got {value!r}"):
        inverse_effective_batch_size(8, value)
