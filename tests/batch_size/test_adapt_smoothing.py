"""`adapt_batch_size(ema_decay=…)`: numerator and denominator are averaged apart."""

from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

from adabatch_jax import (
    GradientNoise,
    adapt_batch_size,
    coordinate_norm_test,
    get_batch_size,
    metrics,
    norm_test,
)
from tests.marks import slow


def averaged(values, decay):
    """The exponential average of values [steps, …], corrected for its start, in float64."""
    total, weight = 0.0, 0.0
    for value in np.asarray(values, np.float64):
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
    return total / weight


@pytest.mark.parametrize("debias", [False, True])
def test_numerator_and_denominator_match_numpy(controller, make_noise, debias):
    rng = np.random.default_rng(0)
    traces, squares = rng.gamma(4, 20, 12), rng.gamma(4, 1, 12)
    control = controller(norm_test(0.7), ema_decay=0.8, debias=debias, monotone=False)
    for k in range(12):
        control.feed(make_noise(trace=traces[k], square=squares[k], num_examples=100))
        denominators = squares - traces / 100 if debias else squares
        numerator = averaged(traces[: k + 1], 0.8)
        denominator = averaged(denominators[: k + 1], 0.8)
        shown = control.metrics
        np.testing.assert_allclose(shown["noise_numerator"], numerator, rtol=1e-5)
        np.testing.assert_allclose(shown["noise_denominator"], denominator, rtol=1e-5)
        required = numerator / (0.49 * denominator)
        np.testing.assert_allclose(shown["required_batch_size"], required, rtol=1e-5)
        assert control.batch_size == np.ceil(np.clip(required, 1, 8192))


def test_no_decay_is_no_smoothing(controller, make_noise):
    plain, smoothed = (controller(norm_test(1.0), ema_decay=s) for s in (None, 0.0))
    for trace in (100, 50, 400):
        assert smoothed.feed(make_noise(trace=trace)) == plain.feed(make_noise(trace=trace))


def test_one_estimate_that_is_not_positive_does_not_count_alone(controller, make_noise):
    control = controller(norm_test(1.0), ema_decay=0.9, debias=True)
    control.feed(make_noise(trace=64, square=4))  # denominator 4 − 64/64 = 3
    size = control.feed(make_noise(trace=128, square=1))  # 1 − 128/64 = −1: alone it would double
    assert size == 110  # ⌈(0.09 · 64 + 0.1 · 128) / (0.09 · 3 − 0.1 · 1)⌉


def test_coordinates_are_averaged_one_by_one(controller):
    rng = np.random.default_rng(1)
    means, scatters = rng.normal(size=(6, 5)), rng.gamma(2, 100, (6, 5))
    params = {"a": jnp.zeros(2), "b": jnp.zeros((1, 3))}
    criterion = coordinate_norm_test(0.5, quantile=0.6, floor=0.0)
    control = controller(criterion, params, ema_decay=0.8, monotone=False)

    def tree(x):
        x = jnp.asarray(x, jnp.float32)
        return {"a": x[:2], "b": x[2:].reshape(1, 3)}

    for mean, scatter in zip(means, scatters, strict=True):
        noise = GradientNoise(
            tree(mean), jnp.float32(scatter.sum()), jnp.int32(64), jnp.int32(8), tree(scatter)
        )
        control.feed(noise)
    ratios = averaged(scatters / 7, 0.8) / averaged(means**2, 0.8)
    required = np.sort(ratios)[2] / 0.25  # three of five coordinates pass
    np.testing.assert_allclose(control.metrics["required_batch_size"], required, rtol=1e-5)
    assert control.batch_size == np.ceil(required)


@pytest.mark.parametrize("ema_decay", [None, *slow(0.8)])
@pytest.mark.parametrize(
    ("criterion", "size"), [(coordinate_norm_test(0.5, quantile=1.0), 400), (norm_test(0.5), 340)]
)
def test_inside_a_mask_the_noise_is_that_of_what_is_let_through(criterion, size, ema_decay):
    params = {"seen": jnp.ones(2), "hidden": jnp.ones(3)}
    variance = {"seen": jnp.array([100.0, 70.0]), "hidden": jnp.full(3, 1e6)}
    scatter = {k: 7 * v for k, v in variance.items()}
    total = sum(x.sum() for x in scatter.values())
    noise = GradientNoise(params, total, jnp.int32(64), jnp.int32(8), scatter)
    link = adapt_batch_size(
        criterion, initial_batch_size=64, max_batch_size=8192, ema_decay=ema_decay
    )
    masked = optax.masked(link, {"seen": True, "hidden": False})
    _, state = jax.jit(masked.update)(params, masked.init(params), noise=noise)
    assert int(get_batch_size(state)) in (size, size + 1)  # rounding up, on either side
    np.testing.assert_allclose(metrics(state)["noise_scale"], np.inf)  # 2 − 170/64 < 0


def test_what_is_masked_counts_where_its_noise_cannot_be_told_apart(make_noise):
    noise = make_noise(trace=100)._replace(mean={"seen": jnp.ones(1), "hidden": jnp.zeros(3)})
    link = adapt_batch_size(norm_test(1.0), initial_batch_size=64, max_batch_size=8192)
    masked = optax.masked(link, {"seen": True, "hidden": False})
    for hidden, size in ((0.0, 100), (1.0, 64)):  # ‖ḡ‖² = 1 or 4
        mean = noise.mean | {"hidden": jnp.full(3, hidden)}
        state = masked.init(mean)
        _, state = jax.jit(masked.update)(mean, state, noise=noise._replace(mean=mean))
        assert int(get_batch_size(state)) == size


@pytest.fixture(scope="session")
def smoothed(controller):
    """Controllers on an average of the biased and of the de-biased denominator, by η."""
    return {
        (eta, debias): controller(
            replace(norm_test(eta), needs_debias=False), ema_decay=0.9, debias=debias
        )
        for eta in (1.0, 1.5)
        for debias in (False, True)
    }


@settings(max_examples=25)
@given(noise_scale=st.floats(1.0, 1e5), square=st.floats(1e-3, 1e3))
@pytest.mark.parametrize("eta", [1.0, 1.5])
def test_a_biased_average_never_grows_at_eta_of_one_or_more(
    smoothed, make_noise, eta, noise_scale, square
):
    """T ≈ (b/η²) · N/(b + N) < b, whatever the noise scale N; without the bias T = N/η².

    That is why it is refused, unless somebody says otherwise.
    """

    def settled(debias):
        control = smoothed[eta, debias]
        control.state = control.link.init(jnp.zeros(2))
        for _ in range(3):  # what the estimates are on average
            size, trace = control.batch_size, noise_scale * square
            control.feed(make_noise(trace, square + trace / size, num_examples=size))
        return control.batch_size

    assert settled(debias=False) == 64
    target = np.clip(noise_scale / eta**2, 64, 8192)
    assert abs(settled(debias=True) - target) <= 1 + 0.01 * target
