"""AutoWU decides from the loss of all devices, and every device decides the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from tests.devices.eight.problem import on_devices

T, LANES = 40, 8
SERIES = np.where(np.arange(T) < 10, 3.0 - 0.2 * np.arange(T), 1.0 + 0.1 * (np.arange(T) - 10))
# What each device sees differs; only the mean is the series.
APART = np.random.default_rng(0).normal(size=(T, LANES))
LOSSES = (SERIES[:, None] + APART - APART.mean(axis=1, keepdims=True)).astype(np.float32)


def optimizer(axis_name=None, smoother="quasisep"):
    return adabatch.return_to_minimum(
        optax.chain(
            optax.trace(0.9),
            adabatch.scale_by_autowu(
                total_steps=T,
                steps_per_test=2,
                patience=2,
                smoother=smoother,
                axis_name=axis_name,
                watch_divergence=True,
            ),
        )
    )


def run(step, smoother):
    params = {"w": jnp.ones(3)}
    state, history = optimizer(smoother=smoother).init(params), []
    for losses in LOSSES[:24]:
        params, state = step(params, state, losses.reshape(1, LANES))
        history.append(jax.device_get((params, adabatch.metrics(state))))
    return history


def as_step(link, mean):
    def step(params, state, losses):
        value = jnp.mean(losses) if mean else losses[0, 0]
        updates, state = link.update({"w": jnp.ones(3)}, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return step


@pytest.fixture(scope="module", params=["rbf", "quasisep"])
def one_device(request):
    link = optimizer(smoother=request.param)
    return request.param, run(jax.jit(as_step(link, mean=True)), request.param)


def test_the_reference_switches_and_goes_back(one_device):
    _, history = one_device
    ends = [shown["warmup_end"] for _, shown in history]
    assert ends[-1] == adabatch.WarmupEnd.MINIMUM_PASSED and ends[8] == adabatch.WarmupEnd.RUNNING


@pytest.mark.parametrize("kind", ["shard_map checked", "shard_map unchecked", "pmap"])
def test_eight_devices_decide_as_one(kind, one_device):
    """`on_devices` hands back the state of every device as one, or fails where they differ in type."""
    smoother, expected = one_device
    step = on_devices(kind, as_step(optimizer("data", smoother), mean=False), LANES)
    for (params, shown), (wanted, told) in zip(run(step, smoother), expected, strict=True):
        np.testing.assert_allclose(params["w"], wanted["w"], rtol=1e-4)
        assert shown["warmup_end"] == told["warmup_end"]
        assert shown["tests_made"] == told["tests_made"]
        np.testing.assert_allclose(shown["learning_rate"], told["learning_rate"], rtol=5e-3)


def test_every_device_holds_the_same_state():
    """Under pmap, each device's own copy, after its own Cholesky factorisations."""
    link = optimizer("data")
    params, state = {"w": jnp.ones(3)}, optimizer().init({"w": jnp.ones(3)})

    def step(params, state, loss):
        updates, state = link.update({"w": jnp.ones(3)}, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    mapped = jax.pmap(step, "data")
    params, state = jax.tree.map(lambda x: jnp.stack([x] * LANES), (params, state))
    for losses in LOSSES[:24]:
        params, state = jax.block_until_ready(mapped(params, state, losses))
    for leaf in jax.tree.leaves((params, state)):
        copies = np.asarray(leaf)
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[:1], copies.shape))


def test_a_loss_that_is_nan_on_one_device_ends_the_warm_up_on_all():
    losses = LOSSES.copy()
    losses[12:, 5] = np.nan
    step = on_devices("shard_map checked", as_step(optimizer("data"), mean=False), LANES)
    params, state = {"w": jnp.ones(3)}, optimizer().init({"w": jnp.ones(3)})
    for row in losses[:14]:
        params, state = step(params, state, row.reshape(1, LANES))
    shown = adabatch.metrics(jax.device_get(state))
    assert shown["warmup_end"] == adabatch.WarmupEnd.DIVERGED
    assert shown["nonfinite_losses"] == 2
