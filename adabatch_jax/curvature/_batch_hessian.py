"""Extremal eigenvalues of the Hessian of one batch, and back to those of all data.

A batch sees the full Hessian plus noise. The model is a few outliers on a bulk at 0, plus a symmetric
random matrix of independent entries (Wigner) whose square has the expectation ν²/𝔟 · I. Its bulk
reaches from −2ν/√𝔟 to 2ν/√𝔟, and an outlier is seen only if it stands out of the noise.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._types import ArrayLike
from adabatch_jax.curvature._effective_batch_size import (
    float32_arrays,
    inverse_effective_batch_size,
    root,
)


class HessianExtremes(NamedTuple):
    """Outermost eigenvalues of a Hessian, and how far a batch shows their directions.

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092; see `batch_hessian_extremes`.
    """

    largest: jax.Array  # float32: λ₁, of the batch or of all data
    smallest: jax.Array  # float32: λ_P
    largest_overlap: jax.Array  # float32 in [0, 1]: ⟨batch's, full⟩² of the unit eigenvectors of λ₁
    smallest_overlap: jax.Array  # float32 in [0, 1]: the same of λ_P


def batch_hessian_extremes(
    largest: ArrayLike,
    smallest: ArrayLike,
    noise: ArrayLike,
    batch_size: ArrayLike,
    dataset_size: ArrayLike | None = None,
) -> HessianExtremes:
    """Outermost eigenvalues of a batch's Hessian, from those of the full one and the noise.

    λ₁′ = λ₁ + ν²/(𝔟 λ₁) if λ₁ > ν/√𝔟, else 2ν/√𝔟, the edge of the noise; λ_P′ mirrors it for a negative
    λ_P, and is −2ν/√𝔟 otherwise. 1/𝔟 is `inverse_effective_batch_size`. Both forms are 2λ₁ at
    𝔟 = b* = ν²/λ₁². The squared overlap of the batch's eigenvector with the full one is
    max(0, 1 − b*/𝔟): below b* the batch does not know the direction.

    Args:
      largest: λ₁ of the full Hessian.
      smallest: λ_P of the full Hessian.
      noise: ν² = E‖(H_i − H) z‖² of one example for a unit vector z, as `hessian_noise` measures it;
        a negative estimate counts as 0.
      batch_size: b, examples; less than 1 counts as 1.
      dataset_size: N, examples > 0; None: so large that batches do not exhaust it.

    Returns:
      `HessianExtremes` of the batch: λ₁′, λ_P′ and the two overlaps, float32, in the shape to which the
      arguments broadcast. A NaN argument makes NaN what depends on it.

    Raises:
      ValueError: `dataset_size` is a number that is not positive.

    Example:
      >>> batch = batch_hessian_extremes(10.0, -1.0, 6400.0, jnp.array([16, 64, 256]))
      >>> batch.largest.tolist()  # b* = 64
      [40.0, 20.0, 12.5]
      >>> batch.largest_overlap.tolist()
      [0.0, 0.0, 0.75]
      >>> batch.smallest.tolist()
      [-40.0, -20.0, -10.0]

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092; the spiked Wigner matrix is standard.
    """
    inverse = inverse_effective_batch_size(batch_size, dataset_size)
    high, low, level, inverse = float32_arrays(largest, smallest, noise, inverse)
    level = jnp.maximum(level, 0.0) * inverse
    top, bottom = noisy_outlier(high, level), -noisy_outlier(-low, level)
    return HessianExtremes(top, bottom, _overlap(high, level), _overlap(-low, level))


def full_hessian_extremes(
    largest: ArrayLike,
    smallest: ArrayLike,
    noise: ArrayLike,
    batch_size: ArrayLike,
    dataset_size: ArrayLike | None = None,
) -> HessianExtremes:
    """Outermost eigenvalues of the full Hessian, from those of one batch: the inverse map.

    λ₁ = (λ₁′ + √(λ₁′² − 4ν²/𝔟)) / 2 if λ₁′ > 2ν/√𝔟. Otherwise the batch shows only noise, and the full
    eigenvalue may be anything up to ν/√𝔟: that bound is returned, with overlap 0. It is where the
    formula ends, so the result is continuous, and a learning rate taken from it is on the safe side.
    λ_P mirrors it.

    Args:
      largest: λ₁′, largest eigenvalue of the batch's Hessian.
      smallest: λ_P′, its smallest.
      noise: ν² of one example, as for `batch_hessian_extremes`.
      batch_size: b, examples; less than 1 counts as 1.
      dataset_size: N, examples > 0; None: so large that batches do not exhaust it.

    Returns:
      `HessianExtremes` of the full Hessian: λ₁, λ_P and the two overlaps, float32, in the shape to which
      the arguments broadcast. A NaN argument makes NaN what depends on it.

    Raises:
      ValueError: `dataset_size` is a number that is not positive.

    Example:
      >>> full = full_hessian_extremes(12.5, -5.0, 6400.0, 256)
      >>> float(full.largest), float(full.smallest)  # the second is hidden: −5 is above −2ν/√𝔟
      (10.0, -5.0)
      >>> float(full.largest_overlap), float(full.smallest_overlap)
      (0.75, 0.0)

    Source: inverse of `batch_hessian_extremes`; the bound below the edge is ours.
    """
    inverse = inverse_effective_batch_size(batch_size, dataset_size)
    high, low, level, inverse = float32_arrays(largest, smallest, noise, inverse)
    level = jnp.maximum(level, 0.0) * inverse
    top, bottom = _clean_outlier(high, level), _clean_outlier(-low, level)
    return HessianExtremes(top, -bottom, _overlap(top, level), _overlap(bottom, level))


def transition_batch_size(
    largest: ArrayLike, noise: ArrayLike, *, momentum: ArrayLike = 0.0
) -> jax.Array:
    """b* = m ν²/λ₁²: below it a batch's largest eigenvalue is mostly noise, above it mostly curvature.

    Up to b* a larger batch allows a learning rate larger in proportion; far above it nothing is gained.
    With momentum the transition of the learning rate comes later, by m = (1 + β)/(1 − β), which is 19 for
    β = 0.9: momentum adds up the noise of many batches (`max_stable_learning_rate`). That of the
    eigenvalue is the one with m = 1.

    Args:
      largest: λ₁ of the full Hessian, or λ_P for the transition of the smallest; only its square counts.
      noise: ν² of one example; a negative estimate counts as 0.
      momentum: β in [0, 1) of the optimizer, for Adam its b1.

    Returns:
      b*, effective examples, float32, in the shape to which the arguments broadcast: 0 without noise,
      else inf for λ₁ = 0. NaN where an argument is.

    Raises:
      ValueError: a `momentum` outside [0, 1), given as a number.

    Example:
      >>> float(transition_batch_size(10.0, 6400.0))
      64.0
      >>> float(transition_batch_size(10.0, 6400.0, momentum=0.5))
      192.0

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092; m is ours.
    """
    _validate.between("transition_batch_size", 0.0, 1.0, momentum=momentum)
    value, level, beta = float32_arrays(largest, noise, momentum)
    level = jnp.maximum(level, 0.0) * noise_with_momentum(beta)
    flat = value == 0
    safe = jnp.where(flat, 1.0, value)
    return jnp.where(flat & (level > 0), jnp.inf, level / safe / safe)


def noise_with_momentum(beta: jax.Array) -> jax.Array:
    """m: how many times the noise of a batch counts, since momentum remembers the batches before."""
    return (1.0 + beta) / (1.0 - beta)


def noisy_outlier(value: jax.Array, level: jax.Array) -> jax.Array:
    """The largest eigenvalue once noise with ν²/𝔟 = `level` is added to the outlier `value`."""
    edge = root(level)
    seen = ~(value <= edge)  # a NaN stays one
    return jnp.where(seen, value + level / jnp.where(seen, value, 1.0), 2.0 * edge)


def _clean_outlier(value: jax.Array, level: jax.Array) -> jax.Array:
    """The inverse of `noisy_outlier`; ν/√𝔟 where the noise hides the outlier."""
    edge = root(level)
    excess = jnp.maximum(value - 2.0 * edge, 0.0)
    # As a product, the difference of the squares loses nothing near the edge.
    return edge + (excess + root(excess) * root(excess + 4.0 * edge)) / 2.0


def _overlap(value: jax.Array, level: jax.Array) -> jax.Array:
    seen = ~(value <= root(level))
    safe = jnp.where(seen, value, 1.0)
    return jnp.where(seen, jnp.maximum(1.0 - level / safe / safe, 0.0), 0.0)
