"""Types by name. What an array or a tree holds, its shape and dtype, stands in the docstrings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.typing import ArrayLike as ArrayLike

# A pytree; JAX has no type for one.
PyTree = Any
# The name of a device axis, several, or none.
AxisName = str | Sequence[str] | None
# A loss of parameters and whatever else: a scalar, or (scalar, aux).
LossFn = Callable[..., Any]
# Of the examples used so far (Optax: of the steps), a number.
Schedule = Callable[[jax.Array], Any]
# Of a batch size and a base batch size (float32 scalars, or Python's): a factor, or a hyperparameter.
ScalingRule = Callable[[Any, Any], jax.Array]
