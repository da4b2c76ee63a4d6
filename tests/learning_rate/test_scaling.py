"""`scale_by_batch_size`: the learning rate follows the batch by a rule."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from adabatch_jax import linear_scaling, scale_by_batch_size, sqrt_scaling

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
    assert applied(link, batch_size=128) == 2.0
    assert applied(link, batch_size=128, noise=noise_of_batch(1024)) == 2.0


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
    factory = optax.inject_hyperparams(scale_by_batch_size, static_args=("rule",))
    link = factory(linear_scaling(), base_batch_size=64)
    updates, _ = link.update(jnp.ones(1), link.init(jnp.ones(1)), noise=noise_of_batch(256))
    assert updates.tolist() == [4.0]


def test_a_missing_batch_size_says_how_to_pass_it():
    link = scale_by_batch_size(linear_scaling(), base_batch_size=64)
    with pytest.raises(ValueError, match=r"scale_by_batch_size .*noise=noise.*batch_size="):
        jax.eval_shape(link.update, UPDATES, link.init(UPDATES))


@pytest.mark.parametrize("value", [0, -64, float("nan"), None, True])
def test_the_base_must_be_positive(value):
    with pytest.raises(ValueError, match=f"base_batch_size must be .*got {value!r}"):
        scale_by_batch_size(linear_scaling(), base_batch_size=value)


def test_the_rule_must_be_callable():
    with pytest.raises(ValueError, match="rule must be callable, got 'sqrt'"):
        scale_by_batch_size("sqrt", base_batch_size=64)
