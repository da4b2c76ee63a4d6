"""When does a loss count as exploding? Told from a running average, free of scale and offset."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

_FIRST = 8  # losses that say where the run began
_DECAY = 0.7  # of the average that must exceed the bound: one outlier is no divergence
_WARMUP_SHARE = 2.0  # of what the loss has won that it may give back during the warm-up …
_LATER_SHARE = 0.25  # … and after it
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
    level: LossLevel, loss: jax.Array, position: jax.Array, rises: jax.Array
) -> tuple[LossLevel, jax.Array, jax.Array]:
    """The level after one more loss; that loss, clipped for the smoother; and whether it diverged.

    bound = lowest + share · (first − lowest) + 4 standard deviations of the first losses, with share
    2 while the learning rate rises, ¼ afterwards: what the average may give back of what it had won.
    The smoother sees losses up to 4 standard deviations above where the run began: how far it explodes
    says nothing about where it was lowest, and would be taken for noise.
    A loss that is not finite diverges at once, unless nothing finite was seen before it. After a
    divergence the lowest is where the average is: the next must rise as far again.
    """
    finite = jnp.isfinite(loss)
    loss = jnp.where(finite, loss, level.average)
    early = level.seen < _FIRST
    n = (level.seen + 1).astype(jnp.float32)
    delta = loss - level.first_mean
    first = jnp.where(early, level.first_mean + delta / n, level.first_mean)
    scatter = level.first_scatter + jnp.where(early, delta * (loss - first), 0.0)
    deviation = jnp.sqrt(scatter / (jnp.clip(n, 2.0, float(_FIRST)) - 1.0))
    average = _DECAY * level.average + (1.0 - _DECAY) * loss
    average, lowest = (jnp.where(level.seen == 0, loss, x) for x in (average, level.lowest))
    share = jnp.where(rises, _WARMUP_SHARE, _LATER_SHARE)
    margin = jnp.where(early, jnp.inf, _DEVIATIONS * deviation)
    bound = lowest + share * (first - lowest) + margin
    diverged = jnp.where(finite, average > bound, level.seen > 0)
    lowest = jnp.where(diverged & ~rises, average, jnp.minimum(lowest, average))
    after = LossLevel(
        seen=optax.safe_increment(level.seen),
        first_mean=first,
        first_scatter=scatter,
        average=average,
        lowest=lowest,
        lowest_position=jnp.where(average <= lowest, position, level.lowest_position),
    )
    after = jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, level)
    return after, jnp.minimum(loss, first + margin), diverged
