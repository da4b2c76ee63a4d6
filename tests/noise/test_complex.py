"""Complex parameters: |x|² is both parts, and inner products are those of the real plane."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import GradientNoise, merge_noise
from adabatch_jax.noise._gradient_noise import pool_noise

SIZES = (3, 1, 2, 5, 4, 0)


@pytest.fixture(scope="module")
def parts():
    """Six groups with a complex and a real leaf, one of them without examples."""
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(6, 3)) + 1j * rng.normal(size=(6, 3))).astype(np.complex64)
    r = rng.normal(size=(6, 2)).astype(np.float32)
    z[-1] = np.nan
    zeros = {"r": jnp.zeros(2), "z": jnp.zeros(3)}
    return [
        GradientNoise({"r": r[i], "z": z[i]}, jnp.float32(0), n, jnp.int32(n > 0), zeros)
        for i, n in enumerate(jnp.int32(SIZES))
    ]


@pytest.fixture(scope="module")
def expected(parts):
    """The definitions in complex128: mean and scatter by coordinate, the real leaf first."""
    n = np.array(SIZES[:-1])[:, None]
    means = np.stack(
        [np.concatenate([p.mean["r"], p.mean["z"]]) for p in parts[:-1]], dtype=np.complex128
    )
    mean = (n * means).sum(0) / n.sum()
    return mean, (n * np.abs(means - mean) ** 2).sum(0)


def pooled(parts):
    lanes = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    return pool_noise(lanes, jnp.zeros((len(parts), 1)), lambda x: x.sum(0))[0]


def merged(parts):
    return functools.reduce(merge_noise, parts)


@pytest.mark.parametrize("join", [merged, pooled])
def test_merged_noise_is_that_of_the_real_plane(parts, expected, join):
    noise, (mean, squares) = join(parts), expected
    assert noise.mean["z"].dtype == jnp.complex64
    np.testing.assert_allclose(jnp.concatenate([*noise.mean.values()]), mean, rtol=1e-5)
    for name, own in (("r", squares[:2]), ("z", squares[2:])):
        assert noise.coordinate_scatter[name].dtype == jnp.float32
        np.testing.assert_allclose(noise.coordinate_scatter[name], own, rtol=1e-5)
    assert noise.scatter.dtype == noise.trace.dtype == jnp.float32
    np.testing.assert_allclose(noise.scatter, squares.sum(), rtol=1e-5)
    np.testing.assert_allclose(noise.squared_norm, (np.abs(mean) ** 2).sum(), rtol=1e-5)


def test_the_squared_norm_of_one_complex_number():
    assert float(GradientNoise(jnp.complex64(3 + 4j), 0.0, 1, 1).squared_norm) == 25.0
