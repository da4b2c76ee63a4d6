"""`follow_batch_size` under Optax's inject_hyperparams, and the rules it follows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax import linear_scaling, scale_by_batch_size, sqrt_scaling
from adabatch_jax.learning_rate import (
    follow_batch_size,
    scaled_average,
    scaled_beta,
    scaled_eps,
    scaled_weight_decay,
)
from tests.marks import slow

BASE = 64
SIZES = [16, 64, 100, 256, 4096]


def decay_by(rule, base=BASE):
    decay = follow_batch_size(rule, base_batch_size=base)
    return optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=decay)


def test_there_is_no_lag(noise_of_batch):
    """The update and the value shown are those of the batch behind the very same gradient."""
    link, params = decay_by(scaled_weight_decay(0.1)), jnp.array([1.0, -2.0])
    state = link.init(params)
    np.testing.assert_allclose(state.hyperparams["weight_decay"], 0.1, rtol=1e-6)
    step = jax.jit(link.update)
    for size in (64, 256, 32, 1024):
        updates, state = step(jnp.zeros(2), state, params, noise=noise_of_batch(size))
        expected = 0.1 * size / BASE
        np.testing.assert_allclose(state.hyperparams["weight_decay"], expected, rtol=1e-6)
        np.testing.assert_allclose(updates, expected * params, rtol=1e-6)
    assert step._cache_size() == 1


def test_it_reads_what_scale_by_batch_size_reads(noise_of_batch):
    def rule(b, base):
        return 1000.0 * b + base

    decay, scale = decay_by(rule), scale_by_batch_size(rule, base_batch_size=BASE)
    one = jnp.array(1.0)
    for given in [
        {"noise": noise_of_batch(128)},
        {"num_examples": 128},
        {"noise": noise_of_batch(8), "num_examples": 128},
        {"noise": noise_of_batch(128), "base_batch_size": 32, "unknown": "text"},
        {"noise": noise_of_batch(0)},
        {"num_examples": float("nan")},
        {"num_examples": float("inf"), "base_batch_size": 32},
    ]:
        _, decayed = decay.update(one, decay.init(one), one, **given)
        _, scaled = scale.update(one, scale.init(one), one, **given)
        assert decayed.hyperparams["weight_decay"] == scaled.applied_scale
        assert decayed.hyperparams["weight_decay"].dtype == jnp.float32


def test_inside_adaptive_multi_steps():
    """Three batches of 2, 4 and 4 micro-batches: the value is that of the batch."""
    criterion = adabatch.norm_test(1e-3)  # wants more than it may have at once
    controller = adabatch.adapt_batch_size(criterion, initial_batch_size=8, max_batch_size=16)
    inner = optax.chain(controller, decay_by(scaled_weight_decay(0.1), base=8), optax.scale(0.0))
    optimizer = adabatch.adaptive_multi_steps(inner, micro_batch_size=4)
    rng, params = np.random.default_rng(0), jnp.ones(3)
    state, ends = optimizer.init(params), []
    for call in range(1, 11):
        gradient = jnp.float32(rng.normal(size=3))
        _, state = jax.jit(optimizer.update)(gradient, state, params)
        if adabatch.has_updated(state):
            ends.append(4 * call)
        used = 8 if call < 6 else 16
        shown = state.inner_opt_state[1].hyperparams["weight_decay"]
        np.testing.assert_allclose(shown, 0.1 * used / 8, rtol=1e-6)
    assert ends == [8, 24, 40]


def test_a_missing_batch_size_says_how_to_pass_it():
    link, params = decay_by(scaled_weight_decay(0.1)), jnp.ones(2)
    with pytest.raises(ValueError, match=r"follow_batch_size .*noise=noise.*num_examples="):
        jax.eval_shape(link.update, params, link.init(params), params)


def test_a_plain_schedule_it_is_not():
    value = follow_batch_size(scaled_weight_decay(0.1), base_batch_size=BASE)
    link, params = optax.add_decayed_weights(value), jnp.ones(2)
    with pytest.raises(ValueError, match=r"no schedule over steps.*inject_hyperparams"):
        link.update(params, link.init(params), params)


@pytest.mark.parametrize("size", SIZES)
def test_the_rules_by_definition(size):
    kappa = size / BASE
    for sizes in [(size, BASE), (jnp.int32(size), jnp.int32(BASE)), (jnp.float32(size), BASE)]:
        for rule, expected in [
            (scaled_beta(0.9), max(0.0, 1 - kappa * 0.1)),
            (scaled_eps(1e-8), 1e-8 / kappa**0.5),
            (scaled_eps(1e-8, linear_scaling()), 1e-8),
            (scaled_weight_decay(0.1), 0.1 * kappa),
            (scaled_weight_decay(0.1, sqrt_scaling()), 0.1 * kappa**0.5),
            (scaled_weight_decay(0.1, linear_scaling()), 0.1),
            (scaled_average(0.99), 0.99**kappa),
        ]:
            value = rule(*sizes)
            assert (value.dtype, value.shape) == (jnp.float32, ())
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7 * expected)


def test_beta_stays_in_its_interval():
    assert float(scaled_beta(0.9)(640, BASE)) == 0.0
    assert float(scaled_beta(0.9)(10**6, BASE)) == 0.0
    assert 0.9999999 < float(scaled_beta(0.999)(1, 10**6)) < 1.0
    assert float(scaled_beta(0.0)(1, BASE)) == np.float32(1 - 1 / BASE)


@pytest.mark.parametrize("scaling", [sqrt_scaling(), linear_scaling()])
@pytest.mark.parametrize("place", ["decay before the scale", "decay after the scale"])
def test_weights_shrink_at_the_same_pace_per_example(scaling, place):
    """A whole chain on a gradient of zero: after the same number of examples, the same weights."""
    scale = scale_by_batch_size(scaling, base_batch_size=BASE)
    if place == "decay before the scale":
        links = (optax.scale_by_adam(), decay_by(scaled_weight_decay(0.1, scaling)), scale)
    else:
        links = (optax.scale_by_adam(), scale, decay_by(scaled_weight_decay(0.1)))
    optimizer = optax.chain(*links, optax.scale_by_learning_rate(1e-3))
    left = []
    for sizes in ([64] * 64, [256] * 16, [32] * 64 + [64] * 16 + [512] * 2):
        params = jnp.array(1.0)
        state, step = optimizer.init(params), jax.jit(optimizer.update)
        for size in sizes:
            updates, state = step(jnp.zeros(()), state, params, num_examples=size)
            params = optax.apply_updates(params, updates)
        left.append(float(params))
    assert sum(sizes) == 64 * 64
    np.testing.assert_allclose(1 - np.array(left), 1 - np.exp(-1e-3 * 0.1 * 64), rtol=1e-3)


@pytest.mark.parametrize("largest", [1024, *slow(8)])
def test_an_average_moves_at_the_same_pace_per_example(largest):
    """The recipe of `scaled_average`, in a loop with `adaptive_multi_steps`."""
    rule, base = scaled_average(0.9), 64
    controller = adabatch.adapt_batch_size(
        adabatch.norm_test(0.5), initial_batch_size=8, max_batch_size=largest, multiple_of=4
    )
    optimizer = adabatch.adaptive_multi_steps(
        optax.chain(controller, optax.sgd(0.0)), micro_batch_size=4
    )

    @jax.jit
    def step(params, average, state, gradient):
        size = adabatch.get_batch_size(state)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        weight = jnp.where(adabatch.has_updated(state), 1 - rule(size, base), 0.0)
        average = optax.incremental_update(params, average, weight)
        return params, average, state

    rng = np.random.default_rng(3)
    params, average = jnp.full(5, 2.0), jnp.zeros(5)
    state, sizes, used = optimizer.init(params), [], 0
    for _ in range(200):
        gradient = jnp.float32(rng.normal(1.0, 3.0, size=5))
        params, average, state = step(params, average, state, gradient)
        if adabatch.has_updated(state):
            sizes.append(adabatch.metrics(state)["num_examples"] - used)
            used += sizes[-1]
        np.testing.assert_allclose(average, 2.0 * (1 - 0.9 ** (used / base)), rtol=1e-4)
    assert len(set(sizes)) == 1 if largest == 8 else len(set(sizes)) > 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scaled_beta(1.0), r"scaled_beta: beta must lie in \[0.0, 1.0\), got 1.0"),
        (lambda: scaled_beta(-0.1), "beta must lie in .*, got -0.1"),
        (lambda: scaled_average(1.0), "scaled_average: decay must lie in .*, got 1.0"),
        (lambda: scaled_eps(-1.0), "scaled_eps: eps must lie in .*, got -1.0"),
        (lambda: scaled_eps(float("nan")), "eps must lie in .*, got nan"),
        (lambda: scaled_eps(1e-8, 0.5), "scaled_eps: scaling must be callable, got 0.5"),
        (lambda: scaled_weight_decay(-1), "scaled_weight_decay: weight_decay must .*, got -1"),
        (lambda: scaled_weight_decay(1, "sqrt"), "scaling must be callable, got 'sqrt'"),
        (
            lambda: follow_batch_size(scaled_beta(0.9), base_batch_size=0),
            "follow_batch_size: base_batch_size must be a positive number, got 0",
        ),
        (
            lambda: follow_batch_size(0.9, base_batch_size=1),
            "follow_batch_size: rule must be callable, got 0.9",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
