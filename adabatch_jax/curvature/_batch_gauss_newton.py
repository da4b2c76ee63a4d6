"""Extremal eigenvalues of the Gauss-Newton matrix of one batch, and back to those of all data.

The Gauss-Newton matrix of a batch is the second moment of 𝔟 vectors in P dimensions. The model is a
few outliers on σ² · I, so the bulk of a batch is Marchenko and Pastur's: from σ²(1 − √γ)² to
σ²(1 + √γ)² with γ = P/𝔟. Where the batch is drawn without replacement from a data set of N that is not
much larger than P, it is Jacobi's. With g = P/N all formulas are the same ones with σ²(1 − g) for σ² and
γ/(1 − g) for γ, but for one thing: a batch of more than N − P examples holds directions of which nothing
is left outside, N/b times as strong as in the full matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._types import ArrayLike
from adabatch_jax.curvature._effective_batch_size import float32_arrays, root


class GaussNewtonExtremes(NamedTuple):
    """Outermost eigenvalues of a Gauss-Newton matrix, and how far a batch shows the top direction.

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092; see `batch_gauss_newton_extremes`.
    """

    largest: jax.Array  # float32: λ₁, of the batch or of all data
    smallest: jax.Array  # float32: the lower edge of the bulk
    overlap: jax.Array  # float32 in [0, 1]: ⟨batch's, full⟩² of the unit eigenvectors of λ₁


def batch_gauss_newton_extremes(
    largest: ArrayLike, noise: ArrayLike, ratio: ArrayLike, *, dataset_ratio: ArrayLike = 0.0
) -> GaussNewtonExtremes:
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
      dataset_ratio: g = P/N in [0, 1), directions per example of the data set. 0: N ≫ P. At g = ¼ and half
        of the data 0 gives a bulk from 0.25 σ² to 2.25 σ², and it reaches from 0.13 σ² to 1.87 σ².

    Returns:
      `GaussNewtonExtremes` of the batch, float32, in the shape to which the arguments broadcast. A NaN
      argument makes NaN what depends on it.

    Raises:
      ValueError: a `dataset_ratio` outside [0, 1), given as a number.

    Example:
      >>> batch = batch_gauss_newton_extremes(5.0, 1.0, jnp.array([0.25, 4.0, 64.0]))
      >>> batch.largest.tolist()
      [5.3125, 10.0, 81.0]
      >>> batch.smallest.tolist()
      [0.25, 0.0, 0.0]
      >>> [round(x, 4) for x in batch.overlap.tolist()]
      [0.9265, 0.375, 0.0]

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092; the spiked covariance is standard, the
    Jacobi bulk Wachter's (1980), its outliers ours, by free multiplication.
    """
    _validate.between("batch_gauss_newton_extremes", 0.0, 1.0, dataset_ratio=dataset_ratio)
    value, level, gamma, share = float32_arrays(largest, noise, ratio, dataset_ratio)
    bulk = _Bulk.of(level, gamma, share)
    seen, gap = bulk.gap(value)
    top = jnp.where(seen, value * (1.0 + bulk.gamma * bulk.level / gap), bulk.edge)
    bottom = jnp.where(bulk.gamma > 1.0, 0.0, bulk.level * jnp.square(1.0 - root(bulk.gamma)))
    return GaussNewtonExtremes(top, bottom, bulk.overlap(value))


def full_gauss_newton_extremes(
    largest: ArrayLike, noise: ArrayLike, ratio: ArrayLike, *, dataset_ratio: ArrayLike = 0.0
) -> GaussNewtonExtremes:
    """Outermost eigenvalues of the full Gauss-Newton matrix, from the λ₁′ of one batch: the inverse map.

    λ₁ = (c + √(c² − 4λ₁′σ²)) / 2 with c = λ₁′ + σ² − γσ² if λ₁′ > σ²(1 + √γ)². Otherwise the batch shows
    only noise, and λ₁ may be anything up to σ²(1 + √γ): that bound is returned, with overlap 0.

    Args:
      largest: λ₁′, largest eigenvalue of the batch's matrix.
      noise: σ², the level of one direction; negative counts as 0.
      ratio: γ = P/𝔟 ≥ 0, as for `batch_gauss_newton_extremes`.
      dataset_ratio: g = P/N in [0, 1), likewise.

    Returns:
      `GaussNewtonExtremes` of the full matrix, whose bulk is at σ²; float32, in the shape to which the
      arguments broadcast. A NaN argument makes NaN what depends on it.

    Raises:
      ValueError: a `dataset_ratio` outside [0, 1), given as a number.

    Example:
      >>> full = full_gauss_newton_extremes(10.0, 1.0, 4.0)
      >>> float(full.largest), float(full.smallest), float(full.overlap)
      (5.0, 1.0, 0.375)

    Source: inverse of `batch_gauss_newton_extremes`; the bound below the edge is ours.
    """
    _validate.between("full_gauss_newton_extremes", 0.0, 1.0, dataset_ratio=dataset_ratio)
    value, level, gamma, share = float32_arrays(largest, noise, ratio, dataset_ratio)
    bulk = _Bulk.of(level, gamma, share)
    spread = root(bulk.gamma)
    # λ₁ by how far λ₁′ is above the edge: c² − 4λ₁′σ² is the product of the distances to both edges.
    excess = jnp.maximum(value - bulk.level * jnp.square(1.0 + spread), 0.0)
    distance = root(excess) * root(excess + 4.0 * bulk.level * spread)
    top = bulk.level * (1.0 + spread) + (excess + distance) / 2.0
    top = jnp.maximum(top, bulk.hidden)
    return GaussNewtonExtremes(top, jnp.maximum(level, 0.0), bulk.overlap(top))


def gauss_newton_noise(
    batch_sizes: Any,
    extremes: Any,
    largest: ArrayLike,
    *,
    num_parameters: ArrayLike = 1,
    dataset_ratio: ArrayLike = 0.0,
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
      dataset_ratio: g = P/N in [0, 1), as for `batch_gauss_newton_extremes`; then each size gives
        λ₁ r/(γ + (1 − g) r), or λ₁′ over the edge for σ² = 1.

    Returns:
      σ² ≥ 0, float32 `[...]`: 0 where the batches are no sharper than the full matrix. NaN where an
      argument is.

    Raises:
      ValueError: `num_parameters` or `dataset_ratio` is a number out of range; `batch_sizes` and
        `extremes` differ in shape, or have no axis.

    Example:
      >>> sizes = jnp.array([64.0, 256.0, 1024.0])
      >>> extremes = batch_gauss_newton_extremes(5.0, 0.5, 1000 / sizes).largest
      >>> round(float(gauss_newton_noise(sizes, extremes, 5.0, num_parameters=1000)), 4)
      0.5
      >>> round(float(gauss_newton_noise(sizes / 1000, extremes, 5.0)), 4)
      0.5

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092, fit σ²; this way of fitting is ours.
    """
    where = "gauss_newton_noise"
    _validate.positive(where, num_parameters=num_parameters)
    _validate.between(where, 0.0, 1.0, dataset_ratio=dataset_ratio)
    sizes, tops = (jnp.asarray(x, jnp.float32) for x in (batch_sizes, extremes))
    if sizes.shape != tops.shape or not tops.shape:
        raise ValueError(
            "gauss_newton_noise: batch_sizes and extremes must have the same shape [..., k], got "
            f"{sizes.shape} and {tops.shape}"
        )
    value = jnp.asarray(largest, jnp.float32)[..., None]
    sizes, tops, value, count, share = float32_arrays(
        sizes, tops, value, num_parameters, dataset_ratio
    )
    gamma = count / sizes
    bulk = _Bulk.of(jnp.ones_like(gamma), gamma, share)  # for σ² = 1
    seen = ~(tops >= value * (bulk.edge / bulk.hidden))
    safe = jnp.where(seen & ~(value <= 0), value, 1.0)
    rise = (tops - safe) / safe
    # Odd in the rise: measurements below λ₁ by chance average out instead of adding a bias.
    total = gamma + (1.0 - share) * jnp.abs(rise)
    above = safe * rise / jnp.where(total == 0, 1.0, total)
    estimates = jnp.where(seen, above, tops / bulk.edge)
    pull = gamma / jnp.where(tops == 0, 1.0, jnp.abs(tops))
    strongest = jnp.max(pull, axis=-1, keepdims=True)  # divided by, so that no square overflows
    weights = jnp.square(pull / jnp.where(strongest == 0, 1.0, strongest))
    weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1.0)
    return jnp.maximum(jnp.sum(weights * estimates, axis=-1), 0.0)


class _Bulk(NamedTuple):
    """What a batch's bulk has in common with Marchenko and Pastur's, and where it ends."""

    level: jax.Array  # σ²(1 − g)
    gamma: jax.Array  # γ/(1 − g)
    hidden: jax.Array  # λ₁ up to which a batch does not show it …
    edge: jax.Array  # … and the largest eigenvalue that it then has

    @classmethod
    def of(cls, level: jax.Array, gamma: jax.Array, share: jax.Array) -> _Bulk:
        level, gamma = jnp.maximum(level, 0.0), jnp.maximum(gamma, 0.0)
        share = jnp.clip(share, 0.0, 1.0 - 1e-6)
        inner, wider = level * (1.0 - share), gamma / (1.0 - share)
        hidden = inner * (1.0 + root(wider))
        whole = level > hidden  # directions that lie in the batch as a whole
        strength = 1.0 + gamma / jnp.where(whole, share, 1.0)
        edge = jnp.where(whole, level * strength, inner * jnp.square(1.0 + root(wider)))
        return cls(inner, wider, jnp.where(whole, level, hidden), edge)

    def gap(self, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whether λ₁ stands out of the noise, and λ₁ − σ²(1 − g) there (1 elsewhere, safe to divide by)."""
        seen = ~(value <= self.hidden)  # a NaN stays one
        return seen, jnp.where(seen, value - self.level, 1.0)

    def overlap(self, value: jax.Array) -> jax.Array:
        """∂ log λ₁′ / ∂ log λ₁, which is the squared overlap."""
        seen, gap = self.gap(value)
        share = self.level / gap
        overlap = (1.0 - self.gamma * jnp.square(share)) / (1.0 + self.gamma * share)
        return jnp.where(seen, jnp.maximum(overlap, 0.0), 0.0)
