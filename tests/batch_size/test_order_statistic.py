"""`order_statistic`: exactly the entry that sorting would find."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from adabatch_jax.batch_size._order_statistic import order_statistic

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 0.99, 1.0)
TINIEST, NORMAL = (float(getattr(np.finfo(np.float32), k)) for k in ("smallest_subnormal", "tiny"))
entries = st.one_of(
    st.floats(0, None, width=32, allow_subnormal=True),
    st.sampled_from([0.0, TINIEST, 1.0, float("inf")]),  # ties, and the ends of the range
)


@functools.cache
def compiled(quantile):
    return jax.jit(lambda tree: order_statistic(tree, quantile))


@pytest.mark.parametrize("quantile", QUANTILES)
@settings(max_examples=50)
@given(x=arrays(np.float32, 20, elements=entries))
def test_it_is_the_entry_that_sorting_finds(quantile, x):
    tree = {"a": x[:6].reshape(2, 3), "b": (x[6:19], x[19])}
    expected = np.sort(x)[int(np.ceil(np.round(quantile * 20, 6))) - 1]
    found = float(compiled(quantile)(tree))
    # The maximum may be taken by an instruction that reads subnormal numbers as zero.
    assert found == expected or max(found, expected) < NORMAL


@pytest.mark.parametrize("quantile", [0.5, 1.0])
def test_arrays_without_entries_change_nothing(quantile):
    none = jnp.zeros((0, 3))
    assert float(order_statistic([none, jnp.array([2.0, 2.0]), none], quantile)) == 2.0
    assert float(order_statistic([none], quantile)) == float(order_statistic([], quantile)) == 0.0


def test_it_agrees_with_numpy_on_many_entries():
    x = np.random.default_rng(0).gamma(0.2, 10.0, 10001).astype(np.float32)
    for quantile in (0.1, 0.9):
        expected = np.quantile(x, quantile, method="inverted_cdf")
        assert float(compiled(quantile)(x)) == expected


def test_a_single_entry_is_every_quantile():
    assert {float(compiled(q)(jnp.float32(3.5))) for q in (0.01, 1.0)} == {3.5}


def test_other_floats_are_ordered_as_float32():
    assert float(order_statistic(jnp.array([4.0, 1.0, 2.0], jnp.bfloat16), 0.5)) == 2.0
