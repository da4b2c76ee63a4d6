"""`get_batch_size`, `has_updated`, `metrics`: they find the controller wherever it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adabatch_jax import (
    adapt_batch_size,
    adaptive_multi_steps,
    get_batch_size,
    has_updated,
    metrics,
    norm_test,
    scale_by_batch_size,
    scale_by_example_schedule,
    sqrt_scaling,
)

PARAMS = jnp.zeros(2)
KEYS = {
    "batch_size",
    "num_examples",
    "noise_scale",
    "noise_numerator",
    "noise_denominator",
    "degrees_of_freedom",
    "required_batch_size",
    "test_status",
    "skipped_tests",
    "learning_rate",
}


def controller(initial=64, **options):
    return adapt_batch_size(
        norm_test(1.0), initial_batch_size=initial, max_batch_size=8192, **options
    )


def injected(learning_rate):
    return optax.chain(controller(), optax.scale_by_learning_rate(learning_rate))


WRAPPED = {
    "alone": controller,
    "chain": lambda: optax.chain(optax.identity(), optax.chain(controller(), optax.sgd(0.1))),
    "masked": lambda: optax.masked(optax.chain(controller(smoothing=0.9), optax.sgd(0.1)), True),
    "inject_hyperparams": lambda: optax.inject_hyperparams(injected)(learning_rate=0.1),
    "partition": lambda: optax.chain(controller(), optax.partition({"a": optax.sgd(0.1)}, "a")),
    "adaptive_multi_steps": lambda: adaptive_multi_steps(controller(), micro_batch_size=8),
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_the_controller_is_found_inside(wrapping, make_noise):
    optimizer, noise = WRAPPED[wrapping](), make_noise(trace=100)
    state = optimizer.init(PARAMS)
    assert int(get_batch_size(state)) == metrics(state)["batch_size"] == 64
    assert not has_updated(state)
    _, state = jax.jit(optimizer.update)(noise.mean, state, PARAMS, noise=noise)
    assert int(get_batch_size(state)) == metrics(state)["batch_size"] == 100
    assert has_updated(state)
    assert metrics(state)["num_examples"] == 64


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_states_stacked_over_devices_read_like_one(wrapping):
    state = WRAPPED[wrapping]().init(PARAMS)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 4), state)
    assert get_batch_size(stacked).shape == has_updated(stacked).shape == ()
    one, many = metrics(state), metrics(stacked)
    assert one.keys() == many.keys()
    for key in one:
        np.testing.assert_array_equal(many[key], one[key], err_msg=key)


def test_a_stacked_state_reads_in_use(make_noise):
    link, noises = controller(), [make_noise(trace=100), make_noise(trace=100)]
    states = [link.init(PARAMS)] * 2
    state, noise = jax.tree.map(lambda *x: jnp.stack(x), *zip(states, noises, strict=True))
    _, state = jax.jit(jax.vmap(lambda s, n: link.update(n.mean, s, noise=n)))(state, noise)
    assert int(get_batch_size(state)) == 100
    assert metrics(state)["num_examples"] == 64
    assert has_updated(state)


def test_nnx_optimizer_is_read_and_updated(make_noise):
    model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    transformation = optax.chain(controller(), scale_by_example_schedule(0.1))
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    assert int(get_batch_size(optimizer.opt_state)) == 64
    assert not has_updated(optimizer.opt_state)

    @nnx.jit
    def step(model, optimizer, noise):
        gradients = nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model)
        optimizer.update(model, gradients, noise=noise)
        return get_batch_size(optimizer.opt_state), metrics(optimizer.opt_state)

    before = model.kernel[...]
    inside, shown = step(model, optimizer, make_noise(trace=100))
    assert (
        int(inside) == int(shown["batch_size"]) == int(get_batch_size(optimizer.opt_state)) == 100
    )
    assert has_updated(optimizer.opt_state)
    assert metrics(optimizer.opt_state)["num_examples"] == 64
    np.testing.assert_allclose(shown["learning_rate"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(model.kernel[...], before - 0.1, rtol=1e-5)


def test_inside_jit_and_scan(make_noise):
    link, noise = controller(growth_limit=1.5), make_noise(trace=1000)

    def step(state, _):
        before = get_batch_size(state)
        _, state = link.update(noise.mean, state, noise=noise)
        return state, (before, has_updated(state), metrics(state)["num_examples"])

    state, (sizes, updated, examples) = jax.jit(
        lambda: jax.lax.scan(step, link.init(PARAMS), length=4)
    )()
    assert sizes.tolist() == [64, 96, 144, 216]
    assert updated.all()
    assert examples.dtype == jnp.float32
    assert examples.tolist() == [64, 128, 192, 256]
    assert int(get_batch_size(state)) == 324


def test_the_keys_do_not_depend_on_the_numbers(make_noise):
    link, noise = controller(), make_noise(trace=np.nan)
    state = link.init(PARAMS)
    assert set(metrics(state)) == KEYS
    _, state = jax.jit(link.update)(noise.mean, state, noise=noise)
    assert set(metrics(state)) == KEYS
    assert set(jax.jit(metrics)(state)) == KEYS


def test_other_links_add_keys_of_their_own():
    state = adaptive_multi_steps(controller(), micro_batch_size=8).init(PARAMS)
    added = {"micro_batches", "skipped_micro_batches", "averaged_gradients"}
    assert set(metrics(state)) == KEYS | added


def test_before_the_first_test_nothing_is_reported():
    shown = metrics(controller().init(PARAMS))
    unknown = ("noise_scale", "noise_numerator", "noise_denominator", "required_batch_size")
    assert all(np.isnan(shown[key]) for key in unknown)
    assert np.isnan(shown["learning_rate"])
    assert (shown["num_examples"], int(shown["skipped_tests"])) == (0, 0)


def test_the_learning_rate_is_the_product_of_what_was_applied(make_noise):
    optimizer = optax.chain(
        controller(),
        scale_by_batch_size(sqrt_scaling(), base_batch_size=16),
        scale_by_example_schedule(0.5),
    )
    noise = make_noise(num_examples=64)
    _, state = jax.jit(optimizer.update)(noise.mean, optimizer.init(PARAMS), noise=noise)
    np.testing.assert_allclose(metrics(state)["learning_rate"], 1.0, rtol=1e-6)  # √(64/16) · 0.5


def test_an_injected_learning_rate_is_reported():
    state = WRAPPED["inject_hyperparams"]().init(PARAMS)
    np.testing.assert_allclose(metrics(state)["learning_rate"], 0.1, rtol=1e-6)
    state.hyperparams["learning_rate"] = jnp.float32(0.025)
    np.testing.assert_allclose(jax.jit(metrics)(state)["learning_rate"], 0.025, rtol=1e-6)


def test_examples_are_a_python_integer_beyond_31_bits():
    state = controller().init(PARAMS)
    state = state._replace(examples_clock=jnp.array([5, 7], jnp.uint32))
    shown = metrics(state)
    assert type(shown["num_examples"]) is int
    assert shown["num_examples"] == 5 * 2**32 + 7
    inside = jax.jit(metrics)(state)["num_examples"]
    np.testing.assert_allclose(inside, 5 * 2**32 + 7, rtol=1e-7)


@pytest.mark.parametrize("read", [get_batch_size, has_updated, metrics])
def test_no_controller_is_an_error(read):
    with pytest.raises(ValueError, match=r"no batch-size controller.*add adapt_batch_size"):
        read(optax.adam(0.1).init(PARAMS))


@pytest.mark.parametrize("read", [get_batch_size, has_updated, metrics])
def test_two_controllers_are_an_error(read):
    links = {"a": controller(), "b": controller(32)}
    state = optax.partition(links, {"x": "a", "y": "b"}).init({"x": PARAMS, "y": PARAMS})
    with pytest.raises(ValueError, match=r"2 batch-size controllers.*optax\.partition"):
        read(state)


def test_other_links_report_without_a_controller():
    shown = metrics(optax.chain(optax.scale_by_adam(), scale_by_example_schedule(0.3)).init(PARAMS))
    assert set(shown) == {"learning_rate"}
    np.testing.assert_allclose(shown["learning_rate"], 0.3, rtol=1e-6)
