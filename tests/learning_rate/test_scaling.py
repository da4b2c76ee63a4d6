"""`scale_by_batch_size`: the learning rate follows the batch by a rule."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from adabatch_jax import (
    linear_scaling,
    random_matrix_scaling,
    scale_by_batch_size,
    sqrt_scaling,
)
from adabatch_jax.curvature import max_stable_learning_rate, transition_batch_size

UPDATES = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}


def applied(link, **extra):
    """By how much `link` multiplies, checked to be the same for every coordinate."""
    updates, state = jax.jit(link.update)(UPDATES, link.init(UPDATES), **extra)
    factor = float(state.applied_scale)
    jax.tree.map(lambda u, v: np.testing.assert_array_equal(u, factor * v), updates, UPDATES)
    return factor


@given(batch=st.integers(1, 2**30), base=st.integers(1, 2**30))
def test_the_rules_by_definition(batch, base):
    sizes = jnp.float32(batch), jnp.float32(base)
    np.testing.assert_allclose(linear_scaling()(*sizes), batch / base, rtol=1e-6)
    np.testing.assert_allclose(sqrt_scaling()(*sizes), np.sqrt(batch / base), rtol=1e-6)


@pytest.mark.parametrize(("rule", "factor"), [(linear_scaling(), 16.0), (sqrt_scaling(), 4.0)])
def test_the_batch_behind_the_gradient_decides(noise_of_batch, rule, factor):
    link = scale_by_batch_size(rule, base_batch_size=64)
    assert applied(link, noise=noise_of_batch(1024)) == factor
    assert applied(link, noise=noise_of_batch(64)) == 1.0


def test_a_batch_size_given_by_hand_comes_first(noise_of_batch):
    link = scale_by_batch_size(linear_scaling(), base_batch_size=64)
    assert applied(link, num_examples=128) == applied(link, batch_size=128) == 2.0
    assert applied(link, num_examples=128, noise=noise_of_batch(1024)) == 2.0


def test_a_base_given_by_hand_comes_first(noise_of_batch):
    link = scale_by_batch_size(linear_scaling(), base_batch_size=64)
    assert applied(link, noise=noise_of_batch(1024), base_batch_size=512) == 2.0


def test_any_function_is_a_rule(noise_of_batch):
    link = scale_by_batch_size(lambda b, base: jnp.minimum(b / base, 3.0), base_batch_size=64)
    assert applied(link, noise=noise_of_batch(1024)) == 3.0


def test_an_empty_batch_does_not_divide_by_zero(noise_of_batch):
    link = scale_by_batch_size(lambda b, base: base / b, base_batch_size=64)
    assert applied(link, noise=noise_of_batch(0)) == 64.0


def test_updates_keep_their_dtype(noise_of_batch):
    link = scale_by_batch_size(sqrt_scaling(), base_batch_size=64)
    updates = jnp.ones(2, jnp.bfloat16)
    updates, state = link.update(updates, link.init(updates), noise=noise_of_batch(256))
    assert updates.dtype == jnp.bfloat16
    assert updates.tolist() == [2.0, 2.0]
    assert state.applied_scale.dtype == jnp.float32


def test_the_base_may_be_injected(noise_of_batch):
    factory = optax.inject_hyperparams(scale_by_batch_size, static_args=("scaling",))
    link = factory(linear_scaling(), base_batch_size=64)
    updates, _ = link.update(jnp.ones(1), link.init(jnp.ones(1)), noise=noise_of_batch(256))
    assert updates.tolist() == [4.0]


def test_a_missing_batch_size_says_how_to_pass_it():
    link = scale_by_batch_size(linear_scaling(), base_batch_size=64)
    with pytest.raises(ValueError, match=r"scale_by_batch_size .*noise=noise.*num_examples="):
        jax.eval_shape(link.update, UPDATES, link.init(UPDATES))


@pytest.mark.parametrize("value", [0, -64, float("nan"), None, True])
def test_the_base_must_be_positive(value):
    with pytest.raises(ValueError, match=f"base_batch_size must be .*got {value!r}"):
        scale_by_batch_size(linear_scaling(), base_batch_size=value)


def test_the_rule_must_be_callable():
    with pytest.raises(ValueError, match="scaling must be callable, got 'sqrt'"):
        scale_by_batch_size("sqrt", base_batch_size=64)


@given(
    batch=st.integers(1, 10**6),
    base=st.integers(1, 10**6),
    transition=st.floats(0.0, 1e8),
    total=st.none() | st.integers(10**6, 10**9),
)
def test_the_random_matrix_rule_by_definition(batch, base, transition, total):
    before, after = (1 / x - (1 / total if total else 0) for x in (base, batch))
    expected = (1 + transition * before) / (1 + transition * after)
    for adaptive, value in [(False, expected), (True, np.sqrt(expected))]:
        rule = random_matrix_scaling(transition, adaptive=adaptive, dataset_size=total)
        found = rule(jnp.float32(batch), jnp.float32(base))
        np.testing.assert_allclose(found, value, rtol=1e-5)
        low, high = sorted((1.0, linear_scaling()(batch, base)))
        assert total or low * (1 - 1e-5) <= found <= high * (1 + 1e-5)


@given(batch=st.integers(1, 10**4), base=st.integers(1, 10**4), noise=st.floats(0.0, 1e6))
def test_the_random_matrix_rule_is_the_ratio_of_the_stable_rates(batch, base, noise):
    rule = random_matrix_scaling(
        transition_batch_size(10.0, noise, momentum=0.9), adaptive=False, dataset_size=10**4
    )
    rates = [
        max_stable_learning_rate(
            10.0, momentum=0.9, noise=noise, batch_size=size, dataset_size=10**4
        )
        for size in (batch, base)
    ]
    np.testing.assert_allclose(rule(batch, base), rates[0] / rates[1], rtol=1e-5)


@pytest.mark.parametrize("total", [None, 1024])
@pytest.mark.parametrize("batch", [16.0, 64.0, 1024.0])
def test_the_limits_of_the_random_matrix_rule(batch, total):
    def factor(transition, adaptive=False, total=total):
        rule = random_matrix_scaling(transition, adaptive=adaptive, dataset_size=total)
        return float(rule(batch, 64.0))

    assert factor(0.0) == 1.0
    assert factor(jnp.float32(-5.0)) == 1.0
    assert factor(jnp.float32(jnp.inf)) == batch / 64
    assert factor(jnp.float32(jnp.inf), adaptive=True) == np.sqrt(batch / 64)
    assert factor(jnp.float32(jnp.nan)) == min(batch / 64, 1.0)
    np.testing.assert_allclose(factor(1e30, total=None), batch / 64, rtol=1e-5)


def test_the_transition_may_be_injected(noise_of_batch):
    def factory(transition):
        rule = random_matrix_scaling(transition, adaptive=False)
        return scale_by_batch_size(rule, base_batch_size=64)

    link = optax.inject_hyperparams(factory)(transition=192.0)
    state = link.init(UPDATES)
    for transition, factor in [(192.0, 2.0), (0.0, 1.0)]:
        state.hyperparams["transition"] = jnp.float32(transition)
        updates, state = jax.jit(link.update)(UPDATES, state, noise=noise_of_batch(192))
        np.testing.assert_allclose(updates["a"], factor * UPDATES["a"], rtol=1e-6)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), None, True])
def test_the_transition_must_not_be_negative(value):
    with pytest.raises(ValueError, match=f"transition_batch_size must lie in .*got {value!r}"):
        random_matrix_scaling(value, adaptive=True)


def test_the_data_set_must_be_positive():
    with pytest.raises(ValueError, match=r"random_matrix_scaling: dataset_size must be .*got 0"):
        random_matrix_scaling(64.0, adaptive=True, dataset_size=0)
