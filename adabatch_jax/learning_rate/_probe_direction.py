"""What traits a direction has, found by trying it on one parameter.

| question, in this order | answer of | tells |
|---|---|---|
| Is the step twice as long for twice the gradient? | SGD, momentum | linear |
| Is it shorter after 256 steps on the same gradient than after 64? | AdaGrad | gathers squares |
| Small gradients of 1, 2, 3 parts: do the steps lie on a rising line? | SGD behind a clip | linear |
| Is it twice as long at a parameter twice as large? | LAMB | a part of the parameter |
| None of these | Adam and the like | steps of one length |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax._types import PyTree, ScalingRule
from adabatch_jax.learning_rate._scaling import linear_scaling, sqrt_scaling

PEAK_PLACE, PEAK_FACTOR = "confirmed", 4.0  # of AutoWU, or by the kind of the direction:
_PEAK_FACTOR_ACCUMULATED = 8.0  # steps that shrink while squares are gathered: AdaGrad
_PEAK_FACTOR_RELATIVE = 1.0  # steps that are a part of the parameters: LAMB
_LONGEST_STEP = 0.125  # of the parameters
_LARGE, _SMALL = 1e4, 1e-3  # gradients above and below any threshold of clipping
_LATE = 256  # steps after which it is looked at whether a direction still shrinks
# Thresholds between the answers. A step is twice as long as another, or as long: halfway, in ratios.
_GROWS = 2**0.5
# The root of a sum of squares halves a step from 64 steps to 256; averages of squares have settled by 64.
_SHRUNK = 0.6
# A clip is a straight line up to its end. Adam bends at any ε, and weight decay adds a constant.
_FLAT, _STRAIGHT = 1e-4, 1e-3


class DirectionTraits(NamedTuple):
    """How a rate follows the batch, and how AutoWU finds its peak; the bound is `automatic`'s alone."""

    scaling: ScalingRule
    peak_factor: float = PEAK_FACTOR
    peak_at: str = PEAK_PLACE
    max_relative_step: float | None = None

    @property
    def autowu_options(self) -> dict[str, Any]:
        """For `scale_by_autowu`."""
        return {"peak_factor": self.peak_factor, "peak_at": self.peak_at}


def probe_direction(
    direction: optax.GradientTransformation, where: str, remedy: str
) -> DirectionTraits:
    """The traits, found on a gradient, its double, the same again and again, on larger parameters.

    The gradient is larger than what AdaGrad starts from. Clipping before or after counts for nothing,
    wherever its threshold is: where a large gradient says no more than another, small ones are tried.

    Args:
      direction: as `automatic` takes it.
      where: named by errors.
      remedy: what to do if it cannot be tried.

    Raises:
      ValueError: it cannot be tried on one parameter, or turns the gradient around.
    """
    link = optax.with_extra_args_support(direction)

    def answers(trials: list[tuple[float, float]]) -> list[list[float]]:
        """What comes of each gradient at each parameter, again and again."""
        gradients, params = jnp.array(trials, jnp.float32).T[..., None]
        states = [link.init(w) for w in params]

        def trial(given: tuple[PyTree, jax.Array, jax.Array]) -> jax.Array:
            start, gradient, w = given

            def step(state: PyTree, _: None) -> tuple[PyTree, jax.Array]:
                update, state = link.update(gradient, state, w)
                return state, update[0]

            return jax.lax.scan(step, start, length=_LATE)[1]

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return jax.lax.map(trial, (stacked, gradients, params)).tolist()

    try:
        with jax.ensure_compile_time_eval():
            small = [(k * _SMALL, 1.0) for k in (1, 2, 3)]
            runs = answers([(_LARGE, 1.0), (2 * _LARGE, 1.0), (_LARGE, 2.0), *small])
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{where}: the direction could not be tried on a parameter of shape [1] ({why}): {remedy}"
        ) from error
    once, twice, larger, first, second, third = (run[0] for run in runs)
    if not once > 0:
        raise ValueError(
            f"{where}: direction turns a gradient of {_LARGE:g} into {once}: give it without sign and "
            "learning rate, optax.scale_by_adam() instead of optax.adam(1e-3)"
        )
    linear = DirectionTraits(linear_scaling(), max_relative_step=_LONGEST_STEP)
    if twice > _GROWS * once:
        return linear
    if runs[0][-1] < _SHRUNK * runs[0][_LATE // 4 - 1]:
        # Its minimum moves up from test to test: the last knows it best.
        return DirectionTraits(sqrt_scaling(), _PEAK_FACTOR_ACCUMULATED, "earliest")
    rise, next_rise = second - first, third - second
    if rise > _FLAT * first and abs(next_rise - rise) < _STRAIGHT * rise:
        return linear
    if larger > _GROWS * once:
        return DirectionTraits(
            sqrt_scaling(), _PEAK_FACTOR_RELATIVE, max_relative_step=_LONGEST_STEP
        )
    return DirectionTraits(sqrt_scaling(), max_relative_step=_LONGEST_STEP)
