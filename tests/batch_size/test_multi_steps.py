"""`adaptive_multi_steps`: micro-batches add up to one step of the optimizer inside."""

from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import (
    GradientNoise,
    adapt_batch_size,
    adaptive_multi_steps,
    get_batch_size,
    has_updated,
    merge_noise,
    metrics,
    norm_test,
)

SGD = optax.sgd(0.1)
PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.array(0.25)}


@cache
def make_optimizer(*links, eta=0.5, initial=32, largest=4096, **options):
    controller = adapt_batch_size(
        norm_test(eta), initial_batch_size=initial, max_batch_size=largest, **options
    )
    return optax.chain(controller, *links)


def draw(number, seed=0):
    """Gradients of micro-batches."""
    w = np.random.default_rng(seed).normal(1.0, 1.0, (number, 4)).astype(np.float32)
    return [{"w": x[:3], "b": x[3]} for x in w]


def one_group(gradient, size=8):
    mean = jax.tree.map(jnp.asarray, gradient)
    return GradientNoise(mean, jnp.float32(0), jnp.int32(size), jnp.int32(1))


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, 1e-6), a, b)


def test_a_batch_is_one_step_with_the_mean_gradient_loss_and_noise(drop_in):
    optimizer = make_optimizer(optax.scale_by_adam(), optax.scale_by_learning_rate(0.1))
    run, gradients, losses = drop_in(optimizer, PARAMS), draw(4), [1.0, 2.0, 4.0, 9.0]
    for gradient, loss in zip(gradients, losses, strict=True):
        updates = run.feed(gradient, value=loss)
    noise = reduce(merge_noise, map(one_group, gradients))
    mean = jax.tree.map(lambda *x: np.mean(x, 0), *gradients)
    assert_close(noise.mean, mean)
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    expected, inner = update(noise.mean, state, PARAMS, noise=noise)
    assert_close(updates, expected)
    assert_close(run.state.inner_opt_state, inner)
    assert float(run.state.gathered_value) == 4.0
    assert int(get_batch_size(run.state)) > 32


def test_in_between_updates_are_zero_and_the_inner_state_rests(drop_in):
    run = drop_in(make_optimizer(SGD), PARAMS)
    start = run.state.inner_opt_state
    for k, gradient in enumerate(draw(3)):
        updates = run.feed(gradient)
        assert not any(np.any(x) for x in jax.tree.leaves(updates))
        jax.tree.map(np.testing.assert_array_equal, run.state.inner_opt_state, start)
        assert not run.emitted
        assert int(run.metrics["micro_batches"]) == k + 1
    run.feed(draw(1)[0])
    assert run.emitted
    assert int(run.metrics["micro_batches"]) == 0


def test_a_batch_takes_as_many_micro_batches_as_the_noise_asked_for(drop_in):
    run = drop_in(make_optimizer(SGD, eta=0.4), PARAMS)
    run.feed_all(draw(4))
    size, required = int(get_batch_size(run.state)), float(run.metrics["required_batch_size"])
    assert 0 < size - required < 8  # rounded up to whole calls
    emitted = run.feed_all(draw(size // 8, seed=1))
    assert emitted == [False] * (size // 8 - 1) + [True]
    assert run.metrics["num_examples"] == 32 + size
    assert run.metrics["batch_size"] == size


def test_updates_keep_the_dtype_of_the_gradients(drop_in):
    params = jnp.ones(3, jnp.bfloat16)
    run = drop_in(make_optimizer(SGD), params)
    x = np.random.default_rng(2).normal(1.0, 1.0, (4, 3)).astype(np.float32)
    gradients = x.astype(jnp.bfloat16)
    for gradient in gradients:
        updates = run.feed(gradient)
        assert updates.dtype == jnp.bfloat16
    wide = gradients.astype(np.float64)
    np.testing.assert_allclose(updates, -0.1 * wide.mean(0), rtol=2**-7)
    trace = 8 * wide.var(0, ddof=1).sum()  # gathered in float32
    np.testing.assert_allclose(run.metrics["noise_numerator"], trace, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_micro_batch_that_is_not_finite_is_skipped(drop_in, bad):
    optimizer = make_optimizer(SGD)
    clean, disturbed = (drop_in(optimizer, PARAMS) for _ in range(2))
    gradients = draw(4)
    expected = [clean.feed(g, value=1.0) for g in gradients][-1]
    spoilt = {"w": np.array([1.0, bad, 1.0], np.float32), "b": np.float32(1.0)}
    for k, gradient in enumerate(gradients):
        if k in (0, 2):
            assert not any(np.any(x) for x in jax.tree.leaves(disturbed.feed(spoilt, value=bad)))
        updates = disturbed.feed(gradient, value=1.0)
    assert disturbed.emitted  # after one more call each
    assert_close(updates, expected)
    assert_close(disturbed.state.inner_opt_state, clean.state.inner_opt_state)
    assert float(disturbed.state.gathered_value) == 1.0
    assert int(disturbed.metrics["skipped_micro_batches"]) == 2
    assert int(disturbed.metrics["skipped_tests"]) == 0


class ProbeState(NamedTuple):
    """What the last completed batch handed to the links inside."""

    value: Any
    trace: Any
    emit: Any
    temperature: Any
    batches: Any


def probe(calls):
    """A link that keeps its extra arguments in its state, and lists the `emit` of every call."""

    def init(params):
        zero = jnp.zeros(())
        return ProbeState(zero, zero, jnp.zeros((), bool), zero, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, value, noise, emit, temperature, **extra_args):
        jax.debug.callback(lambda x: calls.append(bool(x)), emit, ordered=True)
        assert set(extra_args) - {"trace_only"} == {"hold_batch_size", "batch_size_multiple"}
        return updates, ProbeState(value, noise.trace, emit, temperature, state.batches + emit)

    return optax.GradientTransformationExtraArgs(init, update)


def test_extra_arguments_reach_the_links_inside(drop_in):
    run = drop_in(make_optimizer(probe([])), PARAMS)
    gradients = draw(4)
    for k, gradient in enumerate(gradients):
        run.feed(gradient, value=float(k), temperature=10.0 + k)
    shown = run.state.inner_opt_state[1]
    assert float(shown.value) == 1.5  # the mean loss
    assert float(shown.temperature) == 13.0  # of the call that completes the batch
    w = np.array([[*g["w"], g["b"]] for g in gradients], np.float64)
    np.testing.assert_allclose(shown.trace, 8 * w.var(0, ddof=1).sum(), rtol=1e-5)


def test_links_inside_are_called_once_per_batch_and_told_that_it_is_complete(drop_in):
    calls = []
    run = drop_in(make_optimizer(probe(calls), largest=32), PARAMS)
    emitted = run.feed_all(draw(8), value=0.0, temperature=0.0)
    jax.effects_barrier()
    assert emitted == ([False] * 3 + [True]) * 2
    assert calls == [True, True]
    assert int(run.state.inner_opt_state[1].batches) == 2


def test_holding_reaches_the_controller(drop_in):
    run = drop_in(make_optimizer(eta=0.1), PARAMS)
    assert run.feed_all(draw(4), hold_batch_size=True)[-1]
    assert int(get_batch_size(run.state)) == 32
    run.feed_all(draw(4), hold_batch_size=False)
    assert int(get_batch_size(run.state)) > 32


def test_the_state_keeps_its_types_and_may_be_donated():
    """Otherwise the second step would be compiled again, or the first would fail."""
    optimizer = make_optimizer(SGD, ema_decay=0.9)
    for link in (optimizer, adaptive_multi_steps(optimizer, micro_batch_size=8)):
        state, noise = link.init(PARAMS), one_group(PARAMS)
        before = jax.tree.map(jax.typeof, state)
        _, state = jax.jit(link.update, donate_argnums=1)(PARAMS, state, PARAMS, noise=noise)
        assert jax.tree.map(jax.typeof, state) == before


def apply(optimizer, gradient, state, params):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def test_with_a_constant_batch_it_is_optax_multi_steps():
    inner = optax.adam(0.05)
    ours = adaptive_multi_steps(make_optimizer(inner, largest=32), micro_batch_size=8)
    theirs = optax.MultiSteps(inner, every_k_schedule=4)
    step, their_step = jax.jit(partial(apply, ours)), jax.jit(partial(apply, theirs))
    a, b, state, their_state = PARAMS, PARAMS, ours.init(PARAMS), theirs.init(PARAMS)
    for gradient in draw(12):
        a, state = step(gradient, state, a)
        b, their_state = their_step(gradient, their_state, b)
        assert bool(has_updated(state)) == bool(theirs.has_updated(their_state))
        assert_close(a, b)
    assert metrics(state)["num_examples"] == 12 * 8


def test_a_micro_batch_must_divide_the_first_batch():
    wrapped = adaptive_multi_steps(make_optimizer(), micro_batch_size=12)
    with pytest.raises(ValueError, match=r"micro_batch_size=12 does not divide .* 32"):
        wrapped.init(PARAMS)


def test_a_first_batch_of_one_micro_batch_is_an_error_at_trace_time():
    wrapped = adaptive_multi_steps(make_optimizer(), micro_batch_size=32)
    state = jax.eval_shape(wrapped.init, PARAMS)
    with pytest.raises(ValueError, match=r"micro_batch_size=32 .* 1 group.*noise="):
        jax.eval_shape(wrapped.update, PARAMS, state, PARAMS)


@pytest.mark.parametrize("value", [0, -8, 1.5, True])
def test_the_micro_batch_size_must_be_a_positive_integer(value):
    with pytest.raises(ValueError, match=f"micro_batch_size must be .*got {value!r}"):
        adaptive_multi_steps(make_optimizer(), micro_batch_size=value)


def test_an_optimizer_without_controller_is_an_error():
    with pytest.raises(ValueError, match="add adapt_batch_size to the chain"):
        adaptive_multi_steps(optax.sgd(0.1), micro_batch_size=8).init(PARAMS)


@pytest.mark.parametrize("leaf", [jax.nn.relu, "relu"])
def test_parameters_that_are_no_arrays_are_named(leaf):
    controller = adapt_batch_size(norm_test(1.0), initial_batch_size=16, max_batch_size=64)
    optimizer = adaptive_multi_steps(optax.chain(controller, optax.sgd(0.1)), micro_batch_size=8)
    with pytest.raises(ValueError, match=r"params\['act'\] is no array .*integrations\.equinox"):
        optimizer.init({"w": jnp.ones(2), "act": leaf})
