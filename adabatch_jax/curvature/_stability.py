"""How far a step may go before the sharpest direction diverges."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._types import ArrayLike
from adabatch_jax.curvature._batch_hessian import noise_with_momentum, noisy_outlier
from adabatch_jax.curvature._effective_batch_size import (
    float32_arrays,
    inverse_effective_batch_size,
    root,
)


def max_stable_learning_rate(
    largest: ArrayLike,
    *,
    momentum: ArrayLike = 0.0,
    nesterov: bool = False,
    adaptive: bool = False,
    noise: ArrayLike | None = None,
    batch_size: ArrayLike | None = None,
    dataset_size: ArrayLike | None = None,
    piecewise: bool = False,
) -> jax.Array:
    """The learning rate above which an optimizer diverges along the sharpest direction.

    With λ the curvature there and β the momentum:

    * 2/λ for gradient descent (`optax.sgd(lr)`);
    * 2(1 + β)/λ for heavy ball (`optax.sgd(lr, momentum=β)`, `optax.trace(β)`);
    * 2(1 + β)/((1 + 2β) λ) with `nesterov` (`optax.trace(β, nesterov=True)`);
    * with `adaptive` these, divided by 1 − β: Adam keeps an average (1 − β) Σ βᵏ g of the gradients g, not
      their sum. β is its b1, and λ the largest eigenvalue of D⁻¹H, where Adam divides by D = √v̂ + ε.

    That is without noise, λ = λ₁. Given `noise` and `batch_size`, λ becomes λ + m ν²/(𝔟 λ) in the first
    two, with m = (1 + β)/(1 − β), and in the third the bound is 2C/((B + √(B² + 4AC)) λ), where

        A = β (1 + 2β)(1 + q),  B = 1 − β − 4β² + (1 + β) q,  C = 2(1 − β²),  q = ν²/(𝔟 λ²).

    The bound grows in proportion to 𝔟 ≪ m b*, where b* = ν²/λ₁², and saturates at that of λ₁. There the
    mean square of the parameter along the top eigenvector stops shrinking, if every batch's curvature is
    drawn anew; for gradient descent it is E‖(I − αH_b) z‖² = 1. Momentum thus allows larger rates in large
    batches only: 𝔟 ≪ b* leaves 2 (1 − β) 𝔟 λ/ν². It says nothing of noise scattered into flat directions.
    `piecewise` takes instead the largest eigenvalue of a batch's Hessian, `batch_hessian_extremes`, as if
    every batch were the same one: larger rates in small batches, and no m.

    Real losses are not quadratic and λ₁ is measured: stay below by a factor. In its first 1/(1 − β) steps
    Adam's bias correction makes the steps larger, up to those without momentum. Under an adaptive method D
    grows with the noise of the gradient, as 1/√b in small batches: measured at each batch size, λ of
    D⁻¹H shrinks with it. This is how the linear growth becomes that of √b.

    Args:
      largest: λ₁ of the full Hessian, or of D⁻¹H. Any shape.
      momentum: β in [0, 1).
      nesterov: Nesterov's momentum instead of heavy ball; static.
      adaptive: the momentum is an average, as Adam's; static.
      noise: ν² of one example, of the same matrix as λ₁; negative counts as 0. None: no noise.
      batch_size: b, examples, with `noise`.
      dataset_size: N, examples > 0; None: so large that batches do not exhaust it.
      piecewise: the bound of a batch's eigenvalue instead of the mean square; static.

    Returns:
      The learning rate, float32, in the shape to which the arguments broadcast. A λ₁ ≤ 0 bounds
      nothing: then only the noise does, as at the λ > 0 that it bounds least (piecewise: at λ = 2ν/√𝔟),
      and without noise the rate is inf. NaN where an argument is.

    Raises:
      ValueError: a `momentum` outside [0, 1) or a `dataset_size` that is not positive, given as a
        number; only one of `noise` and `batch_size`.

    Example:
      >>> [round(float(max_stable_learning_rate(10.0, momentum=beta)), 4) for beta in (0.0, 0.5)]
      [0.2, 0.3]
      >>> rates = max_stable_learning_rate(10.0, noise=6400.0, batch_size=jnp.array([1, 64, 6400]))
      >>> [round(rate, 4) for rate in rates.tolist()]  # b* = 64
      [0.0031, 0.1, 0.198]

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092, abstract; the bounds with momentum are the
    stability of a linear recursion, the mean-square form, with m, is ours.
    """
    _validate.between("max_stable_learning_rate", 0.0, 1.0, momentum=momentum)
    if (noise is None) != (batch_size is None):
        raise ValueError("max_stable_learning_rate: noise and batch_size belong together")
    if noise is None or batch_size is None:
        value, beta = float32_arrays(largest, momentum)
        level = jnp.zeros_like(value)
    else:
        inverse = inverse_effective_batch_size(batch_size, dataset_size)
        value, beta, level, inverse = float32_arrays(largest, momentum, noise, inverse)
        level = jnp.maximum(level, 0.0) * inverse
    room, shorter = 2.0 * (1.0 + beta), 1.0 + 2.0 * beta if nesterov else jnp.ones_like(beta)
    if adaptive:
        room = room / (1.0 - beta)
    if piecewise:
        sharpness = shorter * noisy_outlier(value, level)
    elif nesterov:
        sharpness = _mean_square_of_nesterov(value, level, beta)
    else:
        sharpness = _mean_square(value, level * noise_with_momentum(beta))
    flat = sharpness == 0
    return jnp.where(flat, jnp.inf, room / jnp.where(flat, 1.0, sharpness))


def _mean_square(value: jax.Array, level: jax.Array) -> jax.Array:
    curved = ~(value <= 0)  # a NaN stays one
    safe = jnp.where(curved, value, 1.0)
    return jnp.where(curved, value + level / safe, 2.0 * root(level))


def _mean_square_of_nesterov(value: jax.Array, level: jax.Array, beta: jax.Array) -> jax.Array:
    """2(1 + β) / α at the α where the second moments of parameter and trace stop shrinking.

    With one more noisy step (w², w t, t²) is multiplied by a 3 × 3 matrix M, whose largest eigenvalue is
    real. It passes 1 where det(I − M) = αλ (A (αλ)² + B αλ − C) = 0.
    """
    curved = ~(value <= 0)
    low = jnp.where(curved, value, root(level) * _least_bounded(beta))
    safe = jnp.where(low == 0, 1.0, low)
    linear = (1.0 - beta - 4.0 * beta**2) * low + (1.0 + beta) * level / safe  # B λ
    quadratic = beta * (1.0 + 2.0 * beta) * (low + level / safe)  # A λ
    square = 8.0 * (1.0 - beta**2) * quadratic * low
    longest = jnp.maximum(jnp.abs(linear), root(square))  # divided by, so that no square overflows
    unit = jnp.where(longest == 0, 1.0, longest)
    distance = longest * root(jnp.square(linear / unit) + square / unit / unit)
    # Two forms of one number: neither is a difference where it is taken.
    above = (linear + distance) / (2.0 * (1.0 - beta))
    gap = jnp.where(linear < 0, distance - linear, 1.0)
    below = 4.0 * (1.0 + beta) * quadratic / gap * low
    return jnp.where(linear < 0, below, above)


def _least_bounded(beta: jax.Array) -> jax.Array:
    """λ √𝔟/ν at which noise bounds Nesterov's rate least: the root of a cubic in its square.

    The cubic has one positive root, and is convex from there on: Newton's steps fall to it.
    """
    p, k = 1.0 - beta - 4.0 * beta**2, 1.0 + beta
    third = 8.0 * (1.0 - beta**2) * beta * (1.0 + 2.0 * beta) + p**2
    second, first, last = p * (2.0 * k - p), -k * (3.0 * k - 2.0 * p), -(k**2)
    u = 1.0 + jnp.maximum(jnp.maximum(jnp.abs(second), jnp.abs(first)), jnp.abs(last)) / third
    for _ in range(10):
        slope = (3.0 * third * u + 2.0 * second) * u + first
        u = u - (((third * u + second) * u + first) * u + last) / slope
    return jnp.sqrt(u)
