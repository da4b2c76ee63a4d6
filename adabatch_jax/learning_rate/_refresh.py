"""When to measure again what is too dear for every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax import _validate

UNITS = ("step", "example")


@dataclass(frozen=True)
class Refresh:
    """A measurement every so many steps or examples; at every step until there is a result."""

    every: int
    unit: str

    @classmethod
    def checked(cls, where: str, refresh_every: int, refresh_unit: str) -> Refresh:
        """The same, from the arguments of a factory.

        Raises:
          ValueError: one is out of range.
        """
        _validate.one_of(where, UNITS, refresh_unit=refresh_unit)
        _validate.positive_int(where, refresh_every=refresh_every)
        _validate.between(where, 1, 2**32, refresh_every=refresh_every)  # the clock is a uint32
        return cls(refresh_every, refresh_unit)

    @property
    def by_examples(self) -> bool:
        """Whether the batch size is needed."""
        return self.unit == "example"

    def start(self) -> jax.Array:
        """The clock before the first step, uint32."""
        return jnp.uint32(self.every)

    def due(self, since: jax.Array, known: jax.Array, emit: Any) -> jax.Array:
        """Whether this update measures: not before `emit`."""
        return ((since >= np.uint32(self.every)) | ~known) & jnp.asarray(emit).astype(bool)

    def advance(self, since: jax.Array, due: jax.Array, batch_size: jax.Array | None) -> jax.Array:
        """The clock after this step."""
        step = jnp.uint32(1)
        if self.by_examples and batch_size is not None:
            step = batch_size.astype(jnp.uint32)
        return jnp.where(due, jnp.uint32(0), since) + step
