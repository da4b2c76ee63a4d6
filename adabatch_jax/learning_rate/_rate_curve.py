"""The two halves of a warm-up schedule as plain formulas: the rise, and the decay from the peak."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WARMUPS = ("exponential", "linear")
DECAYS = ("cosine", "half_cosine")


def interpolate(shape: str, low: Any, high: Any, x: jax.Array) -> jax.Array:
    """From `low` at x = 0 to `high` at x = 1: low · (high/low)^x, or low + (high − low) · x."""
    low, high = (jnp.asarray(rate).astype(jnp.float32) for rate in (low, high))
    if shape == "linear":
        return low + (high - low) * x
    return low * jnp.exp(x * jnp.log(high / low))


class Decay(NamedTuple):
    """From the peak to zero: at once, or after a hold until the last `cooldown_fraction` of the run.

    With s the part of the decay that is over at the end of a step: cosine ½ (1 + cos πs), half_cosine
    ½ + ½ cos(½π (1 + s)). During a hold the rate loses a factor `hold_factor` per test interval.
    """

    shape: str
    total: float
    cooldown_fraction: float | None
    hold_factor: Any
    interval: float

    @property
    def cooldown_start(self) -> float:
        """The position from which a held rate decays; the end of the run if none is held."""
        held = 0.0 if self.cooldown_fraction is None else self.cooldown_fraction
        return (1.0 - held) * self.total

    def factor(
        self, position: jax.Array, end: jax.Array, since: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The factor of a step from `position` to `end` after a peak at `since`, and if it is held."""
        total, start = jnp.float32(self.total), since
        held = jnp.zeros((), bool)
        factor = jnp.ones((), jnp.float32)
        if self.cooldown_fraction is not None:
            start = jnp.float32(self.cooldown_start)
            held = position < start
            intervals = jnp.floor((jnp.minimum(position, start) - since) / self.interval)
            intervals = jnp.maximum(intervals, 0.0)
            factor = jnp.power(jnp.asarray(self.hold_factor).astype(jnp.float32), intervals)
        part = jnp.clip((end - start) / jnp.maximum(total - start, 1e-30), 0.0, 1.0)
        if self.shape == "cosine":
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * part))
        else:
            decay = 0.5 + 0.5 * jnp.cos(0.5 * jnp.pi * (1.0 + part))
        return (factor * jnp.where(held, 1.0, decay)).astype(jnp.float32), held
