"""Equinox: models with static leaves, batch normalisation and dropout, in either form."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adabatch_jax as adabatch
from adabatch_jax.integrations.equinox import for_models, value_and_grad_noise


class Net(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear
    activation: callable

    def __init__(self):
        first, second = jax.random.split(jax.random.key(0))
        self.hidden = eqx.nn.Linear(3, 4, key=first)
        self.norm = eqx.nn.BatchNorm(4, axis_name="rows", momentum=0.9, mode="ema")
        self.dropout = eqx.nn.Dropout(0.5)
        self.out = eqx.nn.Linear(4, 1, key=second)
        self.activation = jnp.tanh  # a leaf that is no array

    def __call__(self, x, state, key):
        x, state = self.norm(self.hidden(x), state)
        return self.out(self.dropout(self.activation(x), key=key)), state


MODEL, STATE = eqx.nn.make_with_state(Net)()
KEYS = jax.random.split(jax.random.key(1), 4)


def loss_fn(model, group, state):
    x, y, key = group
    keys = jax.random.split(key, len(x))
    forward = jax.vmap(model, axis_name="rows", in_axes=(0, None, 0), out_axes=(0, None))
    out, state = forward(x, state, keys)
    return jnp.mean((out - y) ** 2), state


one_group = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn, has_aux=True))


def arrays(model):
    return eqx.filter(model, eqx.is_inexact_array)


def mean_of(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def test_fused_by_hand(data, chain):
    groups = (*data, KEYS)
    optimizer = for_models(chain())
    fn = value_and_grad_noise(loss_fn, has_aux=True)

    @eqx.filter_jit
    def step(model, state, opt_state, groups):
        (value, state), noise = fn(model, groups, state)
        updates, opt_state = optimizer.update(
            noise.mean, opt_state, model, value=value, noise=noise
        )
        return eqx.apply_updates(model, updates), state, opt_state

    model, state, opt_state = step(MODEL, STATE, optimizer.init(MODEL), groups)
    by_hand = [one_group(MODEL, group, STATE) for group in zip(*groups, strict=True)]
    outs, grads = zip(*by_hand, strict=True)
    stats = [jax.tree.leaves(state) for _, state in outs]
    for i, leaf in enumerate(jax.tree.leaves(state)):
        if leaf.dtype == bool:  # whether it is the first time: as after one step
            assert not leaf and jax.tree.leaves(STATE)[i]
        else:
            np.testing.assert_allclose(leaf, np.mean([s[i] for s in stats], axis=0), rtol=1e-5)
    expected = jax.tree.map(jnp.subtract, arrays(MODEL), mean_of(grads))
    chex.assert_trees_all_close(
        jax.tree.leaves(arrays(model)), jax.tree.leaves(expected), rtol=1e-4, atol=1e-6
    )
    assert model.activation is jnp.tanh
    assert adabatch.metrics(opt_state)["num_examples"] == 12


def test_drop_in_with_a_broken_micro_batch(data, drop_in):
    x, y = data
    broken = x.at[1, 0, 0].set(jnp.nan)
    optimizer = for_models(drop_in(initial=6))

    @eqx.filter_jit
    def step(model, state, opt_state, group):
        before = jax.tree.map(lambda x: x, state)  # the layers invalidate the object that they get
        (value, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(
            model, group, state
        )
        updates, opt_state = optimizer.update(grads, opt_state, model, value=value)
        state = adabatch.unless_skipped(opt_state, state, before)
        return eqx.apply_updates(model, updates), state, opt_state

    model, state, opt_state = MODEL, STATE, optimizer.init(MODEL)
    clean, grads = STATE, []
    for j, x_j in ((0, x[0]), (1, broken[1]), (2, x[2])):
        group = (x_j, y[j], KEYS[j])
        model, state, opt_state = step(model, state, opt_state, group)
        if j != 1:
            (_, clean), grad = one_group(MODEL, group, clean)
            grads.append(grad)
        chex.assert_trees_all_close(jax.tree.leaves(state), jax.tree.leaves(clean), rtol=1e-6)
    expected = jax.tree.map(jnp.subtract, arrays(MODEL), mean_of(grads))
    chex.assert_trees_all_close(
        jax.tree.leaves(arrays(model)), jax.tree.leaves(expected), rtol=1e-4, atol=1e-6
    )


def test_a_filter_says_what_is_trained():
    model = eqx.nn.Linear(3, 1, key=jax.random.key(0))
    spec = eqx.tree_at(lambda m: m.weight, jax.tree.map(lambda _: False, model), True)
    fn = value_and_grad_noise(lambda m, x: jnp.mean(jax.vmap(m)(x)), filter_spec=spec)
    _, noise = fn(model, jnp.ones((2, 2, 3)))
    assert noise.mean.bias is None and noise.mean.weight.tolist() == [[1.0, 1.0, 1.0]]


def test_what_is_no_array_reaches_the_loss(data):
    """Further arguments, too, may hold anything."""
    fn = value_and_grad_noise(lambda w, x, f, two: jnp.mean(f(w * x)) * two["n"])
    value, _ = fn(jnp.float32(1), jnp.ones((2, 2)), jnp.square, {"n": 2.0, "name": "two"})
    assert float(value) == 2.0
    with pytest.raises(ValueError, match=r"groups\[1\] is no array"):
        fn(jnp.float32(1), (jnp.ones((2, 2)), "two"), jnp.square, {"n": 2.0})
