"""`Criterion`: numerator and denominator stay apart, and are corrected apart."""

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax import GradientNoise, gradient_noise_scale, norm_test
from adabatch_jax.batch_size import Criterion, Evidence
from adabatch_jax.batch_size._criterion import corrected


def test_the_debiased_denominator_is_unbiased_and_the_plain_one_is_not():
    true, deviation, examples, groups = np.array([1.0, -0.5, 0.25]), 3.0, 32, 8
    always, asked, plain = (
        (gradient_noise_scale(), False),
        (norm_test(1.0), True),
        (norm_test(1.0), False),
    )

    def one(key):
        noise = jax.random.normal(key, (groups, 3)) * deviation / np.sqrt(examples / groups)
        means = noise + jnp.asarray(true)[None]
        scatter = examples / groups * jnp.sum((means - means.mean(0)[None]) ** 2)
        noise = GradientNoise(means.mean(0), scatter, jnp.int32(examples), jnp.int32(groups))
        return [
            corrected(c, c.evidence(noise), noise, debias=d)[1] for c, d in (always, asked, plain)
        ]

    keys = jax.random.split(jax.random.key(1), 20000)
    samples = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
    errors = samples.mean(1) - true @ true
    in_standard_errors = np.abs(errors) / (samples.std(1) / np.sqrt(len(keys)))
    assert np.all(in_standard_errors[:2] < 4)
    assert in_standard_errors[2] > 40
    np.testing.assert_allclose(errors[2], 3 * deviation**2 / examples, rtol=0.05)  # tr Σ / b


def test_the_population_factor_is_of_the_bias_alone(make_noise):
    noise = make_noise(trace=128, square=4, num_examples=64)
    criterion = norm_test(1.0)
    evidence = criterion.evidence(noise)
    assert corrected(criterion, evidence, noise, population=0.5) == (128.0, 4.0)
    assert corrected(criterion, evidence, noise, population=0.5, debias=True) == (128.0, 3.0)


def test_a_criterion_of_ones_own(make_noise):
    mine = Criterion("mine", lambda n: Evidence(n.trace, n.squared_norm, n.trace), scale=0.01)
    assert float(mine(make_noise(trace=2, square=4))) == 50.0


def test_the_required_size_is_numerator_over_scaled_denominator():
    criterion = Criterion("mine", lambda noise: None, scale=0.25)
    required = [float(criterion.required(*map(jnp.float32, x))) for x in ((6, 3), (0, 3), (-1, 3))]
    assert required == [8.0, 0.0, 0.0]


def test_without_a_positive_denominator_only_no_variance_passes():
    criterion = Criterion("mine", lambda noise: None)
    required = [float(criterion.required(*map(jnp.float32, x))) for x in ((0, 0), (1, 0), (1, -1))]
    assert required == [0.0, np.inf, np.inf]
