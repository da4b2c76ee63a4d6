"""Extremal eigenvalues of the Gauss-Newton matrix of one batch, and back to those of all data.

The Gauss-Newton matrix of a batch is the second moment of 𝔟 vectors in P dimensions. The model is a
few outliers on σ² · I, so the bulk of a batch is Marchenko and Pastur's: from σ²(1 − √γ)² to
σ²(1 + √γ)² with γ = P/𝔟.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax.curvature._effective_batch_size import float32_arrays, root


class GaussNewtonExtremes(NamedTuple):
    """Outermost eigenvalues of a Gauss-Newton matrix, and how far a batch shows the top direction.

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092; see `batch_gauss_newton_extremes`.
    """

    largest: jax.Array  # float32: λ₁, of the batch or of all data
    smallest: jax.Array  # float32: the lower edge of the bulk
    overlap: jax.Array  # float32 in [0, 1]: ⟨batch's, full⟩² of the unit eigenvectors of λ₁


def batch_gauss_newton_extremes(largest: Any, noise: Any, ratio: Any) -> GaussNewtonExtremes:
    """Outermost eigenvalues of a batch's Gauss-Newton matrix, from the full λ₁ and the noise.

    λ₁′ = λ₁ (1 + γσ²/(λ₁ − σ²)) if λ₁ > σ²(1 + √γ), else σ²(1 + √γ)²; the lower edge is σ²(1 − √γ)², or 0
    for γ > 1, where the batch has fewer examples than directions. With ℓ = λ₁/σ² the squared overlap of
    the batch's top eigenvector with the full one is (1 − γ/(ℓ − 1)²) / (1 + γ/(ℓ − 1)), 0 below
    ℓ = 1 + √γ.

    Args:
      largest: λ₁ of the full matrix.
      noise: σ², the level of one direction; negative counts as 0.
      ratio: γ = P/𝔟 ≥ 0, directions per effective example; negative counts as 0. For a data set of N:
        P · `inverse_effective_batch_size(b, N)`.

    Returns:
      `GaussNewtonExtremes` of the batch, float32, in the shape to which the arguments broadcast. A NaN
      argument makes NaN what depends on it.

    Example:
      >>> batch = batch_gauss_newton_extremes(5.0, 1.0, jnp.array([0.25, 4.0, 64.0]))
      >>> batch.largest.tolist()
      [5.3125, 10.0, 81.0]
      >>> batch.smallest.tolist()
      [0.25, 0.0, 0.0]
      >>> batch.overlap.tolist()
      [0.9264705777168274, 0.375, 0.0]

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092; the spiked covariance is standard.
    """
    value, level, gamma = float32_arrays(largest, noise, ratio)
    level, gamma = jnp.maximum(level, 0.0), jnp.maximum(gamma, 0.0)
    spread = root(gamma)
    seen, gap = _gap(value, level, spread)
    top = jnp.where(seen, value * (1.0 + gamma * level / gap), level * jnp.square(1.0 + spread))
    bottom = jnp.where(gamma > 1.0, 0.0, level * jnp.square(1.0 - spread))
    return GaussNewtonExtremes(top, bottom, _overlap(value, level, gamma))


def full_gauss_newton_extremes(largest: Any, noise: Any, ratio: Any) -> GaussNewtonExtremes:
    """Outermost eigenvalues of the full Gauss-Newton matrix, from the λ₁′ of one batch: the inverse map.

    λ₁ = (c + √(c² − 4λ₁′σ²)) / 2 with c = λ₁′ + σ² − γσ² if λ₁′ > σ²(1 + √γ)². Otherwise the batch shows
    only noise, and λ₁ may be anything up to σ²(1 + √γ): that bound is returned, with overlap 0.

    Args:
      largest: λ₁′, largest eigenvalue of the batch's matrix.
      noise: σ², the level of one direction; negative counts as 0.
      ratio: γ = P/𝔟 ≥ 0, as for `batch_gauss_newton_extremes`.

    Returns:
      `GaussNewtonExtremes` of the full matrix, whose bulk is at σ²; float32, in the shape to which the
      arguments broadcast. A NaN argument makes NaN what depends on it.

    Example:
      >>> full = full_gauss_newton_extremes(10.0, 1.0, 4.0)
      >>> float(full.largest), float(full.smallest), float(full.overlap)
      (5.0, 1.0, 0.375)

    Source: inverse of `batch_gauss_newton_extremes`; the bound below the edge is ours.
    """
    value, level, gamma = float32_arrays(largest, noise, ratio)
    level, gamma = jnp.maximum(level, 0.0), jnp.maximum(gamma, 0.0)
    spread = root(gamma)
    # λ₁ by how far λ₁′ is above the edge: c² − 4λ₁′σ² is the product of the distances to both edges.
    excess = jnp.maximum(value - level * jnp.square(1.0 + spread), 0.0)
    distance = root(excess * (excess + 4.0 * level * spread))
    top = level * (1.0 + spread) + (excess + distance) / 2.0
    return GaussNewtonExtremes(top, level, _overlap(top, level, gamma))


def gauss_newton_noise(
    batch_sizes: Any, extremes: Any, largest: Any, *, num_parameters: Any = 1
) -> jax.Array:
    """σ² of `batch_gauss_newton_extremes`, fitted to the λ₁′ of batches of two to four sizes.

    Each size gives a σ² of its own: λ₁ r/(γ + r) with r = λ₁′/λ₁ − 1 while r < √γ, where λ₁ stands out of
    the noise, else λ₁′/(1 + √γ)². The result is their mean weighted with (γ/λ₁′)²: for σ² ≪ λ₁ that is
    least squares of the relative error of λ₁′. The fit is exact for extremes that follow the formula.

    Where λ₁ stands out, extremes show no more than P σ²/(λ₁ − σ²): σ² has a meaning only together with
    P. Pass it as `num_parameters`, or pass 𝔟/P as `batch_sizes`. With neither, σ² is that of the model
    with γ = 1/𝔟, to be used with `ratio` = 1/𝔟 and no other.

    Args:
      batch_sizes: 𝔟 > 0, `[..., k]`; for a data set of N use `effective_batch_size(b, N)`.
      extremes: λ₁′ at each of them, `[..., k]`; over several batches of a size, their mean.
      largest: λ₁ of the full matrix, `[...]`.
      num_parameters: P > 0, the directions that the noise fills, at most the number of parameters.

    Returns:
      σ² ≥ 0, float32 `[...]`: 0 where the batches are no sharper than the full matrix. NaN where an
      argument is.

    Raises:
      ValueError: `num_parameters` is a number that is not positive; `batch_sizes` and `extremes` differ
        in shape, or have no axis.

    Example:
      >>> sizes = jnp.array([64.0, 256.0, 1024.0])
      >>> extremes = batch_gauss_newton_extremes(5.0, 0.5, 1000 / sizes).largest
      >>> round(float(gauss_newton_noise(sizes, extremes, 5.0, num_parameters=1000)), 4)
      0.5
      >>> round(float(gauss_newton_noise(sizes / 1000, extremes, 5.0)), 4)
      0.5

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092, fit σ²; this way of fitting is ours.
    """
    _validate.positive("gauss_newton_noise", num_parameters=num_parameters)
    sizes, tops = (jnp.asarray(x, jnp.float32) for x in (batch_sizes, extremes))
    if sizes.shape != tops.shape or not tops.shape:
        raise ValueError(
            "gauss_newton_noise: batch_sizes and extremes must have the same shape [..., k], got "
            f"{sizes.shape} and {tops.shape}"
        )
    value = jnp.asarray(largest, jnp.float32)[..., None]
    sizes, tops, value, count = float32_arrays(sizes, tops, value, num_parameters)
    gamma = count / sizes
    spread = root(gamma)
    seen = ~(tops >= value * (1.0 + spread))
    safe = jnp.where(seen & ~(value <= 0), value, 1.0)
    rise = (tops - safe) / safe
    # Odd in the rise: measurements below λ₁ by chance average out instead of adding a bias.
    total = gamma + jnp.abs(rise)
    above = safe * rise / jnp.where(total == 0, 1.0, total)
    estimates = jnp.where(seen, above, tops / jnp.square(1.0 + spread))
    pull = gamma / jnp.where(tops == 0, 1.0, jnp.abs(tops))
    strongest = jnp.max(pull, axis=-1, keepdims=True)  # divided by, so that no square overflows
    weights = jnp.square(pull / jnp.where(strongest == 0, 1.0, strongest))
    weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1.0)
    return jnp.maximum(jnp.sum(weights * estimates, axis=-1), 0.0)


def _gap(value: jax.Array, level: jax.Array, spread: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether λ₁ stands out of the noise, and λ₁ − σ² there (1 elsewhere, safe to divide by)."""
    seen = ~(value <= level * (1.0 + spread))  # a NaN stays one
    return seen, jnp.where(seen, value - level, 1.0)


def _overlap(value: jax.Array, level: jax.Array, gamma: jax.Array) -> jax.Array:
    seen, gap = _gap(value, level, root(gamma))
    share = level / gap
    overlap = (1.0 - gamma * jnp.square(share)) / (1.0 + gamma * share)
    return jnp.where(seen, jnp.maximum(overlap, 0.0), 0.0)
