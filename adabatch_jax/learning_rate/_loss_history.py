"""A series of losses in a buffer of fixed size that thins itself when it is full."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossHistory(NamedTuple):
    """Means of `stride` consecutive finite losses, and where they lie; the last may hold fewer."""

    losses: jax.Array  # float32 [capacity]
    positions: jax.Array  # float32 [capacity]: in units of the clock
    complete: jax.Array  # int32: entries that hold `stride` losses
    in_last: jax.Array  # int32: losses in the entry after those, below stride
    stride: jax.Array  # int32

    @property
    def entries(self) -> jax.Array:
        """int32: entries with at least one loss."""
        return self.complete + (self.in_last > 0).astype(jnp.int32)


def empty_history(capacity: int) -> LossHistory:
    """No losses yet, and room for `capacity` (made even)."""
    capacity += capacity % 2
    return LossHistory(
        losses=jnp.zeros((capacity,), jnp.float32),
        positions=jnp.zeros((capacity,), jnp.float32),
        complete=jnp.zeros((), jnp.int32),
        in_last=jnp.zeros((), jnp.int32),
        stride=jnp.ones((), jnp.int32),
    )


def record(
    history: LossHistory, loss: jax.Array, position: jax.Array, keep: jax.Array
) -> LossHistory:
    """Adds a loss, if `keep`. A full buffer is halved: neighbours are averaged in pairs.

    From then on an entry gathers twice as many losses before the next is begun, so that all entries
    weigh the same and the spacing stays even, at a resolution of at least half the capacity.
    """
    place, weight = history.complete, 1.0 / (history.in_last + 1).astype(jnp.float32)

    def blend(values: jax.Array, new: jax.Array) -> jax.Array:
        mean = values[place] + weight * (new.astype(jnp.float32) - values[place])
        return values.at[place].set(jnp.where(keep, mean, values[place]))

    full = (history.in_last + 1 == history.stride) & keep
    complete = history.complete + full.astype(jnp.int32)
    in_last = jnp.where(full, 0, history.in_last + keep.astype(jnp.int32))
    losses, positions = blend(history.losses, loss), blend(history.positions, position)
    capacity = losses.shape[0]
    over = complete == capacity

    def halve(values: jax.Array) -> jax.Array:
        pairs = jnp.mean(values.reshape(-1, 2), axis=1)
        return jnp.concatenate([pairs, jnp.zeros_like(pairs)])

    losses, positions = jax.lax.cond(
        over, lambda v: jax.tree.map(halve, v), lambda v: v, (losses, positions)
    )
    return LossHistory(
        losses=losses,
        positions=positions,
        complete=jnp.where(over, capacity // 2, complete).astype(jnp.int32),
        in_last=in_last.astype(jnp.int32),
        stride=jnp.where(over, 2 * history.stride, history.stride).astype(jnp.int32),
    )
