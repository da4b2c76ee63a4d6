"""What AutoWU has been asked for, checked, and the learning rate as a function of position."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax.learning_rate._peak import Peak
from adabatch_jax.learning_rate._posterior_test import Smoother

WARMUPS = ("exponential", "linear")
UNITS = ("step", "epoch")
DECAYS = ("cosine", "half_cosine")
# Of a warm-up, at least: with fewer the rate is multiplied by more than three from one to the next.
LEAST_WARMUP_STEPS = 10
_RAMP_START = 1.0 / 3.0  # of the peak, where a ramp begins
_WHERE = "scale_by_autowu"


class Plan(NamedTuple):
    """All that a step does not change. Positions are in steps or examples, by the clock."""

    by_steps: bool
    total: int
    interval: int  # from test to test
    min_learning_rate: Any
    max_learning_rate: Any
    max_warmup_fraction: float
    patience: int
    confidence: Any
    warmup: str
    warmup_unit: str
    decay: str
    cooldown_fraction: float | None
    max_losses: int
    smoother: Smoother
    peak: Peak
    watch_divergence: bool

    @property
    def unsearched(self) -> bool:
        """Whether there is no warm-up at all: the rate is given, or comes from the length of steps."""
        return not self.max_warmup_fraction > 0

    @property
    def tests(self) -> bool:
        """Whether the program has the test in it."""
        return not (self.smoother.warmup_over or self.unsearched)

    @property
    def limit(self) -> int:
        """W: the longest warm-up, before it is fitted to the first batch."""
        if self.warmup_unit == "epoch":
            return int(self.max_warmup_fraction * (self.total / self.interval)) * self.interval
        return int(self.max_warmup_fraction * self.total)

    @property
    def cooldown_start(self) -> float:
        """The position from which a held rate decays; the end of the run if none is held."""
        return (1.0 - (self.cooldown_fraction or 0.0)) * self.total

    def check(self, initial_batch_size: int | None) -> None:
        """Every option by itself, and that there is time for one test, and for ten steps.

        Raises:
          ValueError: naming argument and value.
        """
        low, high = self.min_learning_rate, self.max_learning_rate
        _validate.positive(_WHERE, min_learning_rate=low, max_learning_rate=high)
        if _validate.is_static(low, high) and low >= high:
            raise ValueError(
                f"{_WHERE}: min_learning_rate={low!r} must be below max_learning_rate={high!r}"
            )
        for name in ("max_warmup_fraction", "cooldown_fraction"):
            value = getattr(self, name)
            if value is not None:
                _validate.between(_WHERE, 0.0, 1.0, closed=True, **{name: value})
        _validate.positive(_WHERE, confidence=self.confidence)
        _validate.between(_WHERE, 0.0, 1.0, confidence=self.confidence)
        _validate.positive_int(_WHERE, patience=self.patience, max_losses=self.max_losses)
        if self.max_losses < 16:
            raise ValueError(f"{_WHERE}: max_losses must be at least 16, got {self.max_losses!r}")
        _validate.one_of(_WHERE, WARMUPS, warmup=self.warmup)
        _validate.one_of(_WHERE, UNITS, warmup_unit=self.warmup_unit)
        _validate.one_of(_WHERE, DECAYS, decay=self.decay)
        if initial_batch_size is not None:
            _validate.positive_int(_WHERE, initial_batch_size=initial_batch_size)
        if self.unsearched:
            return
        unit = "steps" if self.by_steps else "examples"
        leaves = (
            f"{_WHERE}: total_{unit}={self.total} with max_warmup_fraction={self.max_warmup_fraction} "
            f"leaves a warm-up of {self.limit} {unit}"
        )
        if self.limit <= self.interval:
            raise ValueError(
                f"{leaves}, too short for one test after {unit}_per_test={self.interval}"
            )
        steps = self.steps_of(initial_batch_size)
        if steps is not None and steps < LEAST_WARMUP_STEPS:
            of_batches = "" if self.by_steps else f", {steps} steps of {initial_batch_size},"
            raise ValueError(
                f"{leaves}{of_batches} too short to find a rate in: {LEAST_WARMUP_STEPS} needed"
            )

    def steps_of(self, initial_batch_size: int | None) -> int | None:
        """Of the longest warm-up; None if the batch is not known."""
        if self.by_steps:
            return self.limit
        return None if initial_batch_size is None else self.limit // initial_batch_size

    def top(self, first_increment: jax.Array) -> jax.Array:
        """W; with the examples clock a whole number of first batches, as steps are."""
        if self.by_steps or self.warmup_unit == "epoch":
            return jnp.float32(self.limit)
        unit = jnp.maximum(first_increment, 1).astype(jnp.float32)
        return jnp.floor(jnp.float32(self.max_warmup_fraction * self.total) / unit) * unit

    def between(self, high: Any, x: jax.Array) -> jax.Array:
        """From α_min at x = 0 to `high` at x = 1, along the warm-up's curve."""
        low, high = (jnp.asarray(v).astype(jnp.float32) for v in (self.min_learning_rate, high))
        if self.warmup == "linear":
            return low + (high - low) * x
        return low * jnp.exp(x * jnp.log(high / low))

    def rising(self, position: jax.Array, top: jax.Array) -> jax.Array:
        """The rate of a step of the warm-up."""
        if self.warmup_unit == "epoch":
            position = jnp.floor(position / self.interval) * self.interval
        return self.between(self.max_learning_rate, position / jnp.maximum(top, 1.0))

    def falling(
        self, position: jax.Array, end: jax.Array, since: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The factor of a step from `position` to `end` after a peak at `since`, and if it is held.

        With s the part of the decay that is over at the end of the step: cosine ½ (1 + cos πs),
        half_cosine ½ + ½ cos(½π (1 + s)).
        """
        start, held, factor = since, jnp.zeros((), bool), jnp.ones((), jnp.float32)
        if self.cooldown_fraction is not None:
            start = jnp.float32(self.cooldown_start)
            held = position < start
            intervals = jnp.floor((jnp.minimum(position, start) - since) / self.interval)
            hold_factor = jnp.asarray(self.peak.hold_factor).astype(jnp.float32)
            factor = jnp.power(hold_factor, jnp.maximum(intervals, 0.0))
        if self.peak.ramp_fraction:
            risen = (position - since) / (self.peak.ramp_fraction * jnp.maximum(since, 1.0))
            factor = factor * jnp.clip(_RAMP_START + (1.0 - _RAMP_START) * risen, 0.0, 1.0)
        part = (end - start) / jnp.maximum(jnp.float32(self.total) - start, 1e-30)
        part = jnp.clip(part, 0.0, 1.0)
        if self.decay == "cosine":
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * part))
        else:
            decay = 0.5 + 0.5 * jnp.cos(0.5 * jnp.pi * (1.0 + part))
        return (factor * jnp.where(held, 1.0, decay)).astype(jnp.float32), held


def read_clock(
    steps: Any, steps_per: Any, examples: Any, examples_per: Any
) -> tuple[bool, int, int]:
    """Whether steps are counted, and length of the run and of a test interval in that unit.

    Raises:
      ValueError: not exactly one pair, or not positive integers.
    """
    given = {
        "total_steps": steps,
        "steps_per_test": steps_per,
        "total_examples": examples,
        "examples_per_test": examples_per,
    }
    known = {name: value for name, value in given.items() if value is not None}
    if set(known) not in (
        {"total_steps", "steps_per_test"},
        {"total_examples", "examples_per_test"},
    ):
        raise ValueError(
            f"{_WHERE}: give total_steps and steps_per_test, or total_examples and "
            f"examples_per_test, got {known or 'neither'}"
        )
    _validate.positive_int(_WHERE, **known)
    total, interval = (int(value) for value in known.values())
    if interval >= 2**31:
        raise ValueError(f"{_WHERE}: examples_per_test must be below 2**31, got {interval}")
    return "total_steps" in known, total, interval
