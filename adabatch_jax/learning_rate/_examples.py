"""How many examples stand behind a gradient: what `update` is told, by `noise=` or by a number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax._types import ArrayLike
from adabatch_jax.noise import GradientNoise


def examples_behind(what: str, noise: GradientNoise | None, name: str, number: Any) -> Any:
    """The number given as the extra argument `name`, or else the examples of the noise.

    Raises:
      ValueError: neither was given; the message begins with `what`.
    """
    if number is not None:
        return number
    if noise is None:
        raise ValueError(
            f"{what}: pass noise=noise (from value_and_grad_noise) or {name}= to optimizer.update"
        )
    return noise.num_examples


def batch_sizes(
    where: str,
    base_batch_size: ArrayLike,
    noise: GradientNoise | None,
    num_examples: ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
    """What a rule is given: the batch behind the gradient, at least 1, and the base; float32.

    A batch size that is not finite says nothing, and counts as the base.
    """
    size = examples_behind(f"{where} needs the batch size", noise, "num_examples", num_examples)
    size, base = (jnp.asarray(x).astype(jnp.float32) for x in (size, base_batch_size))
    return jnp.where(jnp.isfinite(size), jnp.maximum(size, 1.0), base), base
