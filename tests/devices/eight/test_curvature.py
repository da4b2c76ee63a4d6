"""Curvature over eight devices is that of all examples together, and so is what is decided by it."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from tests.devices.eight.problem import (
    LANES,
    first_params,
    flat,
    groups_of,
    loss_fn,
    mesh_of,
    on_devices,
)

LOOPS_USED, STEPS = 5, 6
KINDS = ["pmap", "shard_map checked", "shard_map unchecked", "sharded jit"]
MAPPED = KINDS[:3]
# Micro-batches that each device uses: different numbers, one of them zero; all; none.
COUNTS = np.array([[1, 2, 3, 4, 5, 0, 2, 3], [LOOPS_USED] * LANES, [0] * LANES])
KEY = jax.random.key(7)


def few_groups():
    return jax.tree.map(lambda x: x[:LOOPS_USED], groups_of(0))


def examples(groups):
    """[loops, lanes, group, …] → [examples, …]."""
    return jax.tree.map(lambda x: x.reshape((-1, x.shape[-1])), groups)


def vector():
    keys = jax.random.split(jax.random.key(1), 4)
    params = first_params()
    return {k: jax.random.normal(i, params[k].shape) for k, i in zip(params, keys, strict=True)}


def model(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def squared_error(outputs, y):
    return jnp.mean((outputs - y) ** 2)


def hessian(params, groups, **options):
    return adabatch.curvature.hessian_vector_product(loss_fn, params, groups, **options)


def gauss_newton(params, groups, **options):
    return adabatch.curvature.gauss_newton_vector_product(
        model, squared_error, params, *groups, **options
    )


MATRICES = {"hessian": hessian, "gauss_newton": gauss_newton}


def everything(params, v, groups, counts, axis=None):
    """Products with both matrices, extremes, and the noise: what the tests below compare."""
    found, micro = {}, flat(groups)
    for name, matrix in MATRICES.items():
        whole = matrix(params, examples(groups), axis_name=axis)
        found[name] = {"whole": whole(v)}
        if counts is not None:
            found[name]["counted"] = jax.lax.map(
                lambda own, m=matrix: m(params, micro, count=own, axis_name=axis)(v), counts
            )
    whole = hessian(params, examples(groups), axis_name=axis)
    spectrum = adabatch.curvature.lanczos_spectrum(whole, params, KEY, num_steps=12)
    found["extremes"] = spectrum.largest, spectrum.smallest
    for probe in () if counts is None else ("ritz", "random"):
        found[probe] = adabatch.curvature.hessian_noise(
            loss_fn, params, micro, KEY, probe=probe, num_steps=12, axis_name=axis
        )
    return found


@functools.cache
def on_eight(kind):
    """All of it in one mapped program. Sharded jit has no axis, and no counts of one device."""

    def step(params, v, groups):
        if kind == "sharded jit":
            return everything(params, v, groups, None)
        own = jnp.asarray(COUNTS)[:, jax.lax.axis_index("data")]
        return everything(params, v, groups, own, "data")

    return jax.device_get(on_devices(kind, step)(first_params(), vector(), few_groups()))


@pytest.fixture(scope="module")
def on_one():
    """One device: all examples, and for the counts the examples that they leave, picked by hand."""

    @jax.jit
    def run(params, v, groups, left):
        found = everything(params, v, groups, jnp.array([0]))
        for name, matrix in MATRICES.items():
            rows = matrix(params, left)(v), found[name]["whole"], jax.tree.map(jnp.zeros_like, v)
            found[name]["counted"] = jax.tree.map(lambda *x: jnp.stack(x), *rows)
        return found

    groups, used = few_groups(), np.arange(LOOPS_USED)[:, None] < COUNTS[0]
    left = jax.tree.map(lambda x: x[used].reshape((-1, x.shape[-1])), groups)
    return jax.device_get(run(first_params(), vector(), groups, left))


def test_the_cases_differ(on_one):
    """Or the tests below could pass whatever the devices do."""
    for name in MATRICES:
        own, whole, none = on_one[name]["counted"]["w1"]
        assert np.abs(whole - own).max() > 0.01 * np.abs(whole).max() > 0
        assert not none.any()
    assert on_one["extremes"][0] > 1.0 and on_one["extremes"][1] < -0.05
    assert on_one["ritz"] > 2 * on_one["random"] > 0


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_all_examples(kind, name, on_one):
    found = on_eight(kind)[name]
    assert len(found) == (1 if kind == "sharded jit" else 2)
    expected = {k: on_one[name][k] for k in found}
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_are_those_of_all_examples(kind, on_one):
    np.testing.assert_allclose(on_eight(kind)["extremes"], on_one["extremes"], rtol=1e-4)


@pytest.mark.parametrize("probe", ["ritz", "random"])
@pytest.mark.parametrize("kind", MAPPED)
def test_the_noise_of_the_hessian_is_that_of_all_groups(kind, probe, on_one):
    np.testing.assert_allclose(on_eight(kind)[probe], on_one[probe], rtol=1e-3)


def learner(axis_name=None):
    return adabatch.scale_by_lanczos(
        "heavy_ball", refresh_every=2, num_steps=8, ema_decay=0.5, axis_name=axis_name
    )


def ridge_loss(params, batch):
    """No negative curvature, with which the momentum would always be the largest one allowed."""
    return loss_fn(params, batch) + sum(jnp.sum(x**2) for x in params.values())


def training_step(link, axis_name=None, cast=False):
    """The gradient of two groups of each lane, the curvature of the first of them."""

    def step(params, state, groups):
        batch, curvature = examples(groups), examples(jax.tree.map(lambda x: x[:1], groups))
        own = jax.lax.pcast(params, axis_name, to="varying") if cast else params
        gradient = jax.grad(loss_fn)(own, batch)
        if axis_name:
            gradient = jax.lax.pmean(gradient, axis_name)
        updates, state = link.update(
            gradient, state, params, value_fn=lambda p: ridge_loss(p, curvature)
        )
        return optax.apply_updates(params, updates), state

    return step


def few_of(step):
    return jax.tree.map(lambda x: x[:2], groups_of(step))


def train(step):
    params, state, history = first_params(), learner().init(first_params()), []
    for index in range(STEPS):
        params, state = step(params, state, few_of(index))
        history.append(jax.device_get((params, state)))
    return history


@pytest.fixture(scope="module")
def one_device_run():
    return train(jax.jit(training_step(learner())))


def test_the_reference_refreshes_and_moves(one_device_run):
    states = [state for _, state in one_device_run]
    assert [int(s.refreshes) for s in states] == [1, 1, 2, 2, 3, 3]
    rates = {float(s.lanczos_learning_rate) for s in states}
    assert len(rates) == 3 and min(rates) > 0
    assert 0 < states[-1].lanczos_momentum < 0.9
    assert np.abs(one_device_run[-1][0]["w1"] - first_params()["w1"]).max() > 0.05


def assert_as_on_one_device(found, expected):
    for (params, state), (wanted, told) in zip(found, expected, strict=True):
        assert int(state.refreshes) == int(told.refreshes)
        for name in ("lanczos_learning_rate", "lanczos_momentum", "curvature_largest"):
            np.testing.assert_allclose(getattr(state, name), getattr(told, name), rtol=2e-3)
        chex.assert_trees_all_close(params, wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["shard_map checked", "shard_map unchecked", "sharded jit"])
def test_the_learner_decides_on_eight_devices_as_on_one(kind, one_device_run):
    """With the check on, the P() of `on_devices` demands that the state be typed as replicated."""
    axis_name, traces = None if kind == "sharded jit" else "data", []
    inner = training_step(learner(axis_name), axis_name, cast=kind == "shard_map checked")

    def step(*arguments):
        traces.append(kind)
        return inner(*arguments)

    found = train(on_devices(kind, step))
    assert len(traces) == 1  # and so one program
    assert_as_on_one_device(found, one_device_run)


def test_every_device_holds_the_same_state(one_device_run):
    """Under pmap, bit by bit: each device's own copy, after its own Lanczos runs."""
    traces = []
    inner = training_step(learner("data"), "data")

    def step(*arguments):
        traces.append(1)
        return inner(*arguments)

    mapped = jax.pmap(step, "data", in_axes=(0, 0, 1))
    params, state = first_params(), learner().init(first_params())
    everywhere = jax.NamedSharding(mesh_of(LANES), jax.P("data"))
    params, state = jax.device_put(
        jax.tree.map(lambda x: jnp.stack([x] * LANES), (params, state)), everywhere
    )
    found = []
    for index in range(STEPS):
        groups = jax.tree.map(lambda x: x[:, :, None], few_of(index))
        params, state = jax.block_until_ready(mapped(params, state, groups))
        for leaf in jax.tree.leaves((params, state)):
            copies = np.asarray(leaf)
            np.testing.assert_array_equal(copies, np.broadcast_to(copies[:1], copies.shape))
        found.append(jax.tree.map(lambda x: np.asarray(x)[0], (params, state)))
    assert len(traces) == 1
    assert_as_on_one_device(found, one_device_run)
