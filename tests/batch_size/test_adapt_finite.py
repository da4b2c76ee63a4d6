"""`adapt_batch_size(dataset_size=…)`: the batch that is asked for passes the test."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import (
    GradientNoise,
    batch_size_schedule,
    cabs,
    coordinate_norm_test,
    gradient_noise_scale,
    inner_product_test,
    norm_test,
)
from tests.marks import slow

N = 1000


def at_its_expectation(noise_scale, size):
    """‖∇F‖² = 1 and the mean of `size` out of N examples, all of it along one of two coordinates."""
    square = 1 + noise_scale * (N - size) / (size * N)
    scatter = jnp.float32(7 * noise_scale)
    return GradientNoise(
        jnp.array([np.sqrt(square), 0.0], jnp.float32), scatter, jnp.int32(size), jnp.int32(8),
        jnp.stack([scatter, jnp.float32(0)]), scatter * square,
    )  # fmt: skip


CRITERIA = {
    "norm": (norm_test(1.0), {"debias": True}),
    "coordinate": (coordinate_norm_test(1.0), {"debias": True}),
    "inner": (inner_product_test(1.0), {"debias": True}),
    "noise scale": (gradient_noise_scale(), {}),
    "cabs": (cabs(0.5), {}),
    "function": (lambda noise: noise.trace, {}),
}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("monotone", [False, *slow(True)])
def test_one_test_finds_the_size_that_passes_it(controller, name, monotone):
    """T n/(n + T), whatever the present size is: no cycle, no overshoot."""
    criterion, options = CRITERIA[name]
    control = controller(criterion, monotone=monotone, dataset_size=N, initial_batch_size=16,
                         max_batch_size=N, min_batch_size=8, **options)  # fmt: skip
    for noise_scale in (500, 900, 1100, 3000):
        right = noise_scale * N / (N + noise_scale)
        for _ in range(3):
            size = control.feed(at_its_expectation(noise_scale, control.batch_size), value=0.5)
            assert abs(size - right) <= 1.01
    np.testing.assert_allclose(control.metrics["required_batch_size"], right, rtol=1e-4)
    np.testing.assert_allclose(control.metrics["noise_scale"], 3000, rtol=0.6)


@pytest.mark.parametrize("size", [3, 12, *slow(6, 11)])
def test_the_debiased_denominator_is_unbiased_over_all_samples(controller, size):
    """Over every subset of twelve examples the mean of ‖ḡ‖² − tr/b · (n − b)/n is ‖∇F‖²."""
    gradients = np.random.default_rng(0).normal(size=(12, 3)) + 0.5
    control = controller(norm_test(1.0), jnp.zeros(3), debias=True, dataset_size=12,
                         initial_batch_size=size, min_batch_size=1, monotone=False)  # fmt: skip
    first, found = control.state, []
    for chosen in itertools.combinations(range(12), size):
        mine = gradients[list(chosen)]
        mean, scatter = mine.mean(0), ((mine - mine.mean(0)) ** 2).sum()
        control.state = first
        control.feed(
            GradientNoise(
                jnp.asarray(mean, jnp.float32),
                jnp.float32(scatter),
                jnp.int32(size),
                jnp.int32(size),
            )
        )
        found.append(float(control.metrics["noise_denominator"]))
    np.testing.assert_allclose(np.mean(found), (gradients.mean(0) ** 2).sum(), rtol=1e-5)


@pytest.mark.parametrize(("trace", "size"), [(1e9, 127), (256, 85), (1, 64)])
def test_a_test_never_asks_for_more_than_all_data(controller, make_noise, trace, size):
    control = controller(norm_test(1.0), dataset_size=127)
    assert control.feed(make_noise(trace=trace)) == size


def test_without_a_positive_denominator_the_batch_doubles_up_to_all_data(controller, make_noise):
    control = controller(norm_test(1.0), dataset_size=150, debias=True)
    sizes = [control.feed(make_noise(trace=1e6)) for _ in range(3)]
    assert sizes == [128, 150, 150]


def test_a_ramp_is_what_it_says(controller, make_noise):
    control = controller(batch_size_schedule(lambda seen: 100.0), dataset_size=70)
    assert control.feed(make_noise()) == 100
