"""The noise measured over devices is the noise of all groups together, and never silently zero."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import pytest

import adabatch_jax as adabatch
from adabatch_jax.noise._structured._estimate import value_and_grad_structured
from tests.devices.eight.problem import (
    GROUP,
    LANES,
    first_params,
    flat,
    groups_of,
    loss_fn,
    mesh_of,
    on_devices,
    whole,
)

LOOPS_USED = 5
OPTIONS = {"coordinate_wise": True, "inner_products": True}


def few_groups():
    return jax.tree.map(lambda x: x[:LOOPS_USED], groups_of(0))


@pytest.fixture(scope="module")
def on_one_device():
    fn = adabatch.value_and_grad_noise(loss_fn, **OPTIONS)
    return jax.jit(fn)(first_params(), flat(few_groups()))


@pytest.mark.parametrize(
    "kind", ["pmap", "shard_map checked", "shard_map unchecked", "sharded jit", "FSDP"]
)
def test_every_statistic_equals_that_of_one_device(kind, on_one_device):
    def step(params, _, groups):
        if kind in ("sharded jit", "FSDP"):
            own = whole(params, mesh_of(8) if kind == "FSDP" else None)
            return adabatch.value_and_grad_noise(loss_fn, lanes=True, **OPTIONS)(own, groups)
        fn = adabatch.value_and_grad_noise(loss_fn, axis_name="data", **OPTIONS)
        return fn(params, flat(groups))

    value, noise = on_devices(kind, step)(first_params(), (), few_groups())
    assert int(noise.num_examples) == LOOPS_USED * LANES * GROUP
    assert int(noise.num_groups) == LOOPS_USED * LANES
    chex.assert_trees_all_close((value, noise), on_one_device, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["pmap", "shard_map checked", "shard_map unchecked", "sharded jit"]
)
def test_the_structured_form_equals_that_of_one_device(kind):
    examples = jax.tree.map(lambda x: x[:1].reshape(1, LANES, -1, 1, *x.shape[3:]), few_groups())

    def step(params, _, groups):
        axis_name = None if kind == "sharded jit" else "data"
        fn = value_and_grad_structured(loss_fn, axis_name=axis_name, **OPTIONS)
        return fn(params, jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), groups))

    fn = adabatch.value_and_grad_noise(loss_fn, **OPTIONS)
    single = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), examples)
    value, expected = jax.jit(fn)(first_params(), single)
    found, noise = on_devices(kind, step)(first_params(), (), examples)
    assert int(noise.num_groups) == LANES * GROUP
    chex.assert_trees_all_close((found, noise), (value, expected), rtol=1e-4, atol=1e-6)


def test_sizes_and_counts_may_differ_between_devices():
    """Each device has its own traced count, and one of them has nothing at all."""
    counts = jnp.array([1, 2, 3, 4, 5, 0, 2, 3])

    def step(params, counts, groups):
        own = counts[jax.lax.axis_index("data")]
        fn = adabatch.value_and_grad_noise(loss_fn, axis_name="data")
        return fn(params, flat(groups), count=own)

    used = jnp.arange(LOOPS_USED)[:, None] < counts[None, :]
    sizes = jnp.where(used, GROUP, 0).reshape(-1)
    expected = jax.jit(adabatch.value_and_grad_noise(loss_fn))(
        first_params(), flat(few_groups()), sizes=sizes
    )
    assert int(expected[1].num_groups) == 20
    for kind in ("pmap", "shard_map checked", "shard_map unchecked"):
        found = on_devices(kind, step)(first_params(), counts, few_groups())
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_state_advances_as_on_one_device():
    """Counters and keys are those of the first device with examples; sums are over all of them."""
    counts = jnp.array([0, 2, 3, 4, 5, 0, 2, 3])

    def loss_and_aux(params, group, step):
        own = jnp.sum(group[0])
        key = jax.random.fold_in(jax.random.key(0), jnp.int32(100 * own))
        aux = {"step": step + 1, "flag": own > -1e9, "key": key, "raw": jax.random.key_data(key)}
        return loss_fn(params, group), aux | {"groups": jnp.int32(1)}

    def step(params, counts, groups):
        own = counts[jax.lax.axis_index("data")]
        sums = {"step": False, "flag": False, "key": False, "raw": False, "groups": True}
        fn = adabatch.value_and_grad_noise(
            loss_and_aux, axis_name="data", has_aux=True, sum_aux=sums
        )
        (_, aux), _ = fn(params, flat(groups), jnp.int32(5), count=own)
        return {**aux, "key": jax.random.key_data(aux["key"])}

    first_used = jax.tree.map(lambda x: x[0, 1], few_groups())
    raw = loss_and_aux(first_params(), first_used, 5)[1]["raw"]
    for kind in ("pmap", "shard_map checked", "shard_map unchecked"):
        found = on_devices(kind, step)(first_params(), counts, few_groups())
        assert (int(found["step"]), bool(found["flag"]), int(found["groups"])) == (6, True, 19)
        assert found["flag"].dtype == bool
        for name in ("key", "raw"):
            assert found[name].tolist() == raw.tolist()


def test_the_trap_of_the_varying_check(on_one_device):
    """With the check on, gradients arrive summed: their scatter is 0, to rounding. Ours is not."""

    def naive(params, _, groups):
        gradient = jax.grad(loss_fn)(params, jax.tree.map(lambda x: x[0, 0], groups))
        gradient = jax.lax.pcast(gradient, "data", to="varying")
        mean = jax.lax.pmean(gradient, "data")
        squares = jax.tree.map(lambda g, m: jnp.sum((g - m) ** 2), gradient, mean)
        return GROUP * jax.lax.psum(sum(jax.tree.leaves(squares)), "data")

    def ours(params, _, groups):
        fn = adabatch.value_and_grad_noise(loss_fn, axis_name="data")
        return fn(params, flat(groups))[1].scatter

    one_loop = jax.tree.map(lambda x: x[:1], few_groups())
    arguments = first_params(), (), one_loop
    _, noise = jax.jit(adabatch.value_and_grad_noise(loss_fn))(first_params(), flat(one_loop))
    true = float(noise.scatter)
    assert true > 1.0
    assert float(on_devices("shard_map checked", naive)(*arguments)) < 1e-9
    assert float(on_devices("shard_map checked", ours)(*arguments)) == pytest.approx(true, rel=1e-5)


def test_groups_that_are_the_same_on_all_devices_are_refused():
    def step(params, groups):
        return adabatch.value_and_grad_noise(loss_fn, axis_name="data")(params, flat(groups))

    mapped = jax.shard_map(step, mesh=mesh_of(8), in_specs=jax.P(), out_specs=jax.P())
    with pytest.raises(ValueError, match="groups is the same on all devices of axis 'data'"):
        jax.jit(mapped)(first_params(), few_groups())
