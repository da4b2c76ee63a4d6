"""What kind of direction this is: found by trying it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax.learning_rate._scaling import linear_scaling, sqrt_scaling

PyTree = Any
PEAK_PLACE, PEAK_FACTOR = "confirmed", 4.0  # of AutoWU, or by the kind of the direction:
_PEAK_FACTOR_ACCUMULATED = 8.0  # steps that shrink while squares are gathered: AdaGrad
_PEAK_FACTOR_RELATIVE = 1.0  # steps that are a part of the parameters: LAMB
_LONGEST_STEP = 0.125  # of the parameters
_LARGE, _SMALL = 1e4, 1e-3  # gradients above and below any threshold of clipping
_LATE = 256  # steps after which it is looked at whether a direction still shrinks


class Kind(NamedTuple):
    """How a rate follows the batch, and how AutoWU finds its peak; the bound is `automatic`'s alone."""

    scaling: Callable[..., Any]
    peak_factor: float = PEAK_FACTOR
    peak_at: str = PEAK_PLACE
    max_relative_step: float | None = None

    @property
    def autowu_options(self) -> dict[str, Any]:
        """For `scale_by_autowu`."""
        return {"peak_factor": self.peak_factor, "peak_at": self.peak_at}


def kind_of(direction: optax.GradientTransformation, where: str, remedy: str) -> Kind:
    """Found by trying it: on a gradient, its double, the same again and again, on larger parameters.

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
    linear = Kind(linear_scaling(), max_relative_step=_LONGEST_STEP)
    if twice > 2**0.5 * once:
        return linear
    # By a half in four times as many steps; averages of squares have settled by then.
    if runs[0][-1] < 0.6 * runs[0][_LATE // 4 - 1]:
        # Its minimum moves up from test to test: the last knows it best.
        return Kind(sqrt_scaling(), _PEAK_FACTOR_ACCUMULATED, "earliest")
    # A clip is a straight line up to its end. Adam bends at any ε, and weight decay adds a constant.
    rise, next_rise = second - first, third - second
    if rise > 1e-4 * first and abs(next_rise - rise) < 1e-3 * rise:
        return linear
    if larger > 2**0.5 * once:
        return Kind(sqrt_scaling(), _PEAK_FACTOR_RELATIVE, max_relative_step=_LONGEST_STEP)
    return Kind(sqrt_scaling(), max_relative_step=_LONGEST_STEP)
