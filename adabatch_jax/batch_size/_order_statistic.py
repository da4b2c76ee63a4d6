"""The q-th order statistic over all coordinates of a pytree, by reductions alone.

Non-negative float32 numbers are ordered as their bit patterns are, so a bisection over 31 bits finds
the exact value by counting. Nothing is sorted or gathered, so sharded leaves stay where they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def order_statistic(tree: Any, quantile: float) -> jax.Array:
    """The smallest entry x of `tree` such that a share `quantile` of the entries is ≤ x; 0 of none.

    Args:
      tree: pytree of non-negative float32 arrays; +inf is allowed.
      quantile: in (0, 1]; 1 is the maximum.
    """
    leaves = jax.tree.leaves(tree)
    if quantile >= 1.0:
        maxima = [jnp.max(x, initial=0.0).astype(jnp.float32) for x in leaves]
        return jnp.max(jnp.stack([jnp.float32(0.0), *maxima]))
    bits = [jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) for x in leaves]
    size = sum(x.size for x in leaves)
    # float32 counts are exact to 2**24 and to 6e-8 beyond: far below what a quantile can mean.
    wanted = jnp.float32(quantile * size)

    def enough(bound: jax.Array) -> jax.Array:
        counts = [jnp.sum((b <= bound).astype(jnp.float32)) for b in bits]
        return sum(counts, start=jnp.float32(0)) >= wanted

    def halve(_: jax.Array, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = interval  # the answer lies in (low, high]
        middle = low + (high - low) // 2
        found = enough(middle)
        return jnp.where(found, low, middle), jnp.where(found, middle, high)

    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    _, high = jax.lax.fori_loop(0, 31, halve, (jnp.int32(-1), infinity))
    # Of no entries any bound is enough, even that below 0.
    return jax.lax.bitcast_convert_type(jnp.maximum(high, 0), jnp.float32)
