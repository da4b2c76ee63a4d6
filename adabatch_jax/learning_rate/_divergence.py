"""When does a loss count as exploding? Told from a running average, scale-free."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_FIRST = 8  # losses that say where the run began
_DECAY = 0.9  # of the average that must exceed the bound: one outlier is no divergence
_DEVIATIONS = 4.0


class LossLevel(NamedTuple):
    """Where the losses began, where they have been lowest, where they are."""

    seen: jax.Array  # int32: finite losses
    first_mean: jax.Array  # float32: of the first 8
    first_scatter: jax.Array  # float32: their squared deviations, summed
    average: jax.Array  # float32: exponential average
    lowest: jax.Array  # float32: of that average
    lowest_position: jax.Array  # float32: in units of the clock


def no_level() -> LossLevel:
    """Before the first loss."""
    zeros = (jnp.zeros((), jnp.float32) for _ in range(5))
    return LossLevel(jnp.zeros((), jnp.int32), *zeros)


def follow(
    level: LossLevel, loss: jax.Array, position: jax.Array, factor: Any
) -> tuple[LossLevel, jax.Array, jax.Array]:
    """The level after one more loss; that loss, clipped at the bound; and whether the run diverged.

    bound = first + factor · (first − lowest) + 4 standard deviations of the first losses: beyond it
    the loss has given back `factor` times more than all it had won. A loss that is not finite is a
    divergence at once, unless nothing finite was seen before it.
    """
    finite = jnp.isfinite(loss)
    loss = jnp.where(finite, loss, level.average)
    early = level.seen < _FIRST
    seen = level.seen + 1
    n = seen.astype(jnp.float32)
    delta = loss - level.first_mean
    mean = jnp.where(early, level.first_mean + delta / n, level.first_mean)
    scatter = level.first_scatter + jnp.where(early, delta * (loss - mean), 0.0)
    deviation = jnp.sqrt(scatter / jnp.maximum(jnp.minimum(n, _FIRST) - 1.0, 1.0))
    lowest = jnp.where(level.seen == 0, loss, level.lowest)
    bound = mean + jnp.asarray(factor).astype(jnp.float32) * (mean - lowest)
    bound = jnp.where(early, jnp.inf, jnp.maximum(bound, mean) + _DEVIATIONS * deviation)
    average = _DECAY * level.average + (1.0 - _DECAY) * loss
    average = jnp.where(level.seen == 0, loss, average)
    is_lowest = average <= lowest
    after = LossLevel(
        seen=seen.astype(jnp.int32),
        first_mean=mean,
        first_scatter=scatter,
        average=average,
        lowest=jnp.minimum(lowest, average),
        lowest_position=jnp.where(is_lowest, position, level.lowest_position),
    )
    after = jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, level)
    diverged = (finite & (average > bound)) | (~finite & (level.seen > 0))
    return after, jnp.minimum(loss, bound), diverged
