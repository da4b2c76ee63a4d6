"""Criteria: the batch size that one gradient asks for, by hand and against NumPy."""

import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from adabatch_jax import (
    GradientNoise,
    augmented_inner_product_test,
    cabs,
    coordinate_norm_test,
    gradient_noise_scale,
    inner_product_test,
    norm_test,
    value_and_grad_noise,
)


@jax.jit
def noise_of(x):
    """The noise of a batch whose single examples have the gradients -x, a dict of [n, …]."""

    def loss(w, group):
        return 0.5 * sum(jnp.sum((w[k] - group[k][0]) ** 2) for k in w)

    zeros = {k: jnp.zeros(v.shape[1:]) for k, v in x.items()}
    groups = {k: v[:, None] for k, v in x.items()}
    return value_and_grad_noise(loss, coordinate_wise=True, inner_products=True)(zeros, groups)[1]


class Dense:
    """The definitions, in float64, from the gradients of single examples [n, d]."""

    def __init__(self, gradients):
        g = np.asarray(gradients, np.float64)
        n = len(g)
        self.mean, self.variance = g.mean(0), g.var(0, ddof=1)
        self.square = self.mean @ self.mean
        along = g @ self.mean
        self.trace = (np.sum(g**2) - n * self.square) / (n - 1)
        self.along = (np.sum(along**2) - n * self.square**2) / (n - 1)
        self.across = (np.sum(g**2) - np.sum(along**2) / self.square) / (n - 1)


@pytest.fixture(scope="session")
def layers():
    """Two layers whose gradients share a factor; the noise, and the dense statistics."""

    def draw(seed):
        rng = np.random.default_rng(seed)
        common = rng.normal(size=(40, 1))
        one, two = (1.0 + common + 0.5 * rng.normal(size=(40, d)) for d in (3, 4))
        one, two = one.astype(np.float32), two.astype(np.float32)
        noise = noise_of({"one": one, "two": two.reshape(40, 2, 2)})
        return noise, Dense(-np.concatenate([one, two], 1)), -one, -two

    return draw


def test_norm_test_by_hand(make_noise):
    assert float(norm_test(0.5)(make_noise(trace=10, square=4))) == 10.0  # 10 / (0.25 · 4)


def test_inner_product_test_by_hand(make_noise):
    noise = make_noise(trace=10, square=4, along=8)
    assert float(inner_product_test(0.5)(noise)) == 2.0  # 8 / (0.25 · 4²)


@pytest.mark.parametrize(
    ("theta", "nu", "required"),
    [(0.5, 10.0, 2.0), (10.0, 0.5, 8.0)],  # 8 / (0.25 · 4²) and (10 − 8/4) / (0.25 · 4)
    ids=["along_decides", "across_decides"],
)
def test_augmented_test_by_hand(make_noise, theta, nu, required):
    noise = make_noise(trace=10, square=4, along=8)
    np.testing.assert_allclose(augmented_inner_product_test(theta, nu)(noise), required, rtol=1e-6)


def test_gradient_noise_scale_by_hand(make_noise):
    noise = make_noise(trace=128, square=4, num_examples=64)
    assert float(gradient_noise_scale()(noise)) == 64.0  # 128 / (4 − 128/64)
    assert float(gradient_noise_scale(0.25)(noise)) == 16.0


def test_gradient_noise_scale_without_signal_is_infinite(make_noise):
    noise = make_noise(trace=256, square=4, num_examples=64)  # the estimate of ‖∇F‖² is 0
    assert np.isinf(gradient_noise_scale()(noise))


CRITERIA = (
    norm_test(0.3),
    coordinate_norm_test(0.3, quantile=1.0, floor=0.0),
    coordinate_norm_test(0.3, quantile=0.5, floor=0.0),
    coordinate_norm_test(0.3),
    inner_product_test(0.3),
    augmented_inner_product_test(0.3, 0.3),
    gradient_noise_scale(),
)
required_by_all = jax.jit(lambda noise: [criterion(noise) for criterion in CRITERIA])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_criterion_matches_numpy(layers, seed):
    noise, dense, *_ = layers(seed)
    ratios = dense.variance / dense.mean**2
    lowest = 0.1**2 * np.mean(dense.mean**2)
    floored = dense.variance / np.maximum(dense.mean**2, lowest)
    along, across = dense.along / (0.3 * dense.square) ** 2, dense.across / (0.09 * dense.square)
    expected = [
        dense.trace / (0.09 * dense.square),
        ratios.max() / 0.09,
        np.sort(ratios)[3] / 0.09,  # of seven coordinates
        np.sort(floored)[6] / 0.09,
        along,
        max(along, across),
        dense.trace / (dense.square - dense.trace / 40),
    ]
    np.testing.assert_allclose(required_by_all(noise), expected, rtol=1e-4)


def test_the_trace_is_the_part_along_plus_the_part_across(layers):
    noise, dense, *_ = layers(0)
    along = noise.variance(noise.inner_product_scatter) / noise.squared_norm
    np.testing.assert_allclose(noise.trace, along + dense.across, rtol=1e-5)
    evidence = augmented_inner_product_test(1.0, 1.0).evidence(noise)
    np.testing.assert_allclose(evidence.numerator[0], dense.along / dense.square, rtol=1e-4)
    np.testing.assert_allclose(evidence.numerator[1], dense.across, rtol=1e-4)


def test_inner_products_see_the_covariance_between_layers(layers):
    noise, dense, one, two = layers(0)
    inner = [np.float64(g) @ np.float64(g).mean(0) for g in (one, two)]
    per_tensor = sum(x.var(ddof=1) for x in inner)  # what the authors' code computes
    between = 2 * np.cov(*inner)[0, 1]
    whole = noise.variance(noise.inner_product_scatter)
    np.testing.assert_allclose(whole, per_tensor + between, rtol=1e-4)
    assert between > 0.3 * dense.along  # with a common factor it is no small part


@pytest.fixture(scope="session")
def coordinates():
    """Noise with these gradients and variances, coordinate by coordinate."""

    def make(mean, variance):
        mean, variance = jnp.asarray(mean, jnp.float32), jnp.asarray(variance, jnp.float32)
        return GradientNoise(mean, 7 * variance.sum(), jnp.int32(16), jnp.int32(8), 7 * variance)

    return make


def test_the_raw_coordinate_test_is_the_maximum(coordinates):
    raw = coordinate_norm_test(0.5, quantile=1.0, floor=0.0)
    assert float(raw(coordinates([1.0, 2.0, 0.5], [1.0, 1.0, 1.0]))) == 16.0  # 1 / (0.25 · 0.25)
    assert np.isinf(raw(coordinates([1.0, 2.0, 0.0], [1.0, 1.0, 1e-6])))


def test_the_quantile_passes_over_the_worst_coordinates(coordinates):
    noise = coordinates([1.0, 1.0, 1.0, 0.0], [1.0, 2.0, 3.0, 1.0])
    for quantile, required in [(0.25, 1.0), (0.5, 2.0), (0.75, 3.0), (1.0, np.inf)]:
        criterion = jax.jit(coordinate_norm_test(1.0, quantile=quantile, floor=0.0))
        np.testing.assert_allclose(criterion(noise), required, rtol=1e-6)


def test_the_floor_bounds_what_a_small_gradient_asks_for(coordinates):
    noise = coordinates([2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])  # root mean square 1
    criterion = coordinate_norm_test(1.0, quantile=1.0, floor=0.5)
    assert float(criterion(noise)) == 4.0  # 1 / 0.5²


def test_nothing_over_nothing_passes(make_noise, coordinates):
    nothing = make_noise(trace=0, square=0, along=0)
    for criterion in (norm_test(1.0), inner_product_test(1.0), gradient_noise_scale()):
        assert float(criterion(nothing)) == 0.0
    assert float(augmented_inner_product_test(1.0, 1.0)(nothing)) == 0.0
    dead = coordinates([0.0, 1.0, 0.0], [0.0, 2.0, 0.0])
    assert float(coordinate_norm_test(1.0, quantile=1.0, floor=0.0)(dead)) == 2.0


def test_variance_without_gradient_asks_for_everything(make_noise):
    nothing = make_noise(trace=1, square=0, along=1)
    assert np.isinf(norm_test(1.0)(nothing))
    assert np.isinf(inner_product_test(1.0)(nothing))


def test_one_group_says_nothing(make_noise):
    assert np.isnan(norm_test(1.0)(make_noise(num_groups=1)))


@pytest.mark.parametrize(
    ("criterion", "field", "option"),
    [
        (coordinate_norm_test(1.0), "coordinate_scatter", "coordinate_wise"),
        (inner_product_test(1.0), "inner_product_scatter", "inner_products"),
        (augmented_inner_product_test(1.0, 1.0), "inner_product_scatter", "inner_products"),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_a_missing_field_names_criterion_and_option(make_noise, criterion, field, option):
    with pytest.raises(ValueError, match=rf"{criterion.name}.*noise\.{field}.*{option}=True"):
        criterion(make_noise())


def test_a_threshold_may_be_traced(make_noise):
    required = jax.jit(lambda eta, noise: norm_test(eta)(noise))(0.5, make_noise(trace=10))
    assert float(required) == 40.0


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), None, True, "1"])
@pytest.mark.parametrize(
    ("factory", "argument"),
    [
        (norm_test, "eta"),
        (coordinate_norm_test, "eta"),
        (inner_product_test, "theta"),
        (lambda x: augmented_inner_product_test(x, 1.0), "theta"),
        (lambda x: augmented_inner_product_test(1.0, x), "nu"),
        (gradient_noise_scale, "multiple"),
    ],
    ids=["norm", "coordinate", "inner_product", "augmented_theta", "augmented_nu", "noise_scale"],
)
def test_a_threshold_must_be_a_positive_number(factory, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a positive number, got {value!r}"):
        factory(value)


@pytest.mark.parametrize("value", [[1.0], 1j, np.ones(2)], ids=str)
def test_a_threshold_of_another_kind_is_refused_like_a_bad_number(value):
    with pytest.raises(
        ValueError, match=re.escape(f"eta must be a positive number, got {value!r}")
    ):
        norm_test(value)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"quantile": 0.0}, "quantile"),
        ({"quantile": 1.01}, "quantile"),
        ({"floor": -0.1}, "floor"),
        ({"floor": float("inf")}, "floor"),
    ],
)
def test_quantile_and_floor_must_lie_in_range(options, argument):
    with pytest.raises(ValueError, match=f"coordinate_norm_test: {argument} must"):
        coordinate_norm_test(1.0, **options)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "criterion",
    [
        norm_test(0.5),
        coordinate_norm_test(0.5, quantile=1.0),
        inner_product_test(0.5),
        augmented_inner_product_test(0.5, 0.5),
        gradient_noise_scale(),
        cabs(0.25),
    ],
    ids=lambda criterion: criterion.name,
)
def test_whatever_the_dtype_of_the_gradient_the_numbers_are_float32(criterion, dtype):
    noise = GradientNoise(
        jnp.array([5.0], dtype), jnp.float32(700), jnp.int32(64), jnp.int32(8),
        jnp.array([700.0]), jnp.float32(25 * 700),
    )  # fmt: skip
    real = noise._replace(mean=jnp.array([5.0], jnp.float32))
    read = {name: jnp.float16(2.0) for name in criterion.reads}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(criterion.evidence(noise, **read)))
    required = criterion(noise, **read)
    assert required.dtype == jnp.float32
    assert float(required) == float(criterion(real, **read))


def test_the_square_of_a_complex_coordinate_is_that_of_its_two_parts():
    noise = GradientNoise(
        jnp.array([3 + 4j, 5 + 0j]), jnp.float32(1050), jnp.int32(64), jnp.int32(8),
        jnp.array([700.0, 350.0]),
    )  # fmt: skip
    required = float(coordinate_norm_test(0.5, quantile=1.0)(noise))
    np.testing.assert_allclose(required, 16, rtol=1e-6)  # 100 / (0.25 · 25)
