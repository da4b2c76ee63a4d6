"""The Gaussian processes against dense NumPy in float64, and what must not matter to them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax.learning_rate import _posterior_test, _quasisep, _rbf
from adabatch_jax.learning_rate._posterior_test import Posterior, draw, probability_past_minimum
from adabatch_jax.learning_rate._quasisep import QuasisepFit, quasisep_smoother
from adabatch_jax.learning_rate._rbf import RbfFit, rbf_smoother
from tests.marks import slow

GRID = np.linspace(0.0, 1.0, 500)
KEY = jax.random.PRNGKey(0)


@pytest.fixture(autouse=True)
def free_ranks():
    """As `scale_by_autowu` calls them: tinygp mixes ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def series(n, seed=0):
    """A noisy bowl whose minimum lies at 0.6."""
    x = np.arange(n) / n
    return x, 1.0 + 2.0 * (x - 0.6) ** 2 + 0.15 * np.random.default_rng(seed).normal(size=n)


def rbf(a, b, scale=0.2):
    return np.exp(-0.5 * ((a[:, None] - b[None, :]) / scale) ** 2)


def matern52(a, b, scale):
    r = np.sqrt(5.0) * np.abs(a[:, None] - b[None, :]) / scale
    return (1.0 + r + r * r / 3.0) * np.exp(-r)


def dense(kernel, x, y, mean, noise):
    """Posterior mean, variance and covariance with the last grid point, in float64."""
    gram, cross = kernel(x, x) + noise * np.eye(len(x)), kernel(x, GRID)
    solved = np.linalg.solve(gram, np.column_stack([y - mean, cross]))
    covariance = kernel(GRID, GRID) - cross.T @ solved[:, 1:]
    return mean + cross.T @ solved[:, 0], np.diag(covariance), covariance[:, -1]


def padded(values, length=700, fill=np.nan):
    """A buffer with something in its unused part that would spoil every sum."""
    return jnp.asarray(np.pad(values, (0, length - len(values)), constant_values=fill), jnp.float32)


RBF, QUASISEP = rbf_smoother(), quasisep_smoother()


@functools.cache
def compiled(smoother):
    """One program for all series in buffers of the same length."""
    return jax.jit(smoother.test)


def likelihood(gram, y):
    """Negative log marginal likelihood per point, without the constant."""
    factor = jnp.linalg.cholesky(gram)
    alpha = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
    return (0.5 * alpha @ alpha + jnp.sum(jnp.log(jnp.diag(factor)))) / len(y)


def adam(loss, start, steps, rate, project=lambda p: p):
    """Float64 Adam from `start`."""
    optimizer, gradient = optax.adam(rate), jax.jit(jax.grad(loss))
    params = jnp.asarray(start)
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(gradient(params), state)
        params = project(optax.apply_updates(params, updates))
    return np.asarray(params)


RBF_FIT = RbfFit(tuple(jnp.float32(v) for v in (-0.5, -3.0, 1.2)), ())
MATERN_FIT = QuasisepFit(
    tuple(jnp.float32(np.log(v)) for v in (0.3, 0.15**2, 0.5)), jnp.int32(1), ()
)


def test_the_paper_s_posterior_is_the_dense_one():
    x, y = series(120)
    grid, got = rbf_smoother().posterior(RBF_FIT, padded(x, fill=0.5), padded(y, fill=9), 120)
    scale, noise = np.log1p(np.exp(-0.5)), 1e-4 + np.log1p(np.exp(-3.0))
    expected = dense(lambda a, b: scale * rbf(a, b), x, y, 1.2, noise)
    np.testing.assert_allclose(grid, GRID, atol=1e-6)
    for found, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("n", [5, 500, *slow(60, 3000)])
def test_the_posterior_on_all_losses_is_the_dense_one(n):
    x, y = series(n)
    length = n + 7
    _, got = jax.jit(quasisep_smoother().posterior)(
        MATERN_FIT, padded(x, length, 0.1), padded(y, length, 5.0), jnp.int32(n)
    )
    mean, variance, covariance = dense(
        lambda a, b: 0.3 * matern52(a, b, 0.5), x, y, y.mean(), 0.15**2
    )
    deviation = np.sqrt(variance)
    assert (np.abs(got.mean - mean) / deviation).max() < 1e-4
    np.testing.assert_allclose(np.sqrt(got.variance), deviation, rtol=2e-5)
    assert (np.abs(got.last_covariance - covariance) / variance[-1]).max() < 2e-5


def test_the_curve_s_points_find_their_places_among_the_losses():
    x = jnp.array([0.0, 0.1, 0.3, 0.3, 1.0, 1.0])
    grid = jnp.array([0.0, 0.3, 0.7, 1.0])
    order, places = _quasisep._merge(x, grid)
    together = np.concatenate([x, grid])
    assert sorted(order) == list(range(10)) and (np.diff(together[order]) >= 0).all()
    assert list(order[places]) == [6, 7, 8, 9]
    assert list(places) == [1, 5, 6, 9]


def test_the_paper_s_fit_is_adam_on_the_dense_likelihood():
    x, y = series(80)
    state, _ = compiled(RBF)(
        RBF.init(), padded(x, fill=0.5), padded(y, fill=9.0), jnp.int32(80), KEY
    )
    with jax.enable_x64(True):

        def loss(p):
            noise = 1e-4 + jax.nn.softplus(p[1])
            gram = jax.nn.softplus(p[0]) * rbf(x, x) + noise * jnp.eye(80)
            return likelihood(gram, jnp.asarray(y) - p[2])

        expected = adam(loss, [0.0, np.log(np.expm1(1e-3 - 1e-4)), y.mean()], 100, 0.01)
    np.testing.assert_allclose(state.parameters, expected, rtol=2e-4)


@pytest.mark.slow
def test_the_fit_on_all_losses_is_adam_on_the_dense_likelihood():
    """Two tests in a row: the second goes on where the first has stopped.

    Slow: a dense likelihood and its derivative, by hand.
    """
    x, y = series(300)
    smoother, state = quasisep_smoother(), quasisep_smoother().init()
    for _ in range(2):
        state, _ = jax.jit(smoother.test)(
            state, padded(x, fill=0.1), padded(y, fill=9.0), jnp.int32(300), KEY
        )
    with jax.enable_x64(True):

        def loss(p):
            gram = jnp.exp(p[0]) * _matern52(x, jnp.exp(p[2])) + jnp.exp(p[1]) * jnp.eye(300)
            return likelihood(gram, jnp.asarray(y - y.mean()))

        start = np.log([np.var(y), 0.5 * np.mean(np.diff(y) ** 2), 0.2])

        def bounded(p):
            return p.at[2].set(jnp.clip(p[2], np.log(0.05), 0.0))

        expected = adam(loss, start, 20, 0.1, bounded)
    np.testing.assert_allclose(state.parameters, expected, atol=2e-3)
    assert int(state.fits) == 2


def _matern52(x, scale):
    r = np.sqrt(5.0) * np.abs(x[:, None] - x[None, :]) / scale
    return (1.0 + r + r * r / 3.0) * jnp.exp(-r)


@pytest.mark.parametrize(
    "smoother", [RBF, pytest.param(QUASISEP, marks=pytest.mark.slow)], ids=["rbf", "quasisep"]
)
def test_what_lies_beyond_the_count_does_not_matter(smoother):
    x, y = series(90)
    results = []
    for fill in (0.3, 0.9):
        buffers = padded(x, fill=fill), padded(y, fill=50 * fill)
        found = compiled(smoother)(smoother.init(), *buffers, jnp.int32(90), KEY)
        results.append(found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)


@pytest.mark.parametrize("smoother", [RBF, QUASISEP], ids=["rbf", "quasisep"])
def test_a_bowl_is_past_its_minimum_and_a_slope_is_not(smoother):
    x, bowl = series(400)
    test, args = compiled(smoother), (jnp.int32(400), KEY)
    _, seen = test(smoother.init(), padded(x, fill=0.5), padded(bowl, fill=9.0), *args)
    assert (np.asarray(seen.probability) > 0.99).all()
    np.testing.assert_allclose(seen.location, 0.6, atol=0.06)
    slope = 2.0 - x + 0.15 * np.random.default_rng(1).normal(size=400)
    _, seen = test(smoother.init(), padded(x, fill=0.5), padded(slope, fill=9.0), *args)
    assert (np.asarray(seen.probability) < 0.9).all()
    assert (np.asarray(seen.location) > 0.95).all()


@pytest.mark.slow
def test_a_curve_that_only_rises_has_no_minimum_behind_it():
    """Slow: a fit of each Gaussian process."""
    x = np.arange(80) / 80
    rising = 1.0 + x + 0.05 * np.random.default_rng(0).normal(size=80)
    test = jax.jit(quasisep_smoother().test)
    _, seen = test(quasisep_smoother().init(), padded(x), padded(rising), jnp.int32(80), KEY)
    assert float(seen.location[0]) < 0.05 and float(seen.probability[0]) == 0.0


@pytest.mark.parametrize("progress", slow(0.05, 0.2, 1.0))
def test_early_in_the_warm_up_the_curve_is_stiff(progress):
    """On pure noise, whose likelihood asks for the shortest length scale of all."""
    x, noise = np.arange(60) / 60, np.random.default_rng(4).normal(size=60)
    smoother, state = quasisep_smoother(), quasisep_smoother().init()
    test = jax.jit(smoother.test)
    for _ in range(6):
        state, _ = test(state, padded(x), padded(noise), jnp.int32(60), KEY, progress)
    assert float(jnp.exp(state.parameters[2])) >= min(0.05 / progress**2, 1.0) * (1 - 1e-5)


@pytest.mark.slow
def test_a_curve_that_was_flat_bends_when_the_losses_do():
    """Tests on noise alone leave a variance near zero, from which gradients lead nowhere.

    Slow: two fits of a Gaussian process.
    """
    rng, smoother = np.random.default_rng(0), quasisep_smoother()
    test, state = jax.jit(smoother.test), smoother.init()
    series_ = 2.5 + 0.05 * rng.normal(size=60)
    for count in range(5, 31, 5):
        x = np.arange(60) / count
        state, _ = test(state, padded(x), padded(series_), jnp.int32(count), KEY, count / 60)
    flat = float(jnp.exp(state.parameters[0]))
    assert flat < 2e-3
    series_[30:] -= np.linspace(0, 1.8, 30)
    x = np.arange(60) / 60
    state, _ = test(state, padded(x), padded(series_), jnp.int32(60), KEY, 1.0)
    assert float(jnp.exp(state.parameters[0])) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("module", [_rbf, _quasisep], ids=["rbf", "quasisep"])
def test_they_are_compiled_even_where_jit_is_disabled(module, monkeypatch):
    """Their loops over the losses would run in Python, for minutes.

    Slow: each compiles a Gaussian process a second time.
    """
    plain, traced = module._fit, []

    def fit(state, x, *rest):
        traced.append(isinstance(x, jax.core.Tracer))
        return plain(state, x, *rest)

    monkeypatch.setattr(module, "_fit", fit)
    (x, y), given = series(90), (jnp.int32(90), KEY, 1.0)
    state, test = module._init(), module._test
    with jax.disable_jit():
        plain_ = test(state, padded(x, 200, 0.3), padded(y, 200, 5.0), *given)
    assert traced == [True]
    expected = jax.jit(test)(state, padded(x, 200, 0.3), padded(y, 200, 5.0), *given)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain_, expected
    )


@pytest.mark.parametrize("units", [1e6, *slow(1e-6)])
def test_the_smoother_of_all_losses_answers_alike_in_all_units(units):
    x, y = series(90)
    y, given = y - 1.5 * (x - 0.6) ** 2 * (x > 0.6), (jnp.int32(90), KEY)  # hardly rises
    test, start, x = compiled(QUASISEP), QUASISEP.init(), padded(x, fill=0.3)
    _, seen = test(start, x, padded(units * y, fill=5.0), *given)
    _, expected = test(start, x, padded(y, fill=5.0), *given)
    assert 0.6 < float(expected.probability[0]) < 0.999
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), seen, expected)


def test_the_probability_is_that_of_gaussian_differences():
    rng = np.random.default_rng(3)
    factor = rng.normal(size=(6, 6))
    covariance, mean = factor @ factor.T, rng.normal(size=6)
    posterior = Posterior(*(jnp.float32(v) for v in (mean, np.diag(covariance), covariance[:, -1])))
    samples = rng.multivariate_normal(mean, covariance, size=200_000)
    beaten = (samples[:, :-1] < samples[:, -1:]).mean(axis=0).max()
    standard_error = 0.5 / np.sqrt(len(samples))
    assert abs(float(probability_past_minimum(posterior)) - beaten) < 4 * standard_error


@pytest.mark.slow
def test_the_earliest_point_is_as_low_as_the_lowest_to_two_standard_deviations():
    """Slow: a fit of a Gaussian process."""
    mean = jnp.array([3.0, 1.15, 1.05, 1.0, 4.0])
    seen = draw(jnp.linspace(0, 1, 5), Posterior(mean, jnp.full(5, 0.0025), jnp.zeros(5)))
    assert (float(seen.location), float(seen.earliest)) == (0.75, 0.5)


def test_a_posterior_that_failed_has_no_location():
    nothing = jnp.full(5, jnp.nan)
    seen = draw(jnp.linspace(0, 1, 5), Posterior(nothing, nothing, nothing))
    assert np.isnan(seen.probability) and np.isnan(seen.location)


@pytest.mark.slow
def test_a_fit_that_is_not_finite_keeps_the_parameters_it_had():
    """Slow: a fit of each Gaussian process."""
    x, y = series(60)
    smoother = quasisep_smoother()
    test = jax.jit(smoother.test)
    buffers = padded(x, 64, 0.0), padded(y, 64, 0.0), jnp.int32(60), KEY
    state, _ = test(smoother.init(), *buffers)
    broken = state._replace(
        moments=tuple(v * jnp.nan if v.dtype == jnp.float32 else v for v in state.moments)
    )
    after, seen = test(broken, *buffers)
    np.testing.assert_array_equal(after.parameters, state.parameters)
    assert np.isfinite(seen.probability).all()


@pytest.mark.slow
def test_random_subsets_are_uniform_and_complete():
    """100 of 1000 losses: every loss is as likely as any other; with 100 or fewer, all of them.

    Slow: thousands of draws.
    """
    chosen = [
        np.asarray(_rbf._choose(k, 1200, jnp.int32(1000), 100)) for k in jax.random.split(KEY, 200)
    ]
    assert all(len(set(c)) == 100 and c.max() < 1000 for c in chosen)
    hits = np.bincount(np.concatenate(chosen), minlength=1000)
    deviation = np.sqrt(200 * 0.1 * 0.9)
    assert np.abs(hits - 20).max() < 5 * deviation
    assert abs(hits.var() / deviation**2 - 1) < 0.25
    some = _rbf._choose(KEY, 1200, jnp.int32(37), 100)
    np.testing.assert_array_equal(some[:37], np.arange(37))


def test_thinning_is_even_and_keeps_everything_that_fits():
    for count, size in ((10, 50), (50, 50), (51, 50), (4096, 2000)):
        index, here = (np.asarray(v) for v in _quasisep._thin(jnp.int32(count), 4096, size))
        index = index[here]
        assert len(index) == min(count, size)
        assert index[0] == 0 and index[-1] < count
        assert set(np.diff(index)) <= {count // len(index), count // len(index) + 1}


def test_only_one_column_of_the_covariance_is_formed():
    """500 points given 100 losses: nothing is as large as the 500 × 500 covariance."""

    def posterior(x, y):
        return rbf_smoother().posterior(RBF_FIT, x, y, jnp.int32(100))

    x, y = (jnp.zeros(100) for _ in range(2))
    shapes = {
        v.aval.shape
        for eqn in _equations(jax.make_jaxpr(posterior)(x, y).jaxpr)
        for v in eqn.outvars
    }
    assert (100, 500) in shapes or (500, 100) in shapes or (100, 501) in shapes
    assert max(np.prod(s) for s in shapes) < _posterior_test.NUM_POINTS**2


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
