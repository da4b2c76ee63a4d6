"""Flax linen, nnx, Equinox and plain functions: the loop is theirs, only the optimizer is new."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import adabatch_jax as adabatch
from adabatch_jax.integrations.flax import TrainState


def cross_entropy(logits, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.slow
def test_plain_functions(prove, controller, around, first_params, loss_fn):
    """Slow: a whole run."""
    optimizer = around(optax.chain(controller(), optax.adam(0.01)))

    def step(carry, x, y):
        params, opt_state = carry
        value, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=value)
        return (optax.apply_updates(params, updates), opt_state), value

    first = first_params, optimizer.init(first_params)
    last = prove(step, first, state=lambda carry: carry[1])
    # Every batch was as large as the state said when it began, and not an example was lost.
    ends = np.flatnonzero(last.moved)
    assert (np.diff(ends, prepend=-1) * 8 == last.sizes[ends]).all()
    shown = adabatch.metrics(last.carry[1])
    assert shown["num_examples"] + 8 * int(shown["micro_batches"]) == 8 * len(last.sizes)


def remember_value():
    """A link that wants the loss, as AutoWU does: it keeps the last that it was told."""

    def update(updates, state, params=None, *, value=-1.0, **_):
        return updates, jnp.asarray(value, jnp.float32)

    return optax.GradientTransformationExtraArgs(lambda _: jnp.float32(0), update)


@pytest.mark.slow
def test_linen_with_a_train_state(prove, controller, around, digits):
    """What a link inside is told is the mean loss over the micro-batches of its batch.

    Slow: a run of a Flax model.
    """
    model = linen.Sequential([linen.Dense(16), linen.relu, linen.Dense(10)])
    tx = around(optax.chain(controller(), remember_value(), optax.adam(0.01)))
    params = model.init(jax.random.key(0), digits[0][:1])
    first = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def step(train_state, x, y):
        value, grads = jax.value_and_grad(
            lambda params: cross_entropy(train_state.apply_fn(params, x), y)
        )(train_state.params)
        return train_state.apply_gradients(grads=grads, value=value), value

    last = prove(step, first, state=lambda train_state: train_state.opt_state)
    assert int(last.carry.step) == len(last.losses)
    assert int(last.carry.optimizer_steps) == last.moved.sum()
    before, end = np.flatnonzero(last.moved)[-2:]
    told = last.carry.opt_state.inner_opt_state[1]
    np.testing.assert_allclose(told, last.losses[before + 1 : end + 1].mean(), rtol=1e-5)


class Normalised(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(linen.Dense(16)(x))
        return linen.Dense(10)(linen.relu(x))


def test_linen_with_batch_normalisation_and_one_broken_image(prove, controller, around, digits):
    """The micro-batch is left out of the gradient by the wrapper, and of the statistics by the loop."""
    images, labels = digits
    images = images.copy()
    images[8 * 50, 10] = np.nan
    model = Normalised()
    optimizer = around(optax.chain(controller(), optax.adam(0.01)))
    variables = model.init(jax.random.key(0), images[:8], train=False)
    params, stats = variables["params"], variables["batch_stats"]

    def step(carry, x, y):
        params, stats, opt_state = carry

        def loss(params):
            given = {"params": params, "batch_stats": stats}
            logits, new = model.apply(given, x, train=True, mutable=["batch_stats"])
            return cross_entropy(logits, y), new["batch_stats"]

        (value, new_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=value)
        stats = adabatch.unless_skipped(opt_state, new_stats, stats)
        return (optax.apply_updates(params, updates), stats, opt_state), value

    first = params, stats, optimizer.init(params)
    last = prove(step, first, state=lambda carry: carry[2], data=(images, labels))
    params, stats, opt_state = last.carry
    assert np.flatnonzero(np.isnan(last.losses)).tolist() == [50]
    assert int(adabatch.metrics(opt_state)["skipped_micro_batches"]) == 1
    logits = model.apply({"params": params, "batch_stats": stats}, digits[0], train=False)
    assert (logits.argmax(1) == labels).mean() > 0.5  # NaN would leave a tenth


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.hidden(x))))


def test_nnx_with_dropout(prove, controller, around):
    """The model's own state, here the count of its random numbers, moves with every micro-batch."""
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, around(optax.chain(controller(), optax.adam(0.01))), wrt=nnx.Param
    )

    def step(carry, x, y):
        model, optimizer = carry
        value, grads = nnx.value_and_grad(lambda model: cross_entropy(model(x), y))(model)
        optimizer.update(model, grads, value=value)
        return (model, optimizer), value

    first = (model, optimizer)
    last = prove(step, first, state=lambda carry: carry[1].opt_state, jit=nnx.jit)
    assert int(model.dropout.rngs.count[...]) == len(last.losses)


def equinox_net():
    # An MLP holds its activation function: a leaf that is no array, so gradients hold None there.
    return eqx.nn.MLP(64, 10, 16, 1, key=jax.random.key(0))


def mean_loss(model, x, y):
    return cross_entropy(jax.vmap(model)(x), y)


def test_equinox(prove, controller, around):
    optimizer = around(optax.chain(controller(), optax.adam(0.01)))
    model = equinox_net()

    def step(carry, x, y):
        model, opt_state = carry
        value, grads = eqx.filter_value_and_grad(mean_loss)(model, x, y)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=value)
        return (eqx.apply_updates(model, updates), opt_state), value

    first = (model, optimizer.init(eqx.filter(model, eqx.is_inexact_array)))
    last = prove(step, first, state=lambda carry: carry[1], jit=eqx.filter_jit)
    assert last.carry[0].activation is model.activation


def test_equinox_fused(digits, controller):
    """All of a batch in one call: `eqx.partition` parts what is differentiated from what is not."""
    images, labels = digits
    params, static = eqx.partition(equinox_net(), eqx.is_inexact_array)
    optimizer = optax.chain(controller(), optax.adam(0.01))
    measure = adabatch.value_and_grad_noise(
        lambda params, group: mean_loss(eqx.combine(params, static), *group)
    )

    @jax.jit
    def step(params, opt_state, groups):
        count = adabatch.get_batch_size(opt_state) // 8
        value, noise = measure(params, groups, count=count)
        updates, opt_state = optimizer.update(
            noise.mean, opt_state, params, noise=noise, value=value
        )
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses, sizes = optimizer.init(params), [], []
    for number in range(40):
        rows = np.random.default_rng(number).permutation(1024)[:128]
        sizes.append(int(adabatch.get_batch_size(opt_state)))
        groups = adabatch.split_groups((images[rows], labels[rows]), 16)
        params, opt_state, value = step(params, opt_state, groups)
        losses.append(float(value))
    assert step._cache_size() == 1
    assert len(set(sizes)) >= 4 and np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert adabatch.metrics(opt_state)["num_examples"] == sum(sizes)
