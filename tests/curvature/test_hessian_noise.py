"""Noise of Hessians: closed forms, dense matrices, prediction of a real batch's extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adabatch_jax as adabatch
from tests.marks import slow

KEY = jax.random.key(0)
P = 40


def quadratic(w, matrices):
    return 0.5 * jnp.mean(jnp.einsum("i,bij,j->b", w, matrices, w))


def matrices(num, noise, seed=0, top=4.0):
    """Hessians of examples: a spike and symmetric Gaussian noise with E ‖(H_i − H) z‖² = noise."""
    a = jax.random.normal(jax.random.key(seed), (num, P, P)) * jnp.sqrt(noise / (2 * P))
    spike = jnp.zeros((P, P)).at[0, 0].set(top)
    return spike[None] + a + a.transpose(0, 2, 1)


def grouped(a, size):
    return a.reshape(-1, size, *a.shape[1:])


@pytest.mark.parametrize("size", [4, *slow(1, 16)])
@pytest.mark.parametrize("probe", ["ritz", "random"])
def test_noise_without_a_direction_is_found_by_both_probes(probe, size):
    groups = grouped(matrices(1024, 2.0), size)
    got = adabatch.curvature.hessian_noise(quadratic, jnp.ones(P), groups, KEY, probe=probe)
    np.testing.assert_allclose(got, 2.0, rtol=0.15)


def test_it_is_the_variance_of_the_products():
    groups = grouped(matrices(24, 2.0), 3)
    means = np.asarray(groups.mean(axis=1), np.float64)
    vectors = np.linalg.eigh(means.mean(axis=0))[1]
    products = means @ vectors[:, -1]
    expected = 3 * np.sum((products - products.mean(axis=0)) ** 2) / 7
    got = adabatch.curvature.hessian_noise(quadratic, jnp.ones(P), groups, KEY, num_steps=P)
    np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.slow
def test_a_random_probe_misses_noise_along_the_top_direction():
    """Slow: two probes, each compiled."""
    top = jnp.zeros((P, P)).at[0, 0].set(1.0)
    scales = 4.0 + jax.random.normal(KEY, (512,))
    groups = grouped(scales[:, None, None] * top[None], 4)
    ritz, random = (
        adabatch.curvature.hessian_noise(quadratic, jnp.ones(P), groups, KEY, probe=probe)
        for probe in ("ritz", "random")
    )
    np.testing.assert_allclose(ritz, 1.0, rtol=0.2)
    assert random < 0.3 * ritz


def test_equal_groups_have_no_noise():
    groups = jnp.broadcast_to(matrices(2, 1.0), (6, 2, P, P))
    got = adabatch.curvature.hessian_noise(quadratic, jnp.ones(P), groups, KEY)
    assert 0 <= float(got) < 1e-6


@pytest.mark.slow
def test_it_predicts_the_largest_eigenvalue_of_a_batch():
    """Slow: the eigenvalues of many batches."""
    a = matrices(4096, 16.0)
    full = np.linalg.eigvalsh(a.mean(axis=0))
    noise = adabatch.curvature.hessian_noise(quadratic, jnp.ones(P), grouped(a, 16), KEY)
    for size in (8, 32):
        measured = [np.linalg.eigvalsh(g.mean(axis=0))[-1] for g in grouped(a, size)[:40]]
        predicted = adabatch.curvature.batch_hessian_extremes(full[-1], full[0], noise, size, 4096)[
            0
        ]
        np.testing.assert_allclose(np.mean(measured), predicted, rtol=0.06)


def test_the_fit_recovers_what_made_the_eigenvalues():
    sizes = np.array([16.0, 64.0, 256.0, 1024.0])
    fit = adabatch.curvature.fit_hessian_noise(sizes, 4.0 + 16.0 / (4.0 * sizes))
    np.testing.assert_allclose((fit.largest, fit.noise), (4.0, 16.0), rtol=1e-4)
    falling = adabatch.curvature.fit_hessian_noise(sizes, 4.0 - 1.0 / sizes)
    assert float(falling.noise) == 0.0


def test_batch_sharpness_is_the_rayleigh_quotient_along_each_gradient():
    groups, w = grouped(matrices(24, 2.0), 3), jnp.ones(P)
    each = []
    for h in np.asarray(groups.mean(axis=1), np.float64):
        g = h @ np.ones(P)
        each.append(g @ h @ g / (g @ g))
    got = adabatch.curvature.batch_sharpness(quadratic, w, groups)
    np.testing.assert_allclose(got.mean, np.mean(each), rtol=1e-4)
    np.testing.assert_allclose(got.standard_error, np.std(each, ddof=1) / np.sqrt(8), rtol=1e-3)
    # The square of its gradient is 0.
    far = adabatch.curvature.batch_sharpness(quadratic, 1e-25 * w, groups)
    np.testing.assert_allclose(far.mean, np.mean(each), rtol=1e-4)
    still = adabatch.curvature.batch_sharpness(quadratic, jnp.zeros(P), groups)
    assert tuple(map(float, still)) == (0.0, 0.0)


def test_what_is_wrong_is_named():
    a = matrices(4, 1.0)
    with pytest.raises(ValueError, match="groups must be at least 2, got 1"):
        adabatch.curvature.hessian_noise(quadratic, jnp.ones(P), a[None], KEY)
    with pytest.raises(ValueError, match="probe must be one of ritz, random, got 'top'"):
        adabatch.curvature.hessian_noise(quadratic, jnp.ones(P), grouped(a, 2), KEY, probe="top")
    with pytest.raises(ValueError, match="same two leading axes"):
        adabatch.curvature.batch_sharpness(quadratic, jnp.ones(P), jnp.ones(3))
    with pytest.raises(ValueError, match="two vectors of the same length"):
        adabatch.curvature.fit_hessian_noise([1.0], [2.0])
