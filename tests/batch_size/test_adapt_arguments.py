"""`adapt_batch_size`: what is refused, and that the message names it."""

import jax
import jax.numpy as jnp
import pytest

from adabatch_jax import adapt_batch_size, coordinate_norm_test, inner_product_test, norm_test

SIZES = {"initial_batch_size": 64, "max_batch_size": 8192}


@pytest.mark.parametrize("value", [0, -4, 2.5, None, "8", float("nan"), True])
@pytest.mark.parametrize(
    "argument",
    ["initial_batch_size", "max_batch_size", "min_batch_size", "multiple_of", "test_interval"],
)
def test_sizes_must_be_positive_integers(argument, value):
    with pytest.raises(ValueError, match=f"adapt_batch_size: {argument} must .*got {value!r}"):
        adapt_batch_size(norm_test(1.0), **SIZES | {argument: value})


@pytest.mark.parametrize(
    "sizes",
    [
        {"initial_batch_size": 64, "max_batch_size": 32},
        {"initial_batch_size": 64, "max_batch_size": 128, "min_batch_size": 65},
        {"initial_batch_size": 64, "max_batch_size": 2**30 + 1},
    ],
    ids=["initial_above_maximum", "minimum_above_initial", "maximum_too_large"],
)
def test_sizes_must_be_in_order(sizes):
    with pytest.raises(ValueError, match="min_batch_size ≤ initial_batch_size ≤ max_batch_size"):
        adapt_batch_size(norm_test(1.0), **sizes)


@pytest.mark.parametrize("name", ["initial_batch_size", "max_batch_size"])
def test_the_multiple_must_divide_the_sizes(name):
    sizes = {"initial_batch_size": 64, "max_batch_size": 128} | {name: 100}
    with pytest.raises(ValueError, match=f"multiple_of=32 does not divide {name}=100"):
        adapt_batch_size(norm_test(1.0), **sizes, multiple_of=32)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("growth_limit", 1.0),
        ("growth_limit", 0.5),
        ("growth_limit", -1.0),
        ("growth_limit", float("inf")),
        ("smoothing", 1.0),
        ("smoothing", -0.1),
        ("smoothing", float("nan")),
        ("dataset_size", 0),
        ("dataset_size", 10.5),
    ],
)
def test_options_must_lie_in_range(argument, value):
    with pytest.raises(ValueError, match=f"adapt_batch_size: {argument} must .*got {value!r}"):
        adapt_batch_size(norm_test(1.0), **SIZES, **{argument: value})


@pytest.mark.parametrize("criterion", [None, 0.5, "norm"])
def test_the_criterion_must_be_one(criterion):
    with pytest.raises(ValueError, match=f"criterion must be a criterion, got {criterion!r}"):
        adapt_batch_size(criterion, **SIZES)


def test_a_plain_function_cannot_be_debiased():
    with pytest.raises(ValueError, match=r"debias=True needs a criterion .*plain function"):
        adapt_batch_size(lambda noise: 1.0, debias=True, **SIZES)


def test_a_missing_noise_says_how_to_pass_it():
    link = adapt_batch_size(norm_test(1.0), **SIZES)
    state = link.init(jnp.zeros(2))
    with pytest.raises(ValueError, match=r"adapt_batch_size .*noise=noise.*adaptive_multi_steps"):
        jax.jit(link.update)(jnp.zeros(2), state)


@pytest.mark.parametrize(
    ("criterion", "option"),
    [(coordinate_norm_test(1.0), "coordinate_wise"), (inner_product_test(1.0), "inner_products")],
    ids=["coordinate_norm_test", "inner_product_test"],
)
@pytest.mark.parametrize("smoothing", [None, 0.9])
def test_a_missing_field_is_an_error_at_trace_time(make_noise, criterion, option, smoothing):
    link = adapt_batch_size(criterion, smoothing=smoothing, **SIZES)
    state, noise = link.init(jnp.zeros(2)), make_noise()
    with pytest.raises(ValueError, match=f"{criterion.name} needs .*{option}=True"):
        jax.eval_shape(lambda: link.update(noise.mean, state, noise=noise))
