"""When does a loss count as exploding? Told from a running average, against the noise as it is now."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

_FIRST = 8  # losses that say where the run began
_DECAY = 0.7  # of the average that must exceed the bound
_NOISE_DECAY = 0.98  # of the average distance of a loss from that average
_WARMUP_SHARE = 2.0  # of what the loss has won that it may give back during the warm-up …
_LATER_SHARE = 0.25  # … and after it
_DEVIATIONS = 4.0  # of one loss, beside that share, for the average …
_OUTLIER_DEVIATIONS = 8.0  # … and for a single loss, which is left out beyond them, …
_OUTLIER_SHARE = 0.1  # … and this part of the first losses: nothing less has exploded
# Of normal noise: one deviation over the mean distance, and over the median distance. The distance is
# that from the average before, whose own variance is (1 − 0.7) / (1 + 0.7) of that of a loss.
_FROM_MEAN_DISTANCE = np.float32(
    np.sqrt(0.5 * np.pi) / np.sqrt(1.0 + (1.0 - _DECAY) / (1.0 + _DECAY))
)
_FROM_MEDIAN_DISTANCE = np.float32(1.4826)


class LossLevel(NamedTuple):
    """Where the losses began, where they have been lowest, where they are, and how noisy."""

    seen: jax.Array  # int32: losses that count
    bad_in_a_row: jax.Array  # int32: losses just now that are not finite, or far above the others
    begun: jax.Array  # bool: there is an average; not before the first loss, nor after a switch
    first_losses: jax.Array  # float32 [8]
    average: jax.Array  # float32: exponential average
    deviation: jax.Array  # float32: of one loss, running
    lowest: jax.Array  # float32: of the average
    lowest_position: jax.Array  # float32: in units of the clock


class Followed(NamedTuple):
    """What one loss has shown."""

    level: LossLevel
    loss: jax.Array  # for the smoother
    left_out: jax.Array  # bool: not finite, or far above the others: none of them, so far
    diverged: jax.Array  # bool


def no_level() -> LossLevel:
    """Before the first loss."""

    def zero(dtype: Any = jnp.float32) -> jax.Array:  # an array of its own: they are donated
        return jnp.zeros((), dtype)

    return LossLevel(
        seen=zero(jnp.int32),
        bad_in_a_row=zero(jnp.int32),
        begun=zero(bool),
        first_losses=jnp.zeros((_FIRST,), jnp.float32),
        average=zero(),
        deviation=zero(),
        lowest=zero(),
        lowest_position=zero(),
    )


def follow(level: LossLevel, loss: jax.Array, position: jax.Array, rises: jax.Array) -> Followed:
    """The level after one more loss, and whether it diverged.

    That is when the average exceeds bound = lowest + share · (first − lowest) + 4 deviations, with share
    2 while the learning rate rises, ¼ afterwards: what the average may give back of what it had won.
    `first` is the median of the first eight losses, and the deviation, that of one loss, is
    the larger of the first eight's and of a running one, told from the mean distance between a loss
    and the average before it. A mean of distances, not of squares: an explosion must not pass for
    noise.

    One loss that is not finite, or further above than 8 deviations would explain, is left out: it says
    something about its batch. The second in a row diverges at once, unless nothing finite was seen
    before. After a divergence average and lowest are where the loss is: the next must rise as far
    again. Everything scales with the losses.

    The smoother sees losses up to 4 deviations, as of before, above where the run began: how far it
    explodes says nothing about where it was lowest, and would be taken for noise.
    """
    finite = jnp.isfinite(loss)
    early, fresh = level.seen < _FIRST, ~level.begun
    share = jnp.where(rises, _WARMUP_SHARE, _LATER_SHARE)
    first, first_deviation = _typical(level.first_losses, level.seen)
    deviation = jnp.maximum(first_deviation, level.deviation)
    given_back = level.lowest + share * (first - level.lowest)
    far = given_back + jnp.maximum(_OUTLIER_DEVIATIONS * deviation, _OUTLIER_SHARE * jnp.abs(first))
    bad = ~finite | (~early & ~fresh & (loss > far))
    again = bad & (level.bad_in_a_row > 0)
    counts = finite & (~bad | again)
    loss = jnp.where(counts, loss, level.average)

    slot = jnp.minimum(level.seen, _FIRST - 1)
    firsts = level.first_losses.at[slot].set(jnp.where(early, loss, level.first_losses[slot]))
    first, first_deviation = _typical(firsts, level.seen + 1)
    weight = jnp.maximum(1.0 / (level.seen + 1).astype(jnp.float32), 1.0 - _NOISE_DECAY)
    distance = _FROM_MEAN_DISTANCE * jnp.abs(loss - level.average)
    running = level.deviation + weight * (distance - level.deviation)
    running = jnp.where(early, first_deviation, jnp.where(fresh, level.deviation, running))
    average = _DECAY * level.average + (1.0 - _DECAY) * loss
    average, lowest = (
        jnp.where(early, first, jnp.where(fresh, loss, x)) for x in (average, level.lowest)
    )

    margin = _DEVIATIONS * jnp.maximum(first_deviation, running)
    above = average > lowest + share * (first - lowest) + margin
    diverged = (~early & counts & above) | (again & (level.seen > 0))
    average = jnp.where(diverged, jnp.maximum(average, loss), average)
    lowest = jnp.where(diverged & ~rises, average, jnp.minimum(lowest, average))
    after = LossLevel(
        seen=optax.safe_increment(level.seen),
        bad_in_a_row=level.bad_in_a_row,
        begun=jnp.ones((), bool),
        first_losses=firsts,
        average=average,
        deviation=running,
        lowest=lowest,
        lowest_position=jnp.where(average <= lowest, position, level.lowest_position),
    )
    after = optax.tree.where(counts, after, level)
    bad_in_a_row = jnp.where(bad, optax.safe_increment(level.bad_in_a_row), 0)
    after = after._replace(bad_in_a_row=jnp.where(diverged, 0, bad_in_a_row).astype(jnp.int32))
    highest = jnp.where(early, jnp.inf, first + _DEVIATIONS * deviation)
    return Followed(after, jnp.minimum(loss, highest), ~counts, diverged)


def _typical(losses: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Median of the first `count` losses, and the deviation that their median distance from it tells.

    Medians, since an exploded loss may be among them.
    """
    here = jnp.arange(_FIRST) < count
    last = jnp.clip(count, 1, _FIRST) - 1

    def median(values: jax.Array) -> jax.Array:
        values = jnp.sort(jnp.where(here, values, jnp.finfo(jnp.float32).max))
        return 0.5 * (values[last // 2] + values[(last + 1) // 2])

    middle = median(losses)
    return jnp.where(count > 0, middle, 0.0), jnp.where(
        count > 0, _FROM_MEDIAN_DISTANCE * median(jnp.abs(losses - middle)), 0.0
    )
