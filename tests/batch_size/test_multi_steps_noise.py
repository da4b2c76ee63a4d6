"""`adaptive_multi_steps`: noise finer than the micro-batches, and what the criteria need of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import (
    BatchSizeStatus,
    adapt_batch_size,
    coordinate_norm_test,
    get_batch_size,
    inner_product_test,
    merge_noise,
    norm_test,
    split_groups,
    value_and_grad_noise,
)

PARAMS = jnp.zeros(3)
EXAMPLES = np.random.default_rng(0).normal(1.0, 2.0, (32, 3)).astype(np.float32)


NORM, INNER, COORDINATES = norm_test(0.2), inner_product_test(0.1), coordinate_norm_test(0.2)


@functools.cache
def make_optimizer(criterion):
    controller = adapt_batch_size(criterion, initial_batch_size=32, max_batch_size=4096)
    return optax.chain(controller, optax.sgd(0.1))


def loss(w, x):
    return 0.5 * jnp.mean(jnp.sum((w[None] - x) ** 2, axis=-1))


@functools.cache
def measurement(**options):
    return jax.jit(value_and_grad_noise(loss, **options))


def measure(x, num_groups, **options):
    """The noise of half the squared distance to the rows of x."""
    return measurement(**options)(PARAMS, split_groups(x, num_groups))[1]


def test_finer_groups_are_merged_over_the_batch(drop_in):
    run = drop_in(make_optimizer(NORM), PARAMS, micro_batch_size=16)
    for part in np.split(EXAMPLES, 2):
        noise = measure(part, num_groups=16)
        updates = run.feed(noise.mean, noise=noise)
    np.testing.assert_allclose(updates, 0.1 * EXAMPLES.mean(0), rtol=1e-5)
    trace = EXAMPLES.astype(np.float64).var(0, ddof=1).sum()
    np.testing.assert_allclose(run.metrics["noise_numerator"], trace, rtol=1e-5)
    assert int(run.metrics["degrees_of_freedom"]) == 31
    assert int(get_batch_size(run.state)) > 32


def test_with_noise_one_micro_batch_may_be_the_whole_batch(drop_in):
    run = drop_in(make_optimizer(NORM), PARAMS, micro_batch_size=32)
    noise = measure(EXAMPLES, num_groups=8)
    run.feed(noise.mean, noise=noise)
    assert run.emitted
    assert int(run.metrics["degrees_of_freedom"]) == 7


def test_the_size_of_a_call_is_that_of_its_noise(drop_in):
    run = drop_in(make_optimizer(NORM), PARAMS)
    emitted = []
    for part in (EXAMPLES[:20], EXAMPLES[20:24], EXAMPLES[24:]):  # not micro-batches of 8
        noise = measure(part, num_groups=4)
        run.feed(noise.mean, noise=noise)
        emitted.append(run.emitted)
    assert emitted == [False, False, True]
    assert run.metrics["num_examples"] == 32


def test_noise_that_is_not_finite_is_skipped(drop_in):
    run = drop_in(make_optimizer(NORM), PARAMS, micro_batch_size=16)
    good, other = (measure(part, num_groups=4) for part in np.split(EXAMPLES, 2))
    bad = good._replace(scatter=jnp.float32(jnp.nan), mean=good.mean.at[0].set(jnp.nan))
    for noise in (good, bad, other):
        updates = run.feed(noise.mean, noise=noise)
    assert run.emitted
    np.testing.assert_allclose(updates, 0.1 * EXAMPLES.mean(0), rtol=1e-5)
    assert int(run.metrics["skipped_micro_batches"]) == 1


def test_inner_products_work_with_one_call_per_batch(drop_in):
    run = drop_in(make_optimizer(INNER), PARAMS, micro_batch_size=32)
    noise = measure(EXAMPLES, num_groups=32, inner_products=True)
    run.feed(noise.mean, noise=noise)
    expected = 32 * np.ceil(INNER(noise) / 32)  # in whole calls
    assert int(get_batch_size(run.state)) == expected > 32


def test_inner_products_of_several_calls_hold_the_batch_size(drop_in):
    run = drop_in(make_optimizer(INNER), PARAMS, micro_batch_size=16)
    for part in np.split(EXAMPLES, 2):
        noise = measure(part, num_groups=16, inner_products=True)
        run.feed(noise.mean, noise=noise)
    assert run.emitted  # the step itself is taken
    assert int(get_batch_size(run.state)) == 32
    assert int(run.metrics["test_status"]) == BatchSizeStatus.NOT_FINITE


def test_inner_products_cannot_do_without_noise(drop_in):
    run = drop_in(make_optimizer(INNER), PARAMS)
    with pytest.raises(ValueError, match=r"inner_product_test needs .*inner_products=True"):
        run.feed(PARAMS)


def test_coordinates_are_kept_where_asked_for(drop_in):
    run = drop_in(make_optimizer(COORDINATES), PARAMS, coordinate_wise=True)
    parts = np.split(EXAMPLES, 4)
    for part in parts:
        run.feed(-part.mean(0))
    noise = functools.reduce(
        merge_noise, [measure(x, num_groups=1, coordinate_wise=True) for x in parts]
    )
    np.testing.assert_allclose(run.metrics["required_batch_size"], COORDINATES(noise), rtol=1e-4)
    assert int(get_batch_size(run.state)) > 32


def test_coordinates_that_were_not_asked_for_are_an_error(drop_in):
    run = drop_in(make_optimizer(COORDINATES), PARAMS)
    with pytest.raises(ValueError, match=r"coordinate_norm_test needs .*coordinate_wise=True"):
        run.feed(PARAMS)


def test_finer_noise_may_bring_its_coordinates(drop_in):
    run = drop_in(make_optimizer(COORDINATES), PARAMS, micro_batch_size=16,
                  coordinate_wise=True)  # fmt: skip
    for part in np.split(EXAMPLES, 2):
        noise = measure(part, num_groups=16, coordinate_wise=True)
        run.feed(noise.mean, noise=noise)
    whole = measure(EXAMPLES, num_groups=32, coordinate_wise=True)
    required = COORDINATES(whole)
    np.testing.assert_allclose(run.metrics["required_batch_size"], required, rtol=1e-4)
