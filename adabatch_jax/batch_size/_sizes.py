"""From what a test asks for to a batch size: limits, whole examples, whole calls."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax import _validate


@dataclass(frozen=True)
class Sizes:
    """The batch sizes that a controller may choose; the arguments of `adapt_batch_size`."""

    smallest: Any
    largest: Any
    unit: Any  # every size is a multiple of it, and so is `largest`
    growth_limit: Any
    monotone: bool
    population: int | None

    def in_calls_of(self, examples: Any) -> Sizes:
        """Of these, the sizes that whole calls of so many examples add up to; None: any.

        Raises:
          ValueError: not a positive integer, or no such size below the largest.
        """
        if examples is None:
            return self
        if _validate.is_traced(examples):
            raise ValueError(
                "adapt_batch_size: batch_size_multiple must be a Python int, got a tracer"
            )
        _validate.positive_int("adapt_batch_size", batch_size_multiple=examples)
        unit: Any
        if not _validate.is_static(self.unit):
            unit = jnp.lcm(self.unit, int(examples))
        else:
            unit = math.lcm(int(self.unit), int(examples))
        largest = self.largest // unit * unit
        if _validate.is_static(largest) and largest == 0:
            raise ValueError(
                f"adapt_batch_size: no multiple of {unit} examples (batch_size_multiple={examples}, "
                f"multiple_of={self.unit}) fits below max_batch_size={self.largest}"
            )
        return replace(self, largest=largest, unit=unit)

    def full(self, size: jax.Array) -> jax.Array:
        """Whether no test can change this size."""
        return (size >= self.largest) & self.monotone

    def rounded(self, size: jax.Array) -> jax.Array:
        """The smallest permitted size that is not below `size`, or the largest."""
        return jnp.minimum(size + (-size) % self.unit, self.largest)

    def after(self, size: jax.Array, required: jax.Array, least: jax.Array) -> jax.Array:
        """The size after `size` (int32) where a test requires so many (float32), and int32 at `least`."""
        now = size.astype(jnp.float32)
        limit = jnp.inf if self.growth_limit is None else self.growth_limit
        beyond = 2.0 if self.growth_limit is None else self.growth_limit
        factor = jnp.where(jnp.isinf(required), beyond, limit).astype(jnp.float32)
        target = jnp.minimum(required, factor * now)
        target = jnp.where(jnp.isnan(target), now, target)
        if self.population is not None:  # all there is has no noise
            target = jnp.minimum(target, self.population)
        # An integer stays one where division is a little off, as it is on a GPU: 100.00001 is 100.
        rounding = jnp.minimum(target * 2.0**-21, 0.25)
        # Bounds are integers: float32 has no room for all of them beyond 2**24.
        whole = jnp.ceil(jnp.minimum(target - rounding, 2.0**30)).astype(jnp.int32)
        reached = target >= jnp.asarray(self.largest).astype(jnp.float32)
        whole = jnp.where(reached, self.largest, whole)
        least = jnp.maximum(least, self.smallest)
        if self.monotone:
            least = jnp.maximum(least, size)
        return self.rounded(jnp.minimum(jnp.maximum(whole, least), self.largest))


def check_sizes(initial: Any, largest: Any, smallest: Any, multiple_of: Any) -> None:
    """Raises ValueError where they are not positive integers, in order, multiples of `multiple_of`."""
    sizes = dict(
        initial_batch_size=initial,
        max_batch_size=largest,
        min_batch_size=smallest,
        multiple_of=multiple_of,
    )
    _validate.positive_int("adapt_batch_size", **sizes)
    if not _validate.is_static(*sizes.values()):
        return
    if not smallest <= initial <= largest <= 2**30:
        raise ValueError(
            "adapt_batch_size: need min_batch_size ≤ initial_batch_size ≤ max_batch_size ≤ 2**30, got "
            f"{smallest}, {initial}, {largest}"
        )
    for name in ("initial_batch_size", "max_batch_size"):
        if sizes[name] % multiple_of:
            raise ValueError(
                f"adapt_batch_size: multiple_of={multiple_of} does not divide {name}={sizes[name]}"
            )
