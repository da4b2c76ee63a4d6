"""Losses of single examples, and their mean over the real examples of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adabatch_jax._types import PyTree

Apply = Callable[[PyTree, jax.Array], jax.Array]  # (params, inputs as stored) -> logits


def losses_and_logits(
    apply: Apply, params: PyTree, inputs: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of each example, [B], and logits [B, …, classes], float32.

    `labels` are [B], or [B, L] where an example is a sequence. `inputs` come as they are stored.
    """
    logits = apply(params, inputs).astype(jnp.float32)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return mean_per_example(losses), logits


def mean_per_example(values: jax.Array) -> jax.Array:
    """Means over all axes but the first."""
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def masked_mean(losses: jax.Array, size: Any) -> jax.Array:
    """The mean loss of the real examples of a group: Σ_{i < size} ℓ_i / size, and 0 where size is 0.

    Args:
      losses: ℓ, one loss an example, [micro_batch_size]; further axes are averaged, too.
      size: real examples, integer scalar, traced or not.

    Returns:
      The mean, a scalar, float32 (float64 for float64). What the other rows hold does not matter,
      unless their gradient is not finite.

    Raises:
      ValueError: `losses` is a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> float(masked_mean(jnp.array([1.0, 3.0, 100.0]), 2))
      2.0
    """
    if losses.ndim == 0:
        raise ValueError("masked_mean: losses must have one loss an example, got a scalar")
    losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    losses = jnp.mean(losses, axis=tuple(range(1, losses.ndim)))
    real = jnp.arange(losses.shape[0]) < size
    return jnp.sum(jnp.where(real, losses, 0)) / jnp.maximum(size, 1).astype(losses.dtype)
