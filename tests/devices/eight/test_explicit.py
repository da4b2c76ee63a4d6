"""JAX's default mesh: its axes are Explicit, and how an array is sharded is part of its type."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import adabatch_jax as adabatch
from tests.devices.eight.problem import first_params, flat, groups_of, loss_fn

OPTIONS = {"coordinate_wise": True, "inner_products": True}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",))


@pytest.fixture
def spread(mesh):
    """Arrays, sharded along one axis of each."""

    def put(tree, axis):
        spec = PartitionSpec(*[None] * axis, "data")
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)

    with jax.set_mesh(mesh):
        yield put


def loss_and_aux(params, group):
    value = loss_fn(params, group)
    return value, {
        "loss": value,
        "key": jax.random.key(3),
        "count": jnp.int32(4),
        "one": jnp.int32(1),
    }


@pytest.fixture(scope="module")
def expected():
    few = jax.tree.map(lambda x: x[:3], groups_of(0))
    fn = adabatch.value_and_grad_noise(loss_fn, **OPTIONS)
    return few, jax.jit(fn)(first_params(), flat(few))


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "FSDP"])
def test_lanes_give_what_one_device_gives(spread, expected, sharded):
    few, (value, noise) = expected
    groups = spread(few, 1)
    params = first_params()
    if sharded:
        axes = {"w1": 1, "b1": 1, "w2": 0}
        params |= {name: spread(params[name], axis) for name, axis in axes.items()}
    sums = {"loss": False, "key": False, "count": False, "one": True}
    options = {"lanes": True, "has_aux": True, "sum_aux": sums, **OPTIONS}

    @jax.jit
    def step(params, groups, count, measure):
        params = jax.sharding.reshard(params, PartitionSpec())
        fn = adabatch.value_and_grad_noise(loss_and_aux, **options)
        return fn(params, groups, count=count, measure=measure)

    (found, aux), measured = step(params, groups, 3, True)
    chex.assert_trees_all_close((found, measured), (value, noise), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(aux["loss"], value, rtol=1e-5)
    assert (int(aux["count"]), int(aux["one"])) == (4, int(noise.num_groups))
    assert int(jax.random.key_data(aux["key"])[1]) == 3


def test_the_examples_of_a_group_may_be_sharded(spread, expected):
    few, (_, noise) = expected
    groups = jax.tree.map(lambda x: x.reshape(3, -1, *x.shape[3:]), few)
    fn = jax.jit(adabatch.value_and_grad_noise(loss_fn, **OPTIONS))
    on_one = fn(first_params(), groups)
    chex.assert_trees_all_close(fn(first_params(), spread(groups, 1)), on_one, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(on_one[1].mean, noise.mean, rtol=1e-4, atol=1e-6)


def test_signs_over_sharded_examples(spread):
    x = jax.random.normal(jax.random.key(0), (2, 16, 3))
    fn = jax.jit(
        adabatch.noise.value_and_grad_signs(lambda w, x: (x @ w) ** 2, coordinate_wise=True)
    )
    on_one = fn(jnp.ones(3), x, jax.random.key(1))
    found = fn(jnp.ones(3), spread(x, 1), jax.random.key(1))
    chex.assert_trees_all_close(found, on_one, rtol=1e-4, atol=1e-6)


def test_noise_of_sharded_gradients_is_merged(spread):
    mean, squares = jnp.arange(32.0).reshape(16, 2), jnp.ones((16, 2))
    a = adabatch.GradientNoise(mean, jnp.float32(1), jnp.int32(3), jnp.int32(2), squares)
    b = a._replace(mean=2 * mean)
    sides = [
        n._replace(mean=spread(n.mean, 0), coordinate_scatter=spread(squares, 0)) for n in (a, b)
    ]
    merge = jax.jit(adabatch.merge_noise)
    chex.assert_trees_all_close(merge(*sides), merge(a, b), rtol=1e-6)


@pytest.mark.parametrize("number", [1, 2, 8, 16, 64])
def test_a_sharded_batch_is_split(spread, number):
    x = jnp.arange(64.0)
    split = jax.jit(lambda x: adabatch.split_groups(x, number))
    chex.assert_trees_all_equal(split(spread(x, 0)), x.reshape(number, -1))


def test_groups_sharded_along_the_loop_are_refused(spread):
    x = spread(jnp.ones((8, 4)), 0)
    for run in (
        lambda: adabatch.value_and_grad_noise(lambda w, x: jnp.mean(w * x))(1.0, x),
        lambda: adabatch.noise.value_and_grad_signs(lambda w, x: w * x)(1.0, x, jax.random.key(0)),
    ):
        with pytest.raises(
            ValueError, match=r"groups is sharded.*'data'.*lanes=True.*AxisType.Auto"
        ):
            run()
