"""`GradientNoise` and `merge_noise`: how noise was split must not matter."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from adabatch_jax import GradientNoise, merge_noise
from adabatch_jax.noise._gradient_noise import pool_noise

merge = jax.jit(merge_noise)
pool = jax.jit(lambda noise, loss: pool_noise(noise, loss, lambda x: x.sum(0)))


def one_group(mean, size, **fields):
    """The noise of a single group: a mean without scatter."""
    mean = jax.tree.map(jnp.float32, mean, is_leaf=lambda x: isinstance(x, list))
    zeros = jax.tree.map(jnp.zeros_like, mean)
    start = GradientNoise(mean, jnp.float32(0), jnp.int32(size), jnp.int32(size > 0), zeros)
    return start._replace(**fields)


@pytest.fixture(scope="session")
def groups():
    """Eight groups of unequal size: their noises, and the oracle for all of them together."""

    def draw(seed):
        rng = np.random.default_rng(seed)
        means, sizes = rng.normal(1.0, 1.0, (8, 5)).astype(np.float32), rng.integers(1, 20, 8)
        wide, n = means.astype(np.float64), sizes[:, None]
        mean = (n * wide).sum(0) / n.sum()
        squares = (n * (wide - mean) ** 2).sum(0)
        noises = [one_group({"a": m[:2], "b": m[2:]}, k) for m, k in zip(means, sizes, strict=True)]
        whole = {"a": mean[:2], "b": mean[2:]}, squares.sum(), n.sum(), 8
        return noises, GradientNoise(*whole, {"a": squares[:2], "b": squares[2:]})

    return draw


def test_trace_is_scatter_over_groups_minus_one():
    noise = GradientNoise(jnp.ones(2), jnp.float32(6), jnp.int32(8), jnp.int32(4))
    assert float(noise.trace) == 2.0
    assert float(noise.variance(jnp.float32(9))) == 3.0


@pytest.mark.parametrize("num_groups", [0, 1])
def test_fewer_than_two_groups_have_no_variance(num_groups):
    noise = GradientNoise(jnp.ones(2), jnp.float32(0), jnp.int32(8), jnp.int32(num_groups))
    assert np.isnan(noise.trace)


def test_squared_norm_is_float32_over_all_leaves():
    mean = {"a": jnp.full((300,), 1.0, jnp.bfloat16), "b": jnp.array([[2.0]])}
    noise = GradientNoise(mean, jnp.float32(0), jnp.int32(1), jnp.int32(1))
    assert noise.squared_norm.dtype == jnp.float32
    assert float(noise.squared_norm) == 304.0  # bfloat16 would stop counting at 256


def test_closed_form_of_a_merge():
    a = one_group([1.0, 0.0], 1)._replace(scatter=jnp.float32(2), num_groups=jnp.int32(3))
    both = merge_noise(a, one_group([3.0, 4.0], 3))
    assert both.mean.tolist() == [2.5, 3.0]
    assert float(both.scatter) == 2 + 3 / 4 * (2**2 + 4**2)
    assert both.coordinate_scatter.tolist() == [3 / 4 * 2**2, 3 / 4 * 4**2]
    assert (int(both.num_examples), int(both.num_groups)) == (4, 4)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), rng=st.randoms(use_true_random=False))
def test_however_the_groups_are_split_the_merge_is_the_same(groups, assert_same, seed, rng):
    parts, expected = groups(seed)
    rng.shuffle(parts)
    while len(parts) > 1:  # any two of what is left: every binary tree over every order
        first = parts.pop(rng.randrange(len(parts)))
        second = parts.pop(rng.randrange(len(parts)))
        parts.append(merge(first, second))
    assert_same(parts[0], expected)


def test_pooling_lanes_is_merging_them(groups, assert_same):
    noises, expected = groups(0)
    lanes = jax.tree.map(lambda *x: jnp.stack(x), *noises)
    pooled, _ = pool(lanes, jnp.zeros((8, 1)))
    assert_same(pooled, functools.reduce(merge, noises))
    assert_same(pooled, expected)


def test_pooling_ignores_a_lane_without_examples(groups, assert_same):
    noises, expected = groups(1)
    noises.append(_poisoned())
    lanes = jax.tree.map(lambda *x: jnp.stack(x), *noises)
    loss = jnp.ones((9, 1)).at[8].set(jnp.nan)
    pooled, mean_loss = pool(lanes, loss)
    assert_same(pooled, expected)
    np.testing.assert_allclose(mean_loss, [1.0], rtol=1e-6)


def test_pooled_counts_are_exact_beyond_the_integers_of_float32():
    sizes = [2**24 + 1, 2**25 + 3, 2**27 + 5]
    lanes = jax.tree.map(lambda *x: jnp.stack(x), *[one_group([1.0], n) for n in sizes])
    pooled, _ = pool(lanes, jnp.zeros((3, 1)))
    assert int(pooled.num_examples) == sum(sizes)


def test_huge_batches_do_not_overflow_a_merge():
    both = merge_noise(one_group([1.0], 2**30 - 1), one_group([3.0], 2**30 - 1))
    assert float(both.mean[0]) == 2.0
    np.testing.assert_allclose(both.scatter, 2**29 * 4.0, rtol=1e-6)
    assert int(both.num_examples) == 2**31 - 2


def _poisoned():
    nan = {"a": jnp.full(2, jnp.nan), "b": jnp.full(3, jnp.nan)}
    return one_group(nan, 0)._replace(scatter=jnp.float32(jnp.nan), coordinate_scatter=nan)


@pytest.mark.parametrize("other", ["zeros", "poisoned"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_side_without_examples_changes_nothing(groups, assert_same, other, side):
    noise = functools.reduce(merge, groups(2)[0])
    empty = _poisoned() if other == "poisoned" else one_group({"a": [0.0] * 2, "b": [0.0] * 3}, 0)
    merged = merge_noise(*((empty, noise) if side == "left" else (noise, empty)))
    jax.tree.map(np.testing.assert_array_equal, merged, noise)


def test_two_empty_sides_stay_empty():
    merged = merge_noise(_poisoned(), _poisoned())
    assert (int(merged.num_examples), float(merged.scatter)) == (0, 0.0)
    assert np.isnan(merged.trace)


def test_inner_products_cannot_be_merged():
    a, b = (one_group([x], 2, inner_product_scatter=jnp.float32(1)) for x in (1.0, 2.0))
    assert merge_noise(a, b).inner_product_scatter is None


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_coordinate_scatter_that_one_side_lacks_is_none(lacking):
    sides = [one_group([1.0], 2), one_group([2.0], 2)]
    sides[lacking] = sides[lacking]._replace(coordinate_scatter=None)
    assert merge_noise(*sides).coordinate_scatter is None


def test_the_mean_keeps_its_dtype_and_the_scatter_is_float32():
    a, b = (GradientNoise(jnp.full(2, x, jnp.bfloat16), jnp.float32(0), 1, 1) for x in (1.0, 2.0))
    both = merge_noise(a, b)
    assert both.mean.dtype == jnp.bfloat16
    assert both.scatter.dtype == jnp.float32


def test_means_of_different_structure_are_an_error():
    with pytest.raises(ValueError, match=r"merge_noise.*structure.*'a'.*'b'"):
        merge_noise(one_group({"a": [1.0]}, 1), one_group({"b": [1.0]}, 1))


def test_means_of_different_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"merge_noise.*shapes.*\(1,\).*\(2,\)"):
        merge_noise(one_group([1.0], 1), one_group([1.0, 2.0], 1))
