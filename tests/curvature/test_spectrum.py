"""Lanczos against matrices of known spectrum, against matfree, and where the iteration ends early."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matfree import decomp

import adabatch_jax as adabatch
from tests.marks import slow

KEY = jax.random.key(3)


def matrix(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    return jnp.asarray((q * np.asarray(eigenvalues)) @ q.T, jnp.float32)


@functools.partial(jax.jit, static_argnames=("num_steps", "num_probes"))
def spectrum_of(a, **options):
    return adabatch.curvature.lanczos_spectrum(lambda v: a @ v, a[0], KEY, **options)


BULK = 0.3 * np.random.default_rng(1).normal(size=297)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])  # whose squares are no float32
def test_extremes_of_both_signs(scale):
    found = spectrum_of(matrix(scale * np.r_[10.0, 5.0, -3.0, BULK]), num_steps=30)
    np.testing.assert_allclose(found.largest, 10.0 * scale, rtol=1e-4)
    np.testing.assert_allclose(found.smallest, -3.0 * scale, rtol=1e-4)
    assert bool(found.converged())


def test_a_run_that_is_too_short_says_so():
    found = spectrum_of(matrix(np.linspace(-1, 1, 300)), num_steps=4)
    assert not bool(found.converged())
    nearest = np.linspace(-1, 1, 300)
    for value, residual in zip(found.eigenvalues[0], found.residuals[0], strict=True):
        assert np.abs(nearest - value).min() <= residual + 1e-6  # what a residual promises


@pytest.mark.parametrize(
    "eigenvalues",
    [
        np.r_[2.0, np.zeros(19)],  # of one size, so that one program serves them
        np.r_[-2.0, np.zeros(19)],
        np.zeros(20),
        np.full(20, 7.0),
        np.repeat([5.0, -1.0], 10),
        [3.0, 1.0, -2.0],
        *slow([4.0]),
    ],
    ids=["rank one", "negative", "zero", "identity", "two values", "three", "one"],
)
def test_runs_that_end_early_are_right_without_a_mask(eigenvalues):
    found = spectrum_of(matrix(eigenvalues), num_steps=12, num_probes=3)
    size = max(np.abs(eigenvalues).max(), 1e-30)
    np.testing.assert_allclose(found.largest / size, np.max(eigenvalues) / size, atol=1e-5)
    np.testing.assert_allclose(found.smallest / size, np.min(eigenvalues) / size, atol=1e-5)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1.0, rtol=1e-5)
    assert np.isfinite(found.residuals).all() and (np.diff(found.eigenvalues) >= 0).all()
    assert bool(found.converged())
    real = found.weights > 1e-6
    distance = np.abs(np.asarray(eigenvalues)[:, None, None] - found.eigenvalues[None])
    assert distance.min(axis=0)[real].max() <= 1e-5 * size


def test_a_bulk_far_below_an_outlier_is_seen():
    found = spectrum_of(matrix(np.r_[1e6, np.linspace(-5.0, 5.0, 99)]), num_steps=20)
    np.testing.assert_allclose(found.largest, 1e6, rtol=1e-5)
    assert abs(float(found.smallest) + 5.0) <= float(found.residuals[0, 0]) < 2.0


def test_arrays_without_entries_change_nothing():
    a, none = matrix([3.0, 1.0, -2.0]), jnp.zeros((0, 4))
    multiply = lambda v: {"w": a @ v["w"], "none": v["none"]}
    params = {"w": jnp.ones(3), "none": none}
    for start in (None, params):
        found, vector = adabatch.curvature.top_eigenvector(
            multiply, params, KEY, num_steps=3, start=start
        )
        np.testing.assert_allclose(found.eigenvalues[0], [-2.0, 1.0, 3.0], atol=1e-4)
        assert vector["none"].shape == none.shape


@pytest.mark.slow
def test_the_recurrence_is_matfree_s():
    """Slow: our iteration and matfree's, each compiled."""
    a = matrix(np.r_[10.0, 5.0, -3.0, BULK])
    found = spectrum_of(a, num_steps=15)
    start = jax.random.normal(jax.random.split(jax.random.split(KEY, 1)[0], 1)[0], (300,))
    tridiagonal = decomp.tridiag_sym(15)(lambda v: a @ v, start / jnp.linalg.norm(start)).J_small
    values, vectors = jnp.linalg.eigh(tridiagonal)
    np.testing.assert_allclose(found.eigenvalues[0], values, atol=2e-4)
    np.testing.assert_allclose(found.weights[0], vectors[0] ** 2, atol=2e-4)


@pytest.mark.slow
def test_moments_are_within_three_standard_errors():
    """Slow: many probes."""
    eigenvalues = np.r_[10.0, 5.0, -3.0, BULK]
    found = spectrum_of(matrix(eigenvalues), num_steps=20, num_probes=40)
    for power in (1, 2, 3):
        each = np.sum(found.weights * found.eigenvalues**power, axis=1)
        error = each.std(ddof=1) / np.sqrt(len(each))
        assert abs(each.mean() - np.mean(eigenvalues**power)) <= 3 * error


@pytest.mark.slow
def test_the_density_integrates_to_one_and_has_a_standard_error():
    """Slow: many probes."""
    found = spectrum_of(matrix(np.r_[10.0, 5.0, -3.0, BULK]), num_steps=30, num_probes=5)
    density = adabatch.curvature.spectral_density(found)
    np.testing.assert_allclose(np.trapezoid(density.density, density.grid), 1.0, atol=1e-3)
    middle = np.abs(density.grid) < 1.0
    inside = np.trapezoid(np.where(middle, density.density, 0.0), density.grid)
    assert abs(inside - 0.99) < 0.03
    assert (np.asarray(density.standard_error) >= 0).all()
    one = adabatch.curvature.spectral_density(jax.tree.map(lambda x: x[:1], found))
    assert not one.standard_error.any()  # not measured, and no NaN that jax_debug_nans would find


def test_the_density_of_a_zero_matrix_is_a_peak_at_zero():
    density = adabatch.curvature.spectral_density(spectrum_of(jnp.zeros((9, 9)), num_steps=3))
    np.testing.assert_allclose(np.trapezoid(density.density, density.grid), 1.0, atol=1e-3)
    assert abs(float(density.grid[np.argmax(density.density)])) < 1e-3


def test_pytrees_bfloat16_and_float64():
    diagonal = {"a": jnp.array([4.0, 1.0]), "b": jnp.array([[2.0], [-1.0]])}
    multiply = lambda v: jax.tree.map(jnp.multiply, diagonal, v)
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda x, d=dtype: x.astype(d), diagonal)
        found = adabatch.curvature.lanczos_spectrum(multiply, params, KEY, num_steps=4)
        assert found.eigenvalues.dtype == jnp.float32
        np.testing.assert_allclose(found.eigenvalues[0], [-1.0, 1.0, 2.0, 4.0], atol=1e-5)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), diagonal)
        found = adabatch.curvature.lanczos_spectrum(multiply, wide, KEY, num_steps=4)
        np.testing.assert_allclose(found.eigenvalues[0], [-1.0, 1.0, 2.0, 4.0], atol=1e-5)


def test_operators_of_one_loss_share_a_program():
    def loss(w, a):
        return 0.5 * w @ a @ w

    tops = []
    for top in (3.0, 5.0):
        a = matrix([top, 1.0, 0.5])
        operator = adabatch.curvature.hessian_vector_product(loss, jnp.ones(3), a)
        tops.append(
            adabatch.curvature.lanczos_spectrum(operator, jnp.ones(3), KEY, num_steps=3).largest
        )
    np.testing.assert_allclose(tops, [3.0, 5.0], rtol=1e-5)


def test_what_is_not_finite_shows():
    found = adabatch.curvature.lanczos_spectrum(
        lambda v: v * jnp.nan, jnp.ones(4), KEY, num_steps=3
    )
    assert np.isnan(found.largest) and not bool(found.converged())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be a positive integer, got 0"),
        ({"num_steps": 3, "num_probes": 1.5}, "num_probes must be a positive integer, got 1.5"),
    ],
)
def test_bad_counts_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        adabatch.curvature.lanczos_spectrum(lambda v: v, jnp.ones(3), KEY, **options)


def test_no_parameters_are_an_error():
    with pytest.raises(ValueError, match="params must hold"):
        adabatch.curvature.lanczos_spectrum(lambda v: v, {}, KEY, num_steps=3)


@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_a_given_start_is_used_whatever_its_length(scale):
    """From a sum of two eigenvectors, two steps know both eigenvalues, and their weights."""
    start = scale * jnp.array([3.0, 0.0, 4.0, 0.0])
    multiply = lambda v: jnp.array([5.0, 9.0, -1.0, 7.0]) * v
    found = adabatch.curvature.lanczos_spectrum(multiply, start, KEY, num_steps=2, start=start)
    np.testing.assert_allclose(found.eigenvalues, [[-1.0, 5.0]], atol=1e-5)
    np.testing.assert_allclose(found.weights, [[0.64, 0.36]], atol=1e-5)


def test_a_start_allows_one_probe():
    with pytest.raises(ValueError, match="num_probes must be 1 with start, got 2"):
        adabatch.curvature.lanczos_spectrum(
            lambda v: v, jnp.ones(3), KEY, num_steps=2, num_probes=2, start=jnp.ones(3)
        )


def test_the_top_eigenvector_has_the_residual_it_claims():
    """Of an unfinished run: the Ritz pair as NumPy has it, and the same run as the spectrum's."""
    a = matrix(np.linspace(-12.0, 10.0, 300))
    found, vector = adabatch.curvature.top_eigenvector(lambda v: a @ v, a[0], KEY, num_steps=6)
    wide, v = np.asarray(a, np.float64), np.asarray(vector, np.float64)
    np.testing.assert_allclose(np.linalg.norm(v), 1.0, rtol=1e-5)
    np.testing.assert_allclose(v @ wide @ v, found.largest, rtol=1e-5)
    residual = np.linalg.norm(wide @ v - float(found.largest) * v)
    assert residual > 0.1
    np.testing.assert_allclose(residual, found.residuals[0, -1], rtol=1e-3)
    same = adabatch.curvature.lanczos_spectrum(lambda v: a @ v, a[0], KEY, num_steps=6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, same)


@pytest.mark.slow
def test_a_run_that_ends_early_gives_its_top_eigenvector():
    """Slow: several Lanczos runs, each compiled."""
    diagonal = {"a": jnp.array([4.0, 1.0]), "b": jnp.array([[2.0], [-5.0]])}
    multiply = lambda v: jax.tree.map(jnp.multiply, diagonal, v)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), diagonal)
    found, vector = adabatch.curvature.top_eigenvector(multiply, half, KEY, num_steps=9)
    assert vector["a"].dtype == jnp.float32
    np.testing.assert_allclose(found.largest, 4.0, rtol=1e-5)
    np.testing.assert_allclose(np.abs(vector["a"]), [1.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(vector["b"], [[0.0], [0.0]], atol=1e-5)


@pytest.mark.slow
def test_the_top_eigenvector_of_a_part_needs_one_step_with_the_whole():
    """λ₁ of the whole is wrong by the square of the angle, and its residual by the angle.

    Slow: several Lanczos runs, each compiled.
    """

    def loss(w, a):
        return 0.5 * w @ a @ w

    whole = matrix(np.r_[10.0, 5.0, -3.0, BULK])
    noise = matrix(0.15 * np.sign(np.r_[BULK, BULK[:3]]), seed=2)
    params = jnp.ones(300)
    part = adabatch.curvature.hessian_vector_product(loss, params, whole + noise)
    start = jax.random.normal(jax.random.key(9), (300,))
    _, vector = adabatch.curvature.top_eigenvector(
        part, params, KEY, num_steps=12, start=1e-25 * start
    )
    product = adabatch.curvature.hessian_vector_product(loss, params, whole)
    found = adabatch.curvature.lanczos_spectrum(product, params, KEY, num_steps=1, start=vector)
    np.testing.assert_allclose(found.largest, 10.0, rtol=1e-3)
    assert bool(found.converged(2e-2))
    blind = adabatch.curvature.lanczos_spectrum(product, params, KEY, num_steps=1)
    assert float(blind.largest) < 5.0 and not bool(blind.converged(2e-2))


def test_bad_arguments_of_the_top_eigenvector_are_named():
    with pytest.raises(ValueError, match="top_eigenvector: num_steps must be a positive integer"):
        adabatch.curvature.top_eigenvector(lambda v: v, jnp.ones(3), KEY, num_steps=0)
    with pytest.raises(ValueError, match="top_eigenvector: params must hold"):
        adabatch.curvature.top_eigenvector(lambda v: v, {}, KEY, num_steps=3)
    with pytest.raises(ValueError, match="operator"):
        adabatch.curvature.top_eigenvector(3, jnp.ones(3), KEY, num_steps=3)


@pytest.mark.usefixtures("optimized")
def test_the_basis_is_not_copied():
    """Memory of a run is that of its vectors: copies of the basis would double or quadruple it."""

    def temporary(steps):
        run = lambda d, k: adabatch.curvature.lanczos_spectrum(
            lambda v: d * v, d, k, num_steps=steps
        )
        program = jax.jit(run).lower(jnp.ones((256, 256)), KEY).compile()
        return program.memory_analysis().temp_size_in_bytes

    one_vector = 4 * 256 * 256
    assert temporary(40) - temporary(20) <= 1.1 * 20 * one_vector
