"""An existing Optax or Flax loop keeps working around and inside the controller."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import adabatch_jax as adabatch
from tests.marks import slow

MICRO = 4
WEIGHTS = np.random.default_rng(7).normal(size=5).astype(np.float32)


def controller(first=8, largest=1024, eta=0.5):
    return adabatch.adapt_batch_size(
        adabatch.norm_test(eta), initial_batch_size=first, max_batch_size=largest, multiple_of=MICRO
    )


def batches(count, seed=0):
    """Noisy linear regression: [count, MICRO, 5] and [count, MICRO]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, MICRO, 5)).astype(np.float32)
    y = x @ WEIGHTS + rng.normal(size=(count, MICRO)).astype(np.float32)
    return x, y


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"].sum(axis=1) + params["b"] - y) ** 2)


def first_params():
    return {"w": jnp.full((5, 2), 0.1, jnp.float32), "b": jnp.zeros((), jnp.float32)}


def train(optimizer, data, with_noise=False):
    """One jitted step per micro-batch: the last parameters and state, and all batch sizes."""
    traces, sizes = [], []

    @jax.jit
    def step(params, state, batch):
        traces.append(1)
        value, gradient = jax.value_and_grad(loss_fn)(params, batch)
        extra_args = {"value": value}
        if with_noise:
            groups = adabatch.split_groups(batch, MICRO)
            extra_args["noise"] = adabatch.value_and_grad_noise(loss_fn)(params, groups)[1]
        updates, state = optimizer.update(gradient, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    params = first_params()
    state = optimizer.init(params)
    for batch in zip(*data, strict=True):
        params, state = step(params, state, batch)
        sizes.append(int(adabatch.get_batch_size(state)))
    assert len(traces) == 1
    return params, state, sizes


DIRECTIONS = {
    "adam": lambda: optax.adam(0.05),
    "clipped sgd": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=2),
    "partition": lambda: optax.partition(
        {"slow": optax.sgd(0.01), "fast": optax.adam(0.05)}, {"w": "fast", "b": "slow"}
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1),
    "muon": lambda: optax.contrib.muon(0.05),
}


@pytest.mark.parametrize(
    "name", ["partition", *slow("adam", "clipped sgd", "apply_if_finite", "schedule_free", "muon")]
)
def test_with_a_batch_that_cannot_grow_it_is_multi_steps(name):
    data = batches(48)
    inner = optax.chain(controller(first=8, largest=8), DIRECTIONS[name]())
    params, _, _ = train(adabatch.adaptive_multi_steps(inner, micro_batch_size=MICRO), data)

    expected, plain = first_params(), optax.MultiSteps(DIRECTIONS[name](), every_k_schedule=2)
    state, step = plain.init(expected), jax.jit(plain.update)
    for batch in zip(*data, strict=True):
        updates, state = step(jax.grad(loss_fn)(expected, batch), state, expected)
        expected = optax.apply_updates(expected, updates)
    assert int(state.gradient_step) == 24
    chex.assert_trees_all_close(params, expected, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["muon", *slow("adam", "apply_if_finite", "clipped sgd", "partition", "schedule_free")]
)
def test_the_batch_grows_around_any_direction_in_one_trace(name):
    inner = optax.chain(controller(), DIRECTIONS[name]())
    optimizer = adabatch.adaptive_multi_steps(inner, micro_batch_size=MICRO)
    _, _, sizes = train(optimizer, batches(300))
    assert sizes[0] == 8 and sizes[-1] >= 64
    assert sizes == sorted(sizes)


def test_clipping_changes_no_batch_size():
    """The noise is that of the gradient before clipping. (With rate 0 all runs see the same.)"""
    clip, still = optax.clip_by_global_norm(1e-3), optax.sgd(0.0)
    data = batches(60)

    def dropped_in(*links):
        inner = optax.chain(*links, still)
        return train(adabatch.adaptive_multi_steps(inner, micro_batch_size=MICRO), data)[2]

    def fused(*links):
        return train(optax.chain(*links, still), data, with_noise=True)[2]

    sizes = dropped_in(controller())
    assert sizes[-1] > 8 and sizes == dropped_in(clip, controller())
    sizes = fused(controller())
    assert sizes[-1] > 8 and sizes == fused(clip, controller())


@pytest.mark.parametrize("wrap", [False, True], ids=["fused", "adaptive_multi_steps"])
def test_apply_if_finite_outside_drops_a_broken_micro_batch(wrap):
    x, y = batches(6)
    x[3] = np.nan
    optimizer = optax.chain(controller(), optax.sgd(0.1))
    if wrap:
        optimizer = adabatch.adaptive_multi_steps(optimizer, micro_batch_size=MICRO)
    guarded = optax.apply_if_finite(optimizer, max_consecutive_errors=3)
    params, state, sizes = train(guarded, (x, y), with_noise=not wrap)
    without = tuple(np.delete(a, 3, axis=0) for a in (x, y))
    expected, _, sizes_without = train(guarded, without, with_noise=not wrap)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)
    assert sizes[:3] + sizes[4:] == sizes_without and sizes[3] == sizes[2]
    assert int(state.total_notfinite) == 1


def test_two_controllers_in_a_partition_are_refused():
    parts = {"a": controller(), "b": controller()}
    state = optax.partition(parts, {"w": "a", "b": "b"}).init(first_params())
    with pytest.raises(ValueError, match=r"2 batch-size controllers.*optax\.partition"):
        adabatch.get_batch_size(state)


class Regression(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(5, 4, rngs=rngs)
        self.out = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))[..., 0]


def test_nnx_optimizer_with_a_fused_step():
    """Every step is handed 64 groups; how many it computes is read from the optimizer's state."""
    traces = []
    model = Regression(nnx.Rngs(0))
    tx = optax.chain(controller(first=8, largest=256), optax.sgd(0.02))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, groups):
        traces.append(1)
        graph, params = nnx.split(model)

        def loss(params, group):
            x, y = group
            return jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)

        count = adabatch.get_batch_size(optimizer.opt_state) // MICRO
        value, noise = adabatch.value_and_grad_noise(loss)(params, groups, count=count)
        optimizer.update(model, noise.mean, value=value, noise=noise)
        return noise.num_examples

    def loss_on_all():
        x, y = batches(64)
        return float(jnp.mean((model(x) - y) ** 2))

    sizes, before = [], loss_on_all()
    for index in range(30):
        size = int(adabatch.get_batch_size(optimizer.opt_state))
        assert int(step(model, optimizer, batches(64, seed=index + 1))) == size
        sizes.append(size)
    assert len(traces) == 1
    assert sizes[0] == 8 and len(set(sizes)) >= 3
    assert loss_on_all() < before
    assert adabatch.metrics(optimizer.opt_state)["num_examples"] == sum(sizes)


def test_nnx_optimizer_with_adaptive_multi_steps():
    model = Regression(nnx.Rngs(0))
    inner = optax.chain(controller(), optax.adam(0.01))
    tx = adabatch.adaptive_multi_steps(inner, micro_batch_size=MICRO)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        x, y = batch
        value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads, value=value)

    changed = []
    for batch in zip(*batches(60), strict=True):
        before = model.out.kernel[...]
        step(model, optimizer, batch)
        changed.append(bool(jnp.any(before != model.out.kernel[...])))
        assert changed[-1] == bool(adabatch.has_updated(optimizer.opt_state))
    assert 2 < sum(changed) < 30
    assert int(adabatch.get_batch_size(optimizer.opt_state)) > 8


@pytest.mark.slow
def test_linen_with_a_step_by_hand():
    """Slow: a run of a Flax model."""
    model = linen.Sequential([linen.Dense(4), linen.relu, linen.Dense(1)])
    x, y = batches(60)
    params = model.init(jax.random.key(0), x[0])
    inner = optax.chain(controller(), optax.adam(0.01))
    optimizer = adabatch.adaptive_multi_steps(inner, micro_batch_size=MICRO)

    @jax.jit
    def step(params, opt_state, x, y):
        def loss(params):
            return jnp.mean((model.apply(params, x)[..., 0] - y) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for batch in zip(x, y, strict=True):
        params, opt_state = step(params, opt_state, *batch)
    shown = adabatch.metrics(opt_state)
    assert int(shown["next_batch_size"]) > 8
    assert shown["num_examples"] + MICRO * int(shown["micro_batches"]) == 60 * MICRO
