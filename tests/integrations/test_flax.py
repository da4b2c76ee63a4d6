"""Flax linen: what the train state hands on, keeps clean, averages and counts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from flax.training import train_state

import adabatch_jax as adabatch
from adabatch_jax.integrations.flax import TrainState


class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train=True):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(linen.Dense(4)(x))
        x = linen.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        return linen.Dense(1)(x)


MODEL = Net()
VARIABLES = MODEL.init(jax.random.key(0), jnp.ones((3, 3)), train=False)
PARAMS, STATS = VARIABLES["params"], VARIABLES["batch_stats"]
KEYS = jax.random.split(jax.random.key(1), 4)


def loss_fn(params, group, stats):
    x, y, key = group
    variables = {"params": params, "batch_stats": stats}
    out, new = MODEL.apply(variables, x, rngs={"dropout": key}, mutable=["batch_stats"])
    return jnp.mean((out - y) ** 2), new["batch_stats"]


one_group = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


def mean_of(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def less(params, gradient):
    return jax.tree.map(jnp.subtract, params, gradient)


def create(tx, **fields):
    fields = {"batch_stats": STATS} | fields
    return TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx, **fields)


@jax.jit
def drop_in_step(state, group):
    (value, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, group, state.batch_stats
    )
    return state.apply_gradients(grads=grads, value=value, batch_stats=stats)


def test_fused_with_batch_normalisation_and_dropout(data, chain):
    """By hand: gradient and statistics are means over the groups, each with a key of its own."""
    groups = (*data, KEYS)
    fn = adabatch.value_and_grad_noise(loss_fn, has_aux=True)

    @jax.jit
    def step(state, groups):
        (value, stats), noise = fn(state.params, groups, state.batch_stats)
        return state.apply_gradients(grads=noise.mean, value=value, noise=noise, batch_stats=stats)

    state = step(create(chain()), groups)
    by_hand = [one_group(PARAMS, group, STATS) for group in zip(*groups, strict=True)]
    outs, grads = zip(*by_hand, strict=True)
    close = dict(rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(state.params, less(PARAMS, mean_of(grads)), **close)
    chex.assert_trees_all_close(state.batch_stats, mean_of([s for _, s in outs]), **close)
    assert (int(state.step), int(state.optimizer_steps)) == (1, 1)
    assert adabatch.metrics(state)["num_examples"] == 12


def test_drop_in_with_a_broken_micro_batch(data, drop_in):
    """It counts in neither the gradient nor the statistics; the average moves with the parameters."""
    x, y = data
    calls = [0, 1, None, 2, 3]  # None: one image of the group 1 is NaN
    broken = x.at[1, 0, 0].set(jnp.nan)
    state, stats, grads = create(drop_in(), ema_decay=0.9), STATS, []
    for j in calls:
        group = (broken[1], y[1], KEYS[1]) if j is None else (x[j], y[j], KEYS[j])
        state = drop_in_step(state, group)
        if j is not None:
            (_, stats), grad = one_group(PARAMS, group, stats)
            grads.append(grad)
        chex.assert_trees_all_close(state.batch_stats, stats, rtol=1e-6)
        if j != 3:
            chex.assert_trees_all_equal(state.params, PARAMS)
            chex.assert_trees_all_equal(state.ema_params, PARAMS)
    after = less(PARAMS, mean_of(grads))
    chex.assert_trees_all_close(state.params, after, rtol=1e-4, atol=1e-6)
    average = jax.tree.map(lambda p, q: 0.9 * p + 0.1 * q, PARAMS, after)
    chex.assert_trees_all_close(state.ema_params, average, rtol=1e-4, atol=1e-6)
    assert (int(state.step), int(state.optimizer_steps)) == (5, 1)
    assert int(adabatch.metrics(state)["skipped_micro_batches"]) == 1
    assert drop_in_step._cache_size() == 1


def test_every_keyword_that_is_no_field_reaches_the_optimizer():
    """Fields of a subclass need no default, and none goes to the optimizer, not those of ours either."""

    class Own(TrainState):
        batch_stats: dict  # once more, as subclasses of Flax's own class have it
        key: jax.Array

    heard = {}

    def update(updates, state, params=None, **told):
        heard.update(told)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    w = {"w": jnp.zeros(2)}
    state = Own.create(apply_fn=None, params=w, tx=tx, batch_stats={}, key=KEYS[0])
    new = state.apply_gradients(grads=w, value=1.0, num_examples=7, loss=2.0, key=KEYS[1])
    assert heard == {"value": 1.0, "num_examples": 7, "loss": 2.0}
    assert new.key == KEYS[1] and new.tx is tx and new.batch_stats == {}


def test_without_what_is_ours_it_is_that_of_flax():
    grads = {"w": jnp.ones(2)}
    tx, fields = optax.sgd(0.1, momentum=0.9), dict(apply_fn=None, params={"w": jnp.arange(2.0)})
    ours = TrainState.create(tx=tx, **fields).apply_gradients(grads=grads, value=1.0)
    theirs = train_state.TrainState.create(tx=tx, **fields).apply_gradients(grads=grads)
    chex.assert_trees_all_equal(ours.params, theirs.params)
    chex.assert_trees_all_equal(ours.opt_state, theirs.opt_state)
    assert int(ours.step) == theirs.step == 1


def test_the_average_is_in_float32_at_least(drop_in):
    params = {"half": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(2)}
    state = TrainState.create(apply_fn=None, params=params, tx=drop_in(), ema_decay=0.999)
    assert {x.dtype for x in jax.tree.leaves(state.ema_params)} == {np.dtype("float32")}
    assert state.ema_params["single"] is not params["single"]  # a state of its own can be donated
    with pytest.raises(
        ValueError, match=r"TrainState: ema_decay must lie in \[0.0, 1.0\), got 1.5"
    ):
        create(drop_in(), ema_decay=1.5)
