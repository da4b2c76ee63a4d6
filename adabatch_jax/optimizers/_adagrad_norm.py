"""AdaGrad with one scalar accumulator for all parameters together."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._tree import scale, squared_norm
from adabatch_jax._types import ArrayLike, PyTree


class ScaleByAdagradNormState(NamedTuple):
    """State of `scale_by_adagrad_norm`."""

    sum_of_squared_norms: jax.Array  # float32


def scale_by_adagrad_norm(
    initial_accumulator_value: ArrayLike = 0.01, eps: ArrayLike = 1e-10
) -> optax.GradientTransformation:
    """AdaGrad with one scalar accumulator for all parameters together.

    v ← v + ‖g‖², u = g / (√v + ε): the step adapts to the size of the gradient and needs no bound on
    it, and the state is a single number.

    Args:
      initial_accumulator_value: v₀ ≥ 0, in units of squared gradient.
      eps: ε ≥ 0, outside the root. Not both may be 0.

    Returns:
      A `GradientTransformation`; the accumulator is float32 whatever the parameters are. Both
      arguments may be injected by `optax.inject_hyperparams`; there are no static_args.

    Raises:
      ValueError: a negative argument, or both 0.

    Example:
      >>> import jax.numpy as jnp
      >>> link = scale_by_adagrad_norm(initial_accumulator_value=0.0)
      >>> g = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
      >>> u, state = link.update(g, link.init(g))
      >>> round(float(u["a"][0]), 4), round(float(u["b"][0]), 4)
      (0.6, 0.8)

    Source: Ward, Wu, Bottou (2019), arXiv 1806.01811, algorithm 1 (AdaGrad-Norm).
    """
    arguments: dict[str, Any] = {"initial_accumulator_value": initial_accumulator_value, "eps": eps}
    _validate.between("scale_by_adagrad_norm", 0.0, float("inf"), **arguments)
    if _validate.is_static(*arguments.values()) and not any(arguments.values()):
        raise ValueError(
            "scale_by_adagrad_norm: initial_accumulator_value and eps must not both be 0"
        )

    def init(params: PyTree) -> ScaleByAdagradNormState:
        del params
        return ScaleByAdagradNormState(jnp.asarray(initial_accumulator_value).astype(jnp.float32))

    def update(
        updates: PyTree, state: ScaleByAdagradNormState, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByAdagradNormState]:
        del params
        total = state.sum_of_squared_norms + squared_norm(updates)
        denominator = jnp.sqrt(total) + jnp.asarray(eps).astype(jnp.float32)
        factor = jnp.where(denominator > 0, 1.0 / jnp.where(denominator > 0, denominator, 1.0), 0.0)
        return scale(updates, factor), ScaleByAdagradNormState(total)

    return optax.GradientTransformation(init, update)
