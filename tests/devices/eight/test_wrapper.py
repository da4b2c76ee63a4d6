"""`adaptive_multi_steps` over devices: gradients that were averaged already, and broken ones."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from tests.devices.eight.problem import (
    GROUP,
    LANES,
    first_params,
    flat,
    groups_of,
    loss_fn,
    mesh_of,
    on_devices,
    optimizer,
    whole,
)

CALLS = 6  # of 64 examples: three batches of 128, if the batch stays as it is


def eager_to_grow():
    """A threshold so small that the first test asks for a far larger batch."""
    return adabatch.adaptive_multi_steps(
        optax.chain(
            adabatch.adapt_batch_size(
                adabatch.norm_test(0.05), initial_batch_size=128, max_batch_size=4096
            ),
            optax.sgd(0.1),
        ),
        micro_batch_size=GROUP,
        axis_name="data",
    )


def step_with(reduce, cast=False):
    """An ordinary step that hands `reduce(gradient)` to the wrapper."""
    link = eager_to_grow()

    def step(params, state, groups):
        own = jax.lax.pcast(params, "data", to="varying") if cast else params
        batch = jax.tree.map(lambda x: x[0, 0], groups)
        value, gradient = jax.value_and_grad(loss_fn)(own, batch)
        updates, state = link.update(reduce(gradient), state, params, value=value)
        return optax.apply_updates(params, updates), state

    return step


def run(kind, step, groups, calls=CALLS):
    params = first_params()
    state, mapped = eager_to_grow().init(params), on_devices(kind, step)
    for call in range(calls):
        params, state = mapped(params, state, jax.tree.map(lambda x: x[call : call + 1], groups))  # noqa: B023
    return params, state


REDUCTIONS = {
    "pmean": lambda g: jax.lax.pmean(g, "data"),
    "psum": lambda g: jax.lax.psum(g, "data"),
}


@pytest.mark.parametrize("kind", ["pmap", "shard_map unchecked"])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_an_averaged_gradient_holds_the_batch_and_is_counted(kind, name):
    _, state = run(kind, step_with(REDUCTIONS[name]), groups_of(0))
    shown = adabatch.metrics(jax.device_get(state))
    assert shown["batch_size"] == shown["next_batch_size"] == 128
    assert shown["averaged_gradients"] == CALLS // 2
    assert shown["test_status"] == adabatch.BatchSizeStatus.HELD
    assert shown["num_examples"] == CALLS * 64


@pytest.mark.parametrize("kind", ["pmap", "shard_map unchecked", "shard_map checked"])
def test_the_devices_own_gradients_let_it_grow(kind):
    """The control of the test above."""
    step = step_with(lambda g: g, cast=kind == "shard_map checked")
    _, state = run(kind, step, groups_of(0), calls=2)
    shown = adabatch.metrics(jax.device_get(state))
    assert shown["next_batch_size"] == adabatch.get_batch_size(state) > 1024
    assert shown["averaged_gradients"] == 0


@pytest.mark.parametrize("name", ["left as it comes", *REDUCTIONS])
def test_with_the_check_on_a_gradient_that_does_not_vary_is_refused(name):
    """As it comes, the gradient of parameters that were not cast is summed over the devices."""
    reduce, cast = REDUCTIONS.get(name, lambda g: g), name in REDUCTIONS
    with pytest.raises(ValueError, match=r"axis 'data'.*jax\.lax\.pcast\(params, 'data'"):
        run("shard_map checked", step_with(reduce, cast), groups_of(0))


@pytest.mark.parametrize("kind", ["pmap", "shard_map unchecked", "shard_map checked"])
def test_the_broken_gradient_of_one_device_is_left_out(kind):
    """Two calls then hold 15 groups, one too few; the third completes the batch."""
    x, y = (np.copy(a[:3]) for a in groups_of(0))
    x[1, 5] = np.nan
    step = step_with(lambda g: g, cast=kind == "shard_map checked")
    params, state = run(kind, step, (x, y), calls=3)
    shown = adabatch.metrics(jax.device_get(state))
    assert shown["skipped_micro_batches"] == 1
    assert shown["num_examples"] == 23 * GROUP
    assert shown["degrees_of_freedom"] == 22
    assert adabatch.has_updated(state)

    sizes = jnp.full((3, 8), GROUP).at[1, 5].set(0)
    fn = jax.jit(adabatch.value_and_grad_noise(loss_fn))
    _, noise = fn(first_params(), flat((x, y)), sizes=sizes.reshape(-1))
    expected = optax.apply_updates(first_params(), jax.tree.map(lambda g: -0.1 * g, noise.mean))
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
    assert float(shown["noise_numerator"]) == pytest.approx(float(noise.trace), rel=1e-4)


def test_under_sharded_jit_an_unchanged_loop_measures_between_its_calls():
    """Without lanes, a call is one group, spread over all devices; micro_batch_size is all of it."""
    link = adabatch.adaptive_multi_steps(optimizer(), micro_batch_size=LANES * GROUP)

    def run(kind):
        def step(params, state, groups):
            batch = jax.tree.map(lambda x: x.reshape((-1, x.shape[-1])), groups)
            own = whole(params, mesh_of(8) if kind == "FSDP" else None)
            value, gradient = jax.value_and_grad(loss_fn)(own, batch)
            updates, state = link.update(gradient, state, params, value=value)
            return optax.apply_updates(params, updates), state

        mapped = jax.jit(step) if kind == "one device" else on_devices(kind, step)
        params, state, sizes = first_params(), link.init(first_params()), []
        for call in range(48):
            one = jax.tree.map(lambda x: x[call : call + 1], groups_of(0))  # noqa: B023
            params, state = mapped(params, state, one)
            sizes.append(int(adabatch.get_batch_size(state)))
        return sizes, jax.device_get(params)

    sizes, params = run("one device")
    assert len(set(sizes)) >= 5 and sizes[-1] > 512
    for kind in ("sharded jit", "FSDP"):
        found, there = run(kind)
        assert found == sizes
        chex.assert_trees_all_close(there, params, rtol=1e-5, atol=1e-6)
