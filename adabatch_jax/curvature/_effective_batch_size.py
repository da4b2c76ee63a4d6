"""How many independent examples a batch is worth when the data set is finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._types import ArrayLike


def inverse_effective_batch_size(
    batch_size: ArrayLike, dataset_size: ArrayLike | None = None
) -> jax.Array:
    """1/𝔟, the factor by which the noise of one example shrinks in a batch drawn from a data set.

    1/𝔟 = (N − b) / (b N) for a batch drawn without replacement, 1/b without a data set. It is 0 at
    b ≥ N: the whole data set has no noise. It goes with a ν² or σ² that is Bessel-corrected. This form
    is used rather than 𝔟 because it is never infinite.

    Args:
      batch_size: b, examples over all devices; less than 1 counts as 1. Any shape.
      dataset_size: N, examples > 0; None: so large that batches do not exhaust it.

    Returns:
      1/𝔟, float32, in the shape to which the arguments broadcast.

    Raises:
      ValueError: `dataset_size` is a number that is not positive.

    Example:
      >>> float(inverse_effective_batch_size(64, 128))
      0.0078125
      >>> inverse_effective_batch_size(jnp.array([64, 128]), 128).tolist()
      [0.0078125, 0.0]

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092; here with the Bessel correction.
    """
    if dataset_size is None:
        (size,) = float32_arrays(batch_size)
        return 1.0 / jnp.maximum(size, 1.0)
    _validate.positive("inverse_effective_batch_size", dataset_size=dataset_size)
    size, total = float32_arrays(batch_size, dataset_size)
    size, total = jnp.maximum(size, 1.0), jnp.maximum(total, 1.0)
    return jnp.maximum(total - size, 0.0) / total / size


def effective_batch_size(batch_size: ArrayLike, dataset_size: ArrayLike | None = None) -> jax.Array:
    """𝔟: the batch from an endless data set that is as noisy as this one.

    𝔟 = b N / (N − b), infinite at b ≥ N.

    Args:
      batch_size: b, examples over all devices; less than 1 counts as 1. Any shape.
      dataset_size: N, examples > 0; None: so large that batches do not exhaust it.

    Returns:
      𝔟 ≥ b, float32, in the shape to which the arguments broadcast.

    Raises:
      ValueError: `dataset_size` is a number that is not positive.

    Example:
      >>> effective_batch_size(jnp.array([64, 96, 128]), 128).tolist()
      [128.0, 384.0, inf]

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092; here with the Bessel correction.
    """
    inverse = inverse_effective_batch_size(batch_size, dataset_size)
    noisy = inverse != 0
    return jnp.where(noisy, 1.0 / jnp.where(noisy, inverse, 1.0), jnp.inf)


def float32_arrays(*values: Any) -> list[jax.Array]:
    """The values as float32 arrays of one shape: strict rank promotion allows no implicit one."""
    return jnp.broadcast_arrays(*(jnp.asarray(value, jnp.float32) for value in values))


def root(x: jax.Array) -> jax.Array:
    """√x with 0 for x ≤ 0, and a gradient that is finite there."""
    inside = ~(x <= 0)  # a NaN stays one
    return jnp.where(inside, jnp.sqrt(jnp.where(inside, x, 1.0)), 0.0)
