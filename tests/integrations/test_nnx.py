"""nnx: a model straight in, with batch normalisation and dropout."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adabatch_jax as adabatch
from adabatch_jax.integrations.nnx import unless_skipped, value_and_grad_noise


class Net(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(4, 1, rngs=rngs)
        self.calls = nnx.Variable(jnp.int32(0))
        self.scale = nnx.Variable(jnp.float32(2.0))  # not trained, and not changed

    def __call__(self, x):
        self.calls[...] += 1
        return self.out(self.dropout(jnp.tanh(self.norm(self.hidden(x))))) * self.scale


def loss_fn(model, group):
    x, y = group
    return jnp.mean((model(x) - y) ** 2)


def params_of(model):
    return nnx.as_pure(nnx.state(model, nnx.Param))


def stats_of(model):
    return nnx.as_pure(nnx.state(model, nnx.BatchStat))


def mean_of(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


one_group = nnx.jit(nnx.value_and_grad(loss_fn))


@nnx.jit
def measure(model, groups, count):
    return value_and_grad_noise(loss_fn)(model, groups, count=count)


def test_fused_by_hand(data):
    """Every group by itself: with the key that `nnx.split_rngs` would give it, and the old statistics."""
    model, losses, grads, stats = Net(), [], [], []
    keys = nnx.clone(model)
    nnx.split_rngs(keys, splits=4)
    for j, group in enumerate(zip(*data, strict=True)):
        alone = nnx.clone(model)
        alone.dropout.rngs.key[...] = keys.dropout.rngs.key[...][j]
        alone.dropout.rngs.count[...] = jnp.uint32(0)
        loss, grad = one_group(alone, group)
        losses.append(loss)
        grads.append(nnx.as_pure(grad))
        stats.append(stats_of(alone))
    before, count = params_of(model), int(model.dropout.rngs.count[...])
    value, noise = measure(model, data, 4)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
    mean, scatter = mean_of(grads), 0.0
    chex.assert_trees_all_close(nnx.as_pure(noise.mean), mean, rtol=1e-4, atol=1e-6)
    for grad in grads:
        gaps = jax.tree.map(lambda g, m: jnp.sum((g - m) ** 2), grad, mean)
        scatter += 3 * sum(jax.tree.leaves(gaps))
    np.testing.assert_allclose(noise.scatter, scatter, rtol=1e-4)
    chex.assert_trees_all_close(stats_of(model), mean_of(stats), rtol=1e-5)
    chex.assert_trees_all_equal(params_of(model), before)
    # One step: the stream gave one key, and the counter of the model's own counts one call.
    assert int(model.dropout.rngs.count[...]) == count + 1
    assert model.dropout.rngs.key.shape == () and int(model.calls[...]) == 1
    assert float(model.scale[...]) == 2.0


def test_keys_differ_between_groups_and_between_calls(data):
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), data)
    model = Net()
    first, noise = measure(model, same, 4)
    assert float(noise.scatter) > 1e-3, "the same rows in every group: all noise is that of dropout"
    second, _ = measure(model, same, 4)
    assert abs(float(first - second)) > 1e-4


def test_of_no_examples_nothing_is_learned(data):
    model = Net()
    before = stats_of(model)
    value, _ = measure(model, data, 0)
    assert jnp.isnan(value)
    chex.assert_trees_all_equal(stats_of(model), before)
    assert int(model.calls[...]) == 0


def test_an_optimizer_takes_gradient_and_noise(data, chain):
    """A plain `nnx.Optimizer`, within one program; auxiliary data beside."""
    model = Net()
    before = params_of(model)
    optimizer = nnx.Optimizer(model, chain(), wrt=nnx.Param)

    def loss_and_rows(model, group):
        return loss_fn(model, group), {"rows": jnp.int32(len(group[0])), "seen": jnp.float32(2)}

    fn = value_and_grad_noise(loss_and_rows, has_aux=True, sum_aux={"rows": True, "seen": False})

    @nnx.jit
    def step(model, optimizer, groups):
        (value, aux), noise = fn(model, groups)
        optimizer.update(model, noise.mean, value=value, noise=noise)
        return aux, nnx.as_pure(noise.mean)

    aux, mean = step(model, optimizer, data)
    assert {k: float(v) for k, v in aux.items()} == {"rows": 12.0, "seen": 2.0}
    chex.assert_trees_all_close(
        params_of(model), jax.tree.map(jnp.subtract, before, mean), rtol=1e-5, atol=1e-7
    )
    assert adabatch.metrics(optimizer.opt_state)["num_examples"] == 12


def test_drop_in_with_a_broken_micro_batch(data, drop_in):
    x, y = data
    broken = x.at[1, 0, 0].set(jnp.nan)
    model, alone = Net(), Net()
    optimizer = nnx.Optimizer(model, drop_in(), wrt=nnx.Param)
    before = params_of(model)

    @nnx.jit
    def step(model, optimizer, group):
        with unless_skipped(model, optimizer):
            value, grads = nnx.value_and_grad(loss_fn)(model, group)
            optimizer.update(model, grads, value=value)

    step(model, optimizer, (x[0], y[0]))
    nnx.jit(loss_fn)(alone, (x[0], y[0]))
    step(model, optimizer, (broken[1], y[1]))
    chex.assert_trees_all_equal(params_of(model), before)
    assert int(model.dropout.rngs.count[...]) == 2  # the stream goes on, whatever was skipped
    chex.assert_trees_all_close(stats_of(model), stats_of(alone), rtol=1e-6)
    assert int(model.calls[...]) == 1


class Layers(nnx.Module):
    """Two layers stacked by `nnx.vmap`, each with a stream of its own."""

    def __init__(self):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))

        self.layers = stacked(nnx.Rngs(0))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return layer(x)

        return forward(x, self.layers)[:, :1]


@pytest.mark.slow
def test_stacked_layers_and_lanes(data):
    """The keys of the groups carry the axes of the loops and lanes before those of the layers.

    Slow: a model and programs of its own.
    """
    model = Layers()
    lanes = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (2, 2, *x.shape[1:])), data)

    @nnx.jit
    def measure(model, groups):
        return value_and_grad_noise(loss_fn, lanes=True)(model, groups)

    _, noise = measure(model, lanes)
    assert int(noise.num_groups) == 4 and float(noise.scatter) > 1e-3
    assert model.layers.layers[1].rngs.count[...].tolist() == [1, 1]


@pytest.mark.slow
def test_every_device_has_its_own_keys(data):
    """Slow: a program of its own."""
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1, None], (2, 1, *x.shape[1:])), data)
    graphdef, state = nnx.split(Net())

    def device(group):
        model = nnx.merge(graphdef, state, copy=True)
        _, noise = value_and_grad_noise(loss_fn, axis_name="data")(model, group)
        return noise.scatter

    scatter = jax.jit(jax.vmap(device, axis_name="data"))(same)
    assert float(scatter[0]) > 1e-3


def test_other_variables_may_be_trained(data):
    """`wrt` decides, and what is not trained is not touched."""
    model = Net()

    @nnx.jit
    def measure(model, groups):
        return value_and_grad_noise(loss_fn, wrt=nnx.PathContains("out"))(model, groups)

    _, noise = measure(model, data)
    assert set(noise.mean) == {"out"}
    assert not np.allclose(noise.mean["out"]["kernel"][...], 0)
    with pytest.raises(ValueError, match="same leading axes"):
        measure(model, (data[0], data[1][:2]))


def test_optax_keeps_its_own_way(data):
    """Nothing of ours in the optimizer: nothing is skipped, and nothing is kept back."""
    model = Net()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    with unless_skipped(model, optimizer):
        _, grads = one_group(model, jax.tree.map(lambda x: x[0], data))
        optimizer.update(model, grads)
    assert int(model.calls[...]) == 1
