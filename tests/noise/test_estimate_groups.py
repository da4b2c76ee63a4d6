"""`value_and_grad_noise`: which groups count, in every way of running over them."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from adabatch_jax import value_and_grad_noise

NUM_GROUPS, GROUP_SIZE = 6, 3


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, GROUP_SIZE), min_size=NUM_GROUPS, max_size=NUM_GROUPS),
    count=st.integers(-1, NUM_GROUPS + 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes_and_any_count_match_numpy(measure, regression, assert_same, sizes, count, seed):
    groups = regression.draw(seed, NUM_GROUPS, GROUP_SIZE, sizes)
    poisoned = {k: v.copy() for k, v in groups.items()}
    for leaf in poisoned.values():
        leaf[np.asarray(sizes) == 0] = np.nan
    (value, aux), noise = measure(poisoned, sizes=sizes, count=count)
    computed = max(count, 0) * measure.lanes
    expected = regression.expected({k: v[:computed] for k, v in groups.items()})
    assert_same(noise, expected, rtol=1e-4)
    np.testing.assert_allclose(value, expected.value, rtol=1e-5)
    if expected.num_examples:
        np.testing.assert_allclose(aux["double"], 2 * expected.value, rtol=1e-5)


@settings(max_examples=20)
@given(order=st.permutations(range(NUM_GROUPS)))
def test_the_order_of_the_groups_does_not_matter(measure, regression, assert_same, order):
    groups = regression.draw(0, NUM_GROUPS, GROUP_SIZE, sizes=[1, 2, 3, 3, 0, 1])
    _, noise = measure(groups)
    _, shuffled = measure({k: v[order] for k, v in groups.items()})
    assert_same(shuffled, noise)


def test_no_group_at_all_is_a_zero_gradient_without_value(measure, regression):
    groups = regression.draw(1, NUM_GROUPS, GROUP_SIZE)
    (value, aux), noise = measure(groups, count=0)
    assert np.isnan(value)
    assert np.isnan(noise.trace)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(noise.mean))
    assert (int(noise.num_examples), int(noise.num_groups), float(noise.scatter)) == (0, 0, 0.0)
    assert int(aux["seen"][0]) == 0


def test_one_group_has_no_trace(measure, regression):
    groups = regression.draw(2, NUM_GROUPS, GROUP_SIZE, sizes=[0, 3, 0, 0, 0, 0])
    _, noise = measure(groups)
    assert int(noise.num_groups) == 1
    assert np.isnan(noise.trace)


def test_one_trace_serves_every_count(regression):
    groups = regression.draw(3, NUM_GROUPS, GROUP_SIZE)
    fn = value_and_grad_noise(regression.loss, inner_products=True)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, groups, count):
        return fn(params, groups, count=count)

    for count in range(NUM_GROUPS + 1):
        _, noise = step(regression.params, groups, count)
        assert int(noise.num_groups) == count


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({}, lambda count: count),
        ({"inner_products": True}, lambda count: 2 * count),  # one more pass
        ({"vectorize": 4}, lambda count: -(-count // 4) * 4),  # whole chunks
    ],
    ids=["one_by_one", "inner_products", "vectorized"],
)
def test_count_is_a_loop_bound(regression, options, evaluations):
    groups = regression.draw(4, 9, 1)
    executed = []

    def counted(params, group):
        jax.debug.callback(lambda _: executed.append(1), group["y"][0])
        return regression.loss(params, group)

    step = jax.jit(value_and_grad_noise(counted, **options))
    for count in (0, 1, 5, 9):
        executed.clear()
        jax.block_until_ready(step(regression.params, groups, count=count))
        jax.effects_barrier()
        assert len(executed) == evaluations(count)


def test_with_lanes_count_bounds_the_loops(regression):
    groups = {k: v.reshape((4, 3, *v.shape[1:])) for k, v in regression.draw(5, 12, 1).items()}
    executed = []

    def counted(params, group):
        jax.debug.callback(lambda _: executed.append(1), group["y"][0])
        return regression.loss(params, group)

    jax.jit(value_and_grad_noise(counted, lanes=True))(regression.params, groups, count=2)
    jax.effects_barrier()
    assert len(executed) == 2 * 3


def test_ragged_groups_are_unbiased():
    deviations = np.array([0.5, 1.0, 2.0])  # of single examples: tr Σ = 5.25
    sizes = jnp.array([1, 1, 2, 3, 6])
    real = (jnp.arange(6)[None] < sizes[:, None]).astype(jnp.float32)

    def loss(w, group):
        x, real = group
        distance = jnp.sum((w[None] - x) ** 2, axis=-1)
        return 0.5 * jnp.sum(real * distance) / jnp.sum(real)

    def one(key):
        x = 3.0 + jax.random.normal(key, (5, 6, 3)) * jnp.asarray(deviations)[None, None]
        fn = value_and_grad_noise(loss, coordinate_wise=True)
        _, noise = fn(jnp.zeros(3), (x, real), sizes=sizes)
        return noise.trace, noise.variance(noise.coordinate_scatter), x

    keys = jax.random.split(jax.random.key(0), 5000)
    traces, coordinates, x = jax.jit(jax.vmap(one))(keys)

    def errors(samples, true):
        samples = np.asarray(samples, np.float64)
        return np.abs(samples.mean(0) - true) / (samples.std(0) / np.sqrt(len(samples)))

    assert errors(traces, 5.25) < 4
    assert np.all(errors(coordinates, deviations**2) < 4)
    # The test has the power to tell: without the weights n_j the estimate is far off.
    means = np.einsum("sjkd,jk->sjd", x, real) / np.asarray(sizes)[None, :, None]
    unweighted = means.var(1, ddof=1).sum(-1) * 13 / 5
    assert errors(unweighted, 5.25) > 20
