"""`adapt_batch_size`: what is refused, and that the message names it."""

import jax
import jax.numpy as jnp
import optax
import pytest

import adabatch_jax
from adabatch_jax import (
    GradientNoise,
    adapt_batch_size,
    augmented_inner_product_test,
    cabs,
    coordinate_norm_test,
    gradient_noise_scale,
    inner_product_test,
    norm_test,
)

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
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
        ("ema_decay", float("nan")),
        ("dataset_size", 0),
        ("dataset_size", 10.5),
    ],
)
def test_options_must_lie_in_range(argument, value):
    with pytest.raises(ValueError, match=f"adapt_batch_size: {argument} must .*got {value!r}"):
        adapt_batch_size(norm_test(1.0), **SIZES, **{argument: value})


def test_smoothing_is_another_name_of_the_decay(make_noise):
    noise, states = make_noise(trace=1000), []
    for name in ("ema_decay", "smoothing"):
        link = adapt_batch_size(norm_test(0.5), **SIZES, **{name: 0.9})
        states.append(link.update(noise.mean, link.init(noise.mean), noise=noise)[1])
        with pytest.raises(ValueError, match=rf"{name} must lie in .*, got 1\.0"):
            adapt_batch_size(norm_test(0.5), **SIZES, **{name: 1.0})
    assert states[0].size_memory.evidence_weight > 0
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *states))
    with pytest.raises(ValueError, match=r"give one of them, got ema_decay=0\.9 and smoothing=0"):
        adapt_batch_size(norm_test(0.5), **SIZES, ema_decay=0.9, smoothing=0.0)
    sizes = dict(total_examples=10**5, initial_batch_size=64, max_batch_size=256)
    scaling = adabatch_jax.sqrt_scaling()
    adabatch_jax.automatic(optax.identity(), **sizes, scaling=scaling, smoothing=0.5)


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
    [(coordinate_norm_test(0.5), "coordinate_wise"), (inner_product_test(0.5), "inner_products")],
    ids=["coordinate_norm_test", "inner_product_test"],
)
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_missing_field_is_an_error_at_trace_time(make_noise, criterion, option, ema_decay):
    link = adapt_batch_size(criterion, ema_decay=ema_decay, **SIZES)
    state, noise = link.init(jnp.zeros(2)), make_noise()
    with pytest.raises(ValueError, match=f"{criterion.name} needs .*{option}=True"):
        jax.eval_shape(lambda: link.update(noise.mean, state, noise=noise))


@pytest.mark.parametrize(
    "criterion",
    [
        norm_test(1),
        norm_test(1.5),
        coordinate_norm_test(2.0),
        inner_product_test(1.0),
        augmented_inner_product_test(1.0, 5.84),
    ],
    ids=lambda criterion: criterion.name,
)
def test_an_average_of_the_biased_denominator_that_never_grows_is_refused(criterion):
    with pytest.raises(ValueError, match=rf"ema_decay=0.9 .*{criterion.name} never.*debias=True"):
        adapt_batch_size(criterion, ema_decay=0.9, **SIZES)
    adapt_batch_size(criterion, ema_decay=0.9, debias=True, **SIZES)
    adapt_batch_size(criterion, ema_decay=0.0, **SIZES)


@pytest.mark.parametrize(
    "criterion",
    [
        norm_test(0.9),
        coordinate_norm_test(0.9),
        augmented_inner_product_test(0.9, 5.84),
        augmented_inner_product_test(2.0, 0.9),
        gradient_noise_scale(0.1),
        cabs(0.1),
        lambda noise: 64.0,
    ],
)
def test_an_average_that_can_grow_is_taken(criterion):
    adapt_batch_size(criterion, ema_decay=0.9, **SIZES)


def test_a_traced_threshold_is_let_through():
    def smallest(eta):
        link = adapt_batch_size(norm_test(eta), ema_decay=0.9, **SIZES)
        return link.init(jnp.zeros(2)).next_batch_size

    assert int(jax.jit(smallest)(1.0)) == 64


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (jnp.ones(1), r"shape \(1,\)"),
        (jnp.ones((2, 3)), r"shape \(2, 3\)"),
        ((1.0, {"a": 1}), "a tuple"),
    ],
)
def test_a_value_that_is_no_scalar_is_named(make_noise, value, got):
    link, noise = adapt_batch_size(cabs(0.1), **SIZES), make_noise()
    state = link.init(noise.mean)
    with pytest.raises(ValueError, match=f"value= must be a scalar, the mean over.*got {got}"):
        link.update(noise.mean, state, noise=noise, value=value)


def test_a_criterion_must_give_a_scalar(make_noise):
    noise = make_noise()
    link = adapt_batch_size(lambda n: jnp.ones(3), **SIZES)
    with pytest.raises(ValueError, match=r"must give a scalar, got shape \(3,\)"):
        link.update(noise.mean, link.init(noise.mean), noise=noise)


@pytest.mark.parametrize("wrong", ["keys", "shapes"])
def test_noise_of_other_parameters_is_a_sentence(wrong):
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    other = (
        {"a": jnp.ones(2), "c": jnp.ones(3)} if wrong == "keys" else {**params, "b": jnp.ones(4)}
    )
    noise = GradientNoise(other, jnp.float32(1), jnp.int32(64), jnp.int32(8), other)
    link = optax.masked(
        adapt_batch_size(norm_test(0.5), **SIZES), {"a": True, "b": wrong == "shapes"}
    )
    link = link if wrong == "keys" else adapt_batch_size(coordinate_norm_test(0.5), **SIZES)
    with pytest.raises(ValueError, match="noise= is of another structure than the updates"):
        link.update(params, link.init(params), params, noise=noise)


@pytest.mark.parametrize(
    ("multiple", "message"),
    [(48, r"no multiple of 96 .*multiple_of=32\) fits below max_batch_size=64"),
     (0, "batch_size_multiple must be a positive integer, got 0"),
     (2.5, "batch_size_multiple must be a positive integer, got 2.5")],
)  # fmt: skip
def test_calls_larger_than_the_largest_batch_are_refused(make_noise, multiple, message):
    noise = make_noise()
    link = adapt_batch_size(norm_test(0.5), **SIZES | {"max_batch_size": 64}, multiple_of=32)
    with pytest.raises(ValueError, match=message):
        link.update(noise.mean, link.init(noise.mean), noise=noise, batch_size_multiple=multiple)


def test_a_traced_batch_size_multiple_is_named(make_noise):
    noise, link = make_noise(), adapt_batch_size(norm_test(0.5), **SIZES)
    with pytest.raises(ValueError, match="batch_size_multiple must be a Python int"):
        jax.jit(link.update)(noise.mean, link.init(noise.mean), noise=noise, batch_size_multiple=8)
