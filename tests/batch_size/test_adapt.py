"""`adapt_batch_size`: how a test moves the batch size, option by option."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import BatchSizeStatus, adapt_batch_size, get_batch_size, metrics, norm_test

ETA = norm_test(1.0)  # with ‖ḡ‖² = 1 the required batch size is tr Σ


def test_the_batch_grows_to_what_the_criterion_requires(controller, make_noise):
    control = controller(norm_test(0.5))
    assert control.feed(make_noise(trace=100.2, square=4)) == 101  # ⌈100.2 / (0.25 · 4)⌉
    assert control.status is BatchSizeStatus.CHANGED
    shown = control.metrics
    np.testing.assert_allclose(shown["required_batch_size"], 100.2, rtol=1e-6)
    np.testing.assert_allclose(shown["noise_numerator"], 100.2, rtol=1e-6)
    assert float(shown["noise_denominator"]) == 4.0
    assert int(shown["degrees_of_freedom"]) == 7


def test_a_batch_that_is_large_enough_stays(controller, make_noise):
    control = controller(ETA)
    assert control.feed(make_noise(trace=64)) == 64
    assert control.status is BatchSizeStatus.PASSED


def test_the_next_size_starts_from_the_last(controller, make_noise):
    control = controller(ETA)
    sizes = [control.feed(make_noise(trace=t)) for t in (100, 80, 300)]
    assert sizes == [100, 100, 300]


def test_updates_pass_through_untouched(make_noise):
    link = adapt_batch_size(ETA, initial_batch_size=64, max_batch_size=128)
    updates = {"a": jnp.array([1.5, jnp.nan]), "b": jnp.ones((), jnp.bfloat16)}
    after, _ = link.update(updates, link.init(updates), noise=make_noise())
    assert after["a"] is updates["a"]
    assert after["b"] is updates["b"]


def test_the_maximum_bounds_the_batch_and_switches_the_test_off(controller, make_noise):
    control = controller(ETA, max_batch_size=128)
    assert control.feed(make_noise(trace=1e9)) == 128
    assert control.status is BatchSizeStatus.CHANGED
    nan = make_noise(trace=np.nan)
    assert control.feed(nan) == 128
    assert control.status is BatchSizeStatus.AT_MAXIMUM
    assert int(control.metrics["skipped_tests"]) == 0  # NaN was not even looked at
    assert control.metrics["required_batch_size"] == control.metrics["degrees_of_freedom"] == 0


def test_without_monotone_the_test_goes_on_at_the_maximum(controller, make_noise):
    control = controller(ETA, max_batch_size=128, monotone=False)
    assert [control.feed(make_noise(trace=t)) for t in (1e9, 1e9, 70)] == [128, 128, 70]


def test_without_monotone_the_batch_shrinks_to_its_minimum(controller, make_noise):
    control = controller(ETA, monotone=False, min_batch_size=16)
    assert [control.feed(make_noise(trace=t)) for t in (40, 20, 1, 0)] == [40, 20, 16, 16]


@pytest.mark.parametrize(("trace", "size"), [(65, 96), (96, 96), (97, 128), (500, 256)])
def test_sizes_are_rounded_up_to_a_multiple(controller, make_noise, trace, size):
    control = controller(ETA, multiple_of=32, max_batch_size=256)
    assert control.feed(make_noise(trace=trace)) == size


@pytest.mark.parametrize(
    ("required", "size"),
    [(100.00002, 100), (100.001, 101), (2.0**20 + 1, 2**20 + 1), (2.0**23, 2**23)],
)
def test_an_integer_that_a_gpu_divides_a_little_too_large_stays_one(
    controller, make_noise, required, size
):
    control = controller(lambda noise: jnp.float32(required), max_batch_size=2**24)
    assert control.feed(make_noise()) == size


def test_the_minimum_is_rounded_up_to_a_multiple_too(controller, make_noise):
    control = controller(ETA, multiple_of=32, min_batch_size=33, monotone=False)
    assert control.feed(make_noise(trace=0)) == 64


@pytest.mark.parametrize(("multiple", "size"), [(1, 2**25 + 3), (3, 3 * (2**25 + 1))])
def test_bounds_hold_beyond_the_integers_of_float32(controller, make_noise, multiple, size):
    control = controller(ETA, initial_batch_size=3 * 64, max_batch_size=size, multiple_of=multiple)
    assert control.feed(make_noise(trace=1e12)) == size


def test_the_growth_limit_bounds_one_test(controller, make_noise):
    control = controller(ETA, growth_limit=1.5)
    sizes = [control.feed(make_noise(trace=t)) for t in (70, 1000, 1000)]
    assert sizes == [70, 105, 158]  # ⌈1.5 · 105⌉


def test_rounding_up_comes_after_the_growth_limit(controller, make_noise):
    control = controller(ETA, growth_limit=1.1, multiple_of=64)
    assert control.feed(make_noise(trace=1000)) == 128


def test_between_two_tests_nothing_is_looked_at(controller, make_noise):
    control = controller(ETA, test_interval=3)
    steps = [control.feed(make_noise(trace=t)) for t in (100, np.nan, 300, 400, 500)]
    assert steps == [100, 100, 100, 400, 400]
    assert control.status is BatchSizeStatus.NOT_TESTED
    assert int(control.metrics["skipped_tests"]) == 0


@pytest.mark.parametrize("traced", [False, True])
def test_holding_skips_the_test(make_noise, traced):
    link = adapt_batch_size(ETA, initial_batch_size=64, max_batch_size=128)
    noise = make_noise(trace=100)

    def update(state, hold):
        return link.update(noise.mean, state, noise=noise, hold_batch_size=hold)[1]

    update = jax.jit(update) if traced else update
    state = update(link.init(noise.mean), True)
    assert int(get_batch_size(state)) == 64
    assert metrics(state)["test_status"] == BatchSizeStatus.HELD
    assert int(get_batch_size(update(state, False))) == 100


def test_debias_takes_the_noise_off_the_denominator(controller, make_noise):
    control = controller(ETA, debias=True)
    assert control.feed(make_noise(trace=192, square=4)) == 192  # 192 / (4 − 192/64)
    assert float(control.metrics["noise_denominator"]) == pytest.approx(1.0)


@pytest.mark.parametrize(("options", "size"), [({}, 128), ({"growth_limit": 1.25}, 80)])
@pytest.mark.parametrize("trace", [256, 1000], ids=["zero", "negative"])
def test_without_a_positive_denominator_the_batch_doubles(
    controller, make_noise, options, size, trace
):
    control = controller(ETA, debias=True, **options)
    assert control.feed(make_noise(trace=trace, square=4)) == size
    assert np.isinf(control.metrics["required_batch_size"])


def test_a_plain_function_is_a_criterion(controller, make_noise):
    control = controller(lambda noise: 2.0 * noise.num_examples)
    assert control.feed(make_noise(num_examples=100)) == 200


def test_a_plain_function_may_be_smoothed(controller, make_noise):
    control = controller(lambda noise: 2.0 * noise.num_examples.astype(jnp.float32), ema_decay=0.5)
    control.feed(make_noise(num_examples=100))
    assert control.feed(make_noise(num_examples=400)) == 600  # (0.25 · 200 + 0.5 · 800) / 0.75


def test_the_display_of_the_noise_scale_is_unbiased(controller, make_noise):
    control = controller(ETA, initial_batch_size=8192)
    assert control.metrics["noise_scale"] == 0
    control = controller(ETA)
    control.feed(make_noise(trace=128, square=4))
    np.testing.assert_allclose(control.metrics["noise_scale"], 128 / (4 - 128 / 64), rtol=1e-6)


def test_the_clock_counts_examples_whatever_becomes_of_the_test(controller, make_noise):
    control = controller(ETA, max_batch_size=100)
    control.feed(make_noise(num_examples=64), hold_batch_size=True)
    control.feed(make_noise(trace=np.nan, num_examples=60))
    control.feed(make_noise(trace=1e6, num_examples=70))
    control.feed(make_noise(num_examples=100))
    assert control.status is BatchSizeStatus.AT_MAXIMUM
    assert control.metrics["num_examples"] == 294


def test_the_clock_runs_on_beyond_32_bits(controller, make_noise):
    control = controller(ETA)
    near = jnp.array([0, 2**32 - 10], jnp.uint32)
    control.state = control.state._replace(examples_clock=near)
    control.feed(make_noise(num_examples=64))
    assert control.metrics["num_examples"] == 2**32 + 54


@pytest.mark.parametrize("option", ["growth_limit", "ema_decay"])
def test_a_traced_option_that_is_not_a_number_keeps_the_bounds(make_noise, option):
    noise = make_noise(trace=1000)

    @jax.jit
    def batch_size(value):
        link = adapt_batch_size(ETA, initial_batch_size=64, max_batch_size=8192, min_batch_size=32,
                                monotone=False, **{option: value})  # fmt: skip
        _, state = link.update(noise.mean, link.init(noise.mean), noise=noise)
        return get_batch_size(state)

    assert 32 <= int(batch_size(jnp.nan)) <= 8192


def test_growth_limit_and_smoothing_may_be_injected(make_noise):
    static = ("criterion", "initial_batch_size", "max_batch_size", "min_batch_size", "multiple_of",
              "test_interval", "dataset_size", "monotone", "debias")  # fmt: skip
    factory = optax.inject_hyperparams(adapt_batch_size, static_args=static)
    link = factory(ETA, initial_batch_size=64, max_batch_size=8192, growth_limit=1.5, ema_decay=0.0)
    noise = make_noise(trace=1000)
    _, state = jax.jit(link.update)(noise.mean, link.init(noise.mean), noise=noise)
    assert int(get_batch_size(state)) == 96
    state.hyperparams["growth_limit"] = jnp.float32(2.0)
    _, state = jax.jit(link.update)(noise.mean, state, noise=noise)
    assert int(get_batch_size(state)) == 192
