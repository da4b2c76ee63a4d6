"""The example clock: it counts exactly, far beyond 32 bits."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from adabatch_jax._clock import advance, as_float, as_int, zero_clock

SETTINGS = settings(max_examples=100)
advance_jit, as_float_jit = jax.jit(advance), jax.jit(as_float)


def clock_at(count):
    return jnp.array([count >> 32, count % 2**32], jnp.uint32)


def test_it_starts_at_zero():
    assert as_int(zero_clock()) == 0
    assert zero_clock().dtype == jnp.uint32


@SETTINGS
@given(start=st.integers(0, 2**62), steps=st.lists(st.integers(0, 2**31 - 1), max_size=8))
def test_it_counts_like_a_python_integer(start, steps):
    clock = clock_at(start)
    for step in steps:
        clock = advance_jit(clock, jnp.int32(step))
    assert as_int(clock) == start + sum(steps)


def test_it_carries_into_the_high_word():
    assert advance(clock_at(2**32 - 1), 1).tolist() == [1, 0]
    assert advance(clock_at(2**32 - 10), 64).tolist() == [1, 54]


def test_it_never_runs_backwards():
    assert as_int(advance(clock_at(100), -5)) == 100


@SETTINGS
@given(count=st.integers(0, 2**62))
def test_as_float_is_right_to_rounding(count):
    np.testing.assert_allclose(float(as_float_jit(clock_at(count))), count, rtol=1.2e-7)


@SETTINGS
@given(count=st.integers(0, 2**24))
def test_as_float_is_exact_for_small_counts(count):
    assert float(as_float_jit(clock_at(count))) == count


def test_inside_jit_as_int_is_a_float():
    seen = jax.jit(as_int)(clock_at(2**33))
    assert seen.dtype == jnp.float32
    assert float(seen) == 2.0**33


def test_on_the_host_as_int_is_a_python_integer():
    assert type(as_int(clock_at(2**31 + 1))) is int
