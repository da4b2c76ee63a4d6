"""A count of examples that does not wrap: two uint32 words, because JAX has no 64-bit integers by default.

A run is measured in examples, since steps change size while the batch grows. 2³¹ examples are
reached within hours on a large machine.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax._validate import is_traced


def zero_clock() -> jax.Array:
    """A clock at zero: uint32 [2], high word first."""
    return jnp.zeros((2,), jnp.uint32)


def advance(clock: jax.Array, num_examples: Any) -> jax.Array:
    """The clock after `num_examples` (int32, not negative) more examples."""
    low = clock[1] + jnp.maximum(jnp.asarray(num_examples), 0).astype(jnp.uint32)
    carried = (low < clock[1]).astype(jnp.uint32)
    return jnp.stack([clock[0] + carried, low])


def as_float(clock: jax.Array) -> jax.Array:
    """The count as float32: exact to 2²⁴, to 6e-8 relative beyond."""
    high, low = clock[..., 0].astype(jnp.float32), clock[..., 1].astype(jnp.float32)
    return high * jnp.float32(2.0**32) + low


def as_int(clock: jax.Array) -> Any:
    """The exact count as a Python int on the host; float32 where the clock is traced."""
    if is_traced(clock):
        return as_float(clock)
    high, low = (int(word) for word in jax.device_get(clock))
    return high * 2**32 + low
