"""`get_batch_size`, `has_updated`, `metrics`: they find the controller wherever it is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

from adabatch_jax import (
    BatchSizeStatus,
    adapt_batch_size,
    adaptive_multi_steps,
    get_batch_size,
    has_updated,
    metrics,
    needs_noise,
    norm_test,
    scale_by_batch_size,
    scale_by_example_schedule,
    sqrt_scaling,
)
from adabatch_jax.batch_size._state import AdaptBatchSizeState, SizeMemory, SizeRecord

PARAMS = jnp.zeros(2)
KEYS = {
    "batch_size",
    "next_batch_size",
    "skipped",
    "num_examples",
    "optimizer_steps",
    "gradient_norm",
    "noise_scale",
    "noise_numerator",
    "noise_denominator",
    "degrees_of_freedom",
    "required_batch_size",
    "test_status",
    "skipped_tests",
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
    "masked": lambda: optax.masked(optax.chain(controller(ema_decay=0.0), optax.sgd(0.1)), True),
    "inject_hyperparams": lambda: optax.inject_hyperparams(injected)(learning_rate=0.1),
    "partition": lambda: optax.chain(controller(), optax.partition({"a": optax.sgd(0.1)}, "a")),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.chain(controller(), optax.sgd(0.1)), 5),
    "adaptive_multi_steps": lambda: adaptive_multi_steps(controller(), micro_batch_size=8),
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_the_controller_is_found_inside(wrapping, make_noise):
    optimizer, noise = WRAPPED[wrapping](), make_noise(trace=100)
    state = optimizer.init(PARAMS)
    shown = metrics(state)
    assert int(get_batch_size(state)) == shown["next_batch_size"] == shown["batch_size"] == 64
    assert not has_updated(state)
    _, state = jax.jit(optimizer.update)(noise.mean, state, PARAMS, noise=noise)
    shown = metrics(state)
    expected = 104 if wrapping == "adaptive_multi_steps" else 100  # in whole calls of eight
    assert int(get_batch_size(state)) == shown["next_batch_size"] == expected
    assert shown["batch_size"] == 64
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
        int(inside)
        == int(shown["next_batch_size"])
        == int(get_batch_size(optimizer.opt_state))
        == 100
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
    added = {"loss", "micro_batches", "skipped_micro_batches", "averaged_gradients"}
    assert set(metrics(state)) == KEYS | added


def test_before_the_first_test_nothing_is_reported():
    shown = metrics(controller().init(PARAMS))
    assert int(shown.pop("batch_size")) == int(shown.pop("next_batch_size")) == 64
    assert all(value == 0 for value in shown.values())


@pytest.mark.parametrize("how", ["host", "jit"])
def test_no_metric_is_nan_in_a_healthy_run(make_noise, how):
    optimizer, noise = WRAPPED["chain"](), make_noise(trace=300, num_examples=64)
    with jax.debug_nans(True):
        read = jax.jit(metrics) if how == "jit" else metrics
        state = optimizer.init(PARAMS)
        read(state)
        for more in ({}, {"hold_batch_size": True}):
            _, state = optimizer.update(noise.mean, state, PARAMS, noise=noise, **more)
            shown = read(state)
    assert shown["noise_scale"] == np.inf  # 1 − 300/64: no signal, which is no alarm


def test_the_learning_rate_is_the_product_of_what_was_applied(make_noise):
    optimizer = optax.chain(
        controller(),
        scale_by_batch_size(sqrt_scaling(), base_batch_size=16),
        scale_by_example_schedule(0.5),
    )
    noise = make_noise(num_examples=64)
    _, state = jax.jit(optimizer.update)(noise.mean, optimizer.init(PARAMS), noise=noise)
    np.testing.assert_allclose(metrics(state)["learning_rate"], 1.0, rtol=1e-6)  # √(64/16) · 0.5
    assert "learning_rate_scale" not in metrics(state)


def test_a_scale_alone_is_no_learning_rate(make_noise):
    scale = scale_by_batch_size(sqrt_scaling(), base_batch_size=16)
    optimizer, noise = optax.chain(controller(), scale, optax.sgd(0.1)), make_noise(num_examples=64)
    _, state = jax.jit(optimizer.update)(noise.mean, optimizer.init(PARAMS), noise=noise)
    assert "learning_rate" not in metrics(state)
    assert float(metrics(state)["learning_rate_scale"]) == 2.0


def test_an_injected_rate_for_each_coordinate_is_no_number():
    state = optax.inject_hyperparams(injected)(learning_rate=jnp.array([0.1, 0.2])).init(PARAMS)
    assert "learning_rate" not in metrics(state)


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
    assert set(shown) == {"learning_rate", "skipped"}
    np.testing.assert_allclose(shown["learning_rate"], 0.3, rtol=1e-6)


ENSEMBLE = {
    "get_batch_size": (get_batch_size, [40, 48, 64]),
    "has_updated": (has_updated, [False, True, True]),
    "needs_noise": (needs_noise, [True, True, False]),
}


@pytest.fixture(scope="module")
def ensemble():
    """Three members stacked by vmap, each with another size."""
    link = controller(32, growth_limit=4.0)
    states = [
        link.init(PARAMS)._replace(
            next_batch_size=jnp.int32(size), updates_seen=jnp.int32(number), test_due=jnp.bool_(due)
        )
        for number, (size, due) in enumerate([(40, True), (48, True), (64, False)])
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *states)


@pytest.mark.parametrize("name", ENSEMBLE)
@pytest.mark.parametrize("traced", [False, True])
def test_an_ensemble_has_no_single_number(ensemble, name, traced):
    read, members = ENSEMBLE[name]
    outer = jax.jit if traced else lambda f: f
    reason = "while tracing" if traced else "its members differ"
    for reader in (read, metrics):
        remedy = rf"jax\.vmap\({reader.__name__}\)"
        with pytest.raises(ValueError, match=f"{reader.__name__}.*stacked.*{reason}.*{remedy}"):
            outer(reader)(ensemble)
    assert outer(jax.vmap(read))(ensemble).tolist() == members
    assert outer(jax.vmap(metrics))(ensemble)["next_batch_size"].tolist() == [40, 48, 64]


def test_an_ensemble_over_learning_rates_is_seen_by_them():
    def member(rate):
        return optax.inject_hyperparams(injected)(learning_rate=rate).init(PARAMS)

    state = jax.vmap(member)(jnp.array([0.1, 0.2]))
    assert int(get_batch_size(state)) == 64
    with pytest.raises(ValueError, match=r"metrics of learning_rate: .*stacked, and its members"):
        metrics(state)
    np.testing.assert_allclose(jax.vmap(metrics)(state)["learning_rate"], [0.1, 0.2], rtol=1e-6)


def test_copies_that_differ_by_rounding_read_like_one():
    state = controller().init(PARAMS)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    near = jnp.array([[8.0, 2.0], [8.0, 2.00001]])
    stacked = stacked._replace(last_size_test=stacked.last_size_test._replace(display_ema=near))
    assert float(metrics(stacked)["noise_scale"]) == 4.0


@pytest.mark.parametrize("inside", [False, True])
def test_a_call_skipped_by_apply_if_finite_is_known(make_noise, inside):
    chain = optax.chain(controller(8), optax.apply_if_finite(optax.sgd(0.1), 5))
    optimizer = (
        chain if inside else optax.apply_if_finite(optax.chain(controller(8), optax.sgd(0.1)), 5)
    )
    update = jax.jit(optimizer.update)
    state, noise = optimizer.init(PARAMS), make_noise(num_examples=8)
    seen = []
    for gradient in (noise.mean, noise.mean * jnp.nan, noise.mean):
        _, state = update(gradient, state, PARAMS, noise=noise)
        seen.append((bool(metrics(state)["skipped"]), bool(has_updated(state))))
    assert seen == [(False, True), (True, False), (False, True)]
    assert metrics(state)["num_examples"] == (24 if inside else 16)


class Told(NamedTuple):
    """The fields of a drop-in's state that `skipped` reads."""

    emitted: Any
    skipped_call: Any
    inner_opt_state: Any

    def report_metrics(self):
        return {}


@pytest.mark.parametrize(
    ("emitted", "skipped", "last_finite", "expected"),
    [
        (False, True, True, True),
        (True, False, True, False),
        (True, False, False, True),
        (False, False, False, False),  # of an earlier call: this one only gathered
    ],
)
def test_what_stands_inside_a_drop_in_tells_of_its_own_calls(
    emitted, skipped, last_finite, expected
):
    inner = optax.apply_if_finite(controller(), 5).init(PARAMS)
    inner = inner._replace(last_finite=jnp.bool_(last_finite))
    state = Told(jnp.bool_(emitted), jnp.bool_(skipped), inner)
    assert bool(metrics(state)["skipped"]) is expected
    assert bool(jax.jit(metrics)(state)["skipped"]) is expected


@pytest.mark.parametrize("read", [get_batch_size, has_updated, needs_noise, metrics])
@pytest.mark.parametrize("kind", ["dicts", "flax"])
def test_a_state_without_its_types_is_named(read, kind):
    state = optax.chain(controller(), optax.sgd(0.1)).init(PARAMS)
    flat = [state[0]._asdict(), [{}, {}]]
    bare = serialization.to_state_dict(state) if kind == "flax" else flat
    with pytest.raises(ValueError, match=r"restored without its types.*optimizer\.init\(params\)"):
        read(bare)


@pytest.mark.parametrize(
    "name", [*AdaptBatchSizeState._fields, *SizeMemory._fields, *SizeRecord._fields]
)
def test_every_field_is_found_by_its_name(name):
    optimizer = adaptive_multi_steps(
        optax.chain(controller(ema_decay=0.0), optax.adam(0.1)), micro_batch_size=8
    )
    found = optax.tree.get_all_with_path(optimizer.init(PARAMS), name)
    assert len(found) == 1


def test_tests_go_on_beyond_31_bits_of_updates(make_noise):
    link = controller(test_interval=3)
    state = optax.tree.set(
        link.init(PARAMS), updates_seen=jnp.int32(2**31 - 3), skipped_tests=jnp.int32(2**31 - 1)
    )
    update, noise, tested = jax.jit(link.update), make_noise(num_groups=1), []
    for _ in range(7):
        _, state = update(noise.mean, state, noise=noise)
        tested.append(int(metrics(state)["test_status"]) == BatchSizeStatus.TOO_FEW_GROUPS)
    assert tested == [True, False, False, True, False, False, True]
    assert int(state.updates_seen) == int(state.last_size_test.skipped_tests) == 2**31 - 1
    assert has_updated(state)


def test_calls_of_optax_multi_steps_are_told_apart(make_noise):
    """Two calls a step; the third is skipped, and what the controller saw stays as it was."""
    chain = optax.chain(controller(8), optax.sgd(0.1))
    optimizer = optax.MultiSteps(chain, 2, should_skip_update_fn=optax.skip_not_finite)
    update = jax.jit(optimizer.update)
    state, noise = optimizer.init(PARAMS), make_noise(num_examples=8)
    seen = [(bool(metrics(state)["skipped"]), bool(has_updated(state)))]
    for gradient in (noise.mean, noise.mean, noise.mean * jnp.nan, noise.mean, noise.mean):
        _, state = update(gradient, state, PARAMS, noise=noise)
        seen.append((bool(metrics(state)["skipped"]), bool(has_updated(state))))
        assert has_updated(state) == (optimizer.has_updated(state) & ~metrics(state)["skipped"])
    gathers, steps, skips = (False, False), (False, True), (True, False)
    assert seen == [gathers, gathers, steps, skips, gathers, steps]


def test_a_loop_of_optax_multi_steps_finds_its_names():
    optimizer = adaptive_multi_steps(
        optax.chain(controller(initial=16), optax.sgd(1.0)), micro_batch_size=8
    )
    state, seen = optimizer.init(PARAMS), []
    for call, loss in enumerate((1.0, 3.0, 9.0)):
        gradient = jnp.array([3.0, 4.0]) if call < 2 else jnp.ones(2)
        _, state = optimizer.update(gradient, state, PARAMS, value=jnp.array(loss))
        shown = metrics(state)
        seen.append((int(state.mini_step), int(state.gradient_step), float(shown["loss"])))
        assert shown["optimizer_steps"] == state.gradient_step
    assert seen == [(1, 0, 0.0), (0, 1, 2.0), (1, 1, 2.0)]
    assert shown["gradient_norm"] == 5.0
    np.testing.assert_array_equal(state.acc_grads, [1.0, 1.0])


def test_a_status_is_a_name_on_the_host_and_a_number_inside_jit(make_noise):
    link, noise = controller(), make_noise(trace=100)
    _, state = link.update(noise.mean, link.init(PARAMS), noise=noise)
    assert metrics(state)["test_status"] is BatchSizeStatus.CHANGED
    assert jax.jit(metrics)(state)["test_status"].dtype == jnp.int32
