"""How long the first steps are against the parameters: what bounds a rate that the loss alone allows."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax._tree import squared_norm
from adabatch_jax._types import PyTree

_STEPS = 24  # that are looked at: a momentum of 0.9 is nearly full then


class StepLength(NamedTuple):
    """How high a rate the first directions allow."""

    directions_seen: jax.Array  # int32: up to 24
    highest_rate: jax.Array  # float32: infinite if none could be measured

    @property
    def share_seen(self) -> jax.Array:
        """Of the directions that are looked at, from 1/24 to 1: a ramp for a rate taken from them."""
        return self.directions_seen.astype(jnp.float32) / _STEPS


def no_length() -> StepLength:
    """Before the first step."""
    return StepLength(jnp.zeros((), jnp.int32), jnp.array(jnp.inf, jnp.float32))


def measure(
    length: StepLength,
    direction: PyTree,
    params: PyTree,
    relative_step: Any,
    wanted: jax.Array,
    one_by_one: bool = False,
) -> StepLength:
    """With one more direction d: the rate is at most relative_step ‖w‖/‖d‖, if that is a number.

    Only parameters w with at least two axes count: biases and the scales of a normalisation start at
    zero or one whatever the network. They count as no shorter than half of what keeps the length of what
    passes through them: those that start smaller are meant to grow, and are no measure of a step.
    Those that are all zero bound nothing, and a parameter that this direction leaves where it is, as a
    frozen one, is not counted as long.

    With `one_by_one` the rate is the lowest that one of these arrays asks for, zero or not.
    """

    def with_this(length: StepLength) -> StepLength:
        pairs = zip(jax.tree.leaves(direction), jax.tree.leaves(params), strict=True)
        of_matrices = [(d, w) for d, w in pairs if w.ndim >= 2]
        groups = [[pair] for pair in of_matrices] if one_by_one else [of_matrices]
        size = squared_norm([w for _, w in of_matrices])
        highest = length.highest_rate
        for group in groups:
            steps, sizes = ([squared_norm(pair[i]) for pair in group] for i in (0, 1))
            step = sum(steps, start=jnp.float32(0))
            moved = (jnp.where(d > 0, w, 0.0) for d, w in zip(steps, sizes, strict=True))
            own = sum(moved, start=jnp.float32(0))
            # A matrix of unit gain is √(outputs) long, on whichever axis they lie.
            least = 0.25 * sum(min(w.shape[0], w.shape[-1]) for _, w in group)
            rate = jnp.sqrt(jnp.maximum(own, jnp.float32(least)) / step)
            rate *= jnp.asarray(relative_step).astype(jnp.float32)
            known = jnp.isfinite(rate) & (rate > 0) & (one_by_one | (size > 0))
            highest = jnp.where(known, jnp.minimum(highest, rate), highest)
        # Parameters that begin at zero are as long as their first steps: no measure, now or later.
        goes_on = one_by_one | (size > 0)
        return StepLength(jnp.where(goes_on, length.directions_seen + 1, _STEPS), highest)

    # A cond, so that later steps do not read the parameters once more.
    wanted &= length.directions_seen < _STEPS
    return jax.lax.cond(wanted, with_this, lambda length: length, length)
