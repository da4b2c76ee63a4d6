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

    Args:
      direction: as `automatic` takes it.
      where: named by errors.
      remedy: what to do if it cannot be tried.

    Raises:
      ValueError: it cannot be tried on one parameter, or turns the gradient around.
    """
    link = optax.with_extra_args_support(direction)

    def answers(gradient: float, parameter: float = 1.0, steps: int = 1) -> list[float]:
        params = jnp.full((1,), parameter, jnp.float32)

        def step(state: PyTree, _: None) -> tuple[PyTree, jax.Array]:
            update, state = link.update(jnp.full_like(params, gradient), state, params)
            return state, update[0]

        return jax.lax.scan(step, link.init(params), length=steps)[1].tolist()

    try:
        with jax.ensure_compile_time_eval():
            once, *later = answers(0.5, steps=_LATE)
            (twice,), (larger,) = answers(1.0), answers(0.5, parameter=2.0)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{where}: the direction could not be tried on a parameter of shape [1] ({why}): {remedy}"
        ) from error
    if not once > 0:
        raise ValueError(
            f"{where}: direction turns a gradient of 0.5 into {once}: give it without sign and "
            "learning rate, optax.scale_by_adam() instead of optax.adam(1e-3)"
        )
    if twice > 2**0.5 * once:
        return Kind(linear_scaling(), max_relative_step=_LONGEST_STEP)
    if larger > 2**0.5 * once:
        return Kind(sqrt_scaling(), _PEAK_FACTOR_RELATIVE, max_relative_step=_LONGEST_STEP)
    # By a half in four times as many steps; averages of squares have settled by then.
    if later[-1] < 0.6 * later[_LATE // 4 - 2]:
        # Its minimum moves up from test to test: the last knows it best.
        return Kind(sqrt_scaling(), _PEAK_FACTOR_ACCUMULATED, "earliest")
    return Kind(sqrt_scaling(), max_relative_step=_LONGEST_STEP)
