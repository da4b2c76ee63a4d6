"""Criteria: how large the next batch should be, from the noise of the present gradient.

Every criterion is a ratio `numerator / (scale · denominator)`: a variance of one example's gradient
over a squared length of the mean gradient.
"""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._axes import to_varying, varying_axes
from adabatch_jax._tree import abs_squared, widen
from adabatch_jax._types import PyTree
from adabatch_jax.batch_size._criterion import Criterion, Evidence
from adabatch_jax.batch_size._order_statistic import order_statistic
from adabatch_jax.noise import GradientNoise


def norm_test(eta: Any) -> Criterion:
    """Norm test: the standard error of the gradient must not exceed η times its length.

    tr Σ / b ≤ η² ‖ḡ‖², so the required batch size is T = tr Σ / (η² ‖ḡ‖²).

    Args:
      eta: η > 0. Smaller asks for larger batches. The authors use 0.1 to 0.5 on images.

    Returns:
      A criterion: `GradientNoise` → required batch size in examples, float32 scalar.

    Raises:
      ValueError: `eta` is not a positive number.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import GradientNoise
      >>> noise = GradientNoise(jnp.array([3.0, 4.0]), scatter=jnp.array(70.0),
      ...                       num_examples=jnp.array(16), num_groups=jnp.array(8))
      >>> round(float(norm_test(0.5)(noise)), 4)  # 10 / (0.25 · 25)
      1.6

    Source: Byrd, Chin, Nocedal, Wu (2012); Lau, Liu, Kolar (2024), arXiv 2402.11215 (norm test).
    """
    where = "norm_test"
    _validate.positive(where, eta=eta)

    def evidence(noise: GradientNoise) -> Evidence:
        trace = noise.trace
        return Evidence(trace, noise.squared_norm, trace)

    return Criterion(where, evidence, _squared(eta), needs_debias=_at_least_one(eta))


def coordinate_norm_test(eta: Any, *, quantile: float = 0.9, floor: float = 0.1) -> Criterion:
    """Coordinate-wise norm test: Var_j / b ≤ η² ḡ_j² for (most) coordinates j.

    T = Q_j[ Var_j / (η² max(ḡ_j², floor² · mean_k ḡ_k²)) ], where Q is an order statistic over all
    coordinates and 0/0 counts as passed. The test of the paper is `quantile=1.0, floor=0.0`: the
    maximum over all coordinates. One coordinate whose gradient happens to be near zero then asks for
    an unbounded batch, so with more than a few hundred parameters the raw form goes to the largest
    batch at once. The defaults ask that 90 % of the coordinates pass, and compare a coordinate's
    noise with at least a tenth of the root mean square of the gradient; with ten coordinates or fewer
    the order statistic is still the maximum. At the same η this asks for larger batches than
    `norm_test`: start at η = 2 or 3.

    Needs `coordinate_scatter`: use `value_and_grad_noise(..., coordinate_wise=True)`.

    Args:
      eta: η > 0.
      quantile: share of the coordinates that must pass, in (0, 1].
      floor: smallest |ḡ_j| used, as a multiple of the root mean square over all coordinates, ≥ 0.

    Returns:
      A criterion: `GradientNoise` → required batch size in examples, float32 scalar.

    Raises:
      ValueError: an argument out of range; at trace time, a noise without `coordinate_scatter`.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import GradientNoise
      >>> noise = GradientNoise(jnp.array([1.0, 2.0, 0.0]), scatter=jnp.array(21.0),
      ...                       num_examples=jnp.array(16), num_groups=jnp.array(8),
      ...                       coordinate_scatter=jnp.array([14.0, 7.0, 0.0]))
      >>> float(coordinate_norm_test(1.0)(noise))  # the largest of 2/1, 1/4 and 0/0
      2.0

    Source: Lau, Liu, Kolar (2024), arXiv 2402.11215 (coordinate-wise test); quantile and floor are ours.
    """
    where = "coordinate_norm_test"
    _validate.positive(where, eta=eta, quantile=quantile)
    _validate.between(where, 0.0, 1.0, closed=True, quantile=quantile)
    _validate.between(where, 0.0, float("inf"), floor=floor)

    def evidence(noise: GradientNoise) -> Evidence:
        scatter = _needed(
            noise.coordinate_scatter,
            "coordinate_norm_test",
            "coordinate_scatter",
            "coordinate_wise",
        )
        variance = jax.tree.map(noise.variance, scatter)
        return Evidence(variance, _squares(noise.mean), variance)

    def summarize(variance: PyTree, square: PyTree) -> tuple[jax.Array, jax.Array]:
        leaves = jax.tree.leaves(square)
        size = max(sum(x.size for x in leaves), 1)
        lowest = floor**2 * sum((jnp.sum(x) for x in leaves), start=jnp.float32(0)) / size

        def decisive(variance: PyTree, square: PyTree, lowest: jax.Array) -> jax.Array:
            def ratio(v: jax.Array, s: jax.Array) -> jax.Array:
                s = jnp.maximum(s, lowest)
                bounded = jnp.where(s > 0, v / jnp.where(s > 0, s, 1.0), jnp.inf)
                return jnp.where(v <= 0, 0.0, bounded)

            return order_statistic(jax.tree.map(ratio, variance, square), quantile)

        def unknown(variance: PyTree, square: PyTree, lowest: jax.Array) -> jax.Array:
            return to_varying(lowest - lowest, varying_axes((variance, square)))  # NaN

        # Behind a condition, or XLA's CPU compiler writes the sum over all leaves into every leaf's ratio.
        found = jax.lax.cond(lowest < jnp.inf, decisive, unknown, variance, square, lowest)
        return found, jnp.ones((), jnp.float32)

    return Criterion(
        where,
        evidence,
        _squared(eta),
        summarize,
        coordinate_wise=True,
        needs_debias=_at_least_one(eta),
    )


def inner_product_test(theta: Any) -> Criterion:
    """Inner-product test: the gradients of examples must point along the mean gradient, on average.

    Var⟨g_i, ḡ⟩ / b ≤ ϑ² ‖ḡ‖⁴, so T = Var⟨g_i, ḡ⟩ / (ϑ² ‖ḡ‖⁴), with the inner product over the
    **whole** gradient vector. Kept as the variance along the direction of ḡ, Var⟨g_i, ḡ⟩/‖ḡ‖²,
    over ‖ḡ‖².

    Needs `inner_product_scatter`: use `value_and_grad_noise(..., inner_products=True)`.

    Args:
      theta: ϑ > 0. Bollapragada et al. use 0.9.

    Returns:
      A criterion: `GradientNoise` → required batch size in examples, float32 scalar.

    Raises:
      ValueError: `theta` is not positive; at trace time, a noise without `inner_product_scatter`.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import GradientNoise
      >>> noise = GradientNoise(jnp.array([1.0, 1.0]), scatter=jnp.array(70.0), num_examples=jnp.array(16),
      ...                       num_groups=jnp.array(8), inner_product_scatter=jnp.array(28.0))
      >>> float(inner_product_test(0.5)(noise))  # 4 / (0.25 · 2²)
      4.0

    Source: Bollapragada, Byrd, Nocedal (2018), arXiv 1710.11258 (inner product test).
    """
    where = "inner_product_test"
    _validate.positive(where, theta=theta)

    def evidence(noise: GradientNoise) -> Evidence:
        square = noise.squared_norm
        along = _variance_along(noise, square, "inner_product_test")
        return Evidence(along, square, noise.trace)

    return Criterion(where, evidence, _squared(theta), needs_debias=_at_least_one(theta))


def augmented_inner_product_test(theta: Any, nu: Any) -> Criterion:
    """Inner-product test together with the orthogonality test.

    T = max( Var⟨g_i, ḡ⟩ / (ϑ² ‖ḡ‖⁴), tr Σ_⊥ / (ν² ‖ḡ‖²) ), where tr Σ_⊥ = tr Σ − Var⟨g_i, ḡ⟩/‖ḡ‖² is the
    variance orthogonal to the mean gradient.

    Needs `inner_product_scatter`: use `value_and_grad_noise(..., inner_products=True)`.

    Args:
      theta: ϑ > 0, the bound along the gradient (0.9 in the source).
      nu: ν > 0, the bound across it (5.84 ≈ tan 80° in the source).

    Returns:
      A criterion: `GradientNoise` → required batch size in examples, float32 scalar.

    Raises:
      ValueError: an argument is not positive; at trace time, a noise without `inner_product_scatter`.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import GradientNoise
      >>> noise = GradientNoise(jnp.array([1.0, 1.0]), scatter=jnp.array(70.0), num_examples=jnp.array(16),
      ...                       num_groups=jnp.array(8), inner_product_scatter=jnp.array(28.0))
      >>> float(augmented_inner_product_test(0.5, 0.5)(noise))  # max(4 / 1, (10 − 2) / 0.5)
      16.0

    Source: Bollapragada, Byrd, Nocedal (2018), arXiv 1710.11258 (orthogonality test).
    """
    where = "augmented_inner_product_test"
    _validate.positive(where, theta=theta, nu=nu)

    def evidence(noise: GradientNoise) -> Evidence:
        square, trace = noise.squared_norm, noise.trace
        along = _variance_along(noise, square, "augmented_inner_product_test")
        return Evidence((along, jnp.maximum(trace - along, 0.0)), square, trace)

    def summarize(parts: PyTree, square: PyTree) -> tuple[jax.Array, jax.Array]:
        along, across = parts
        exchange = _squared(theta) / _squared(nu)  # puts the second test on the scale of the first
        return jnp.maximum(along, across * exchange), square

    return Criterion(
        where,
        evidence,
        _squared(theta),
        summarize,
        needs_debias=_at_least_one(theta, nu),
    )


def gradient_noise_scale(multiple: Any = 1.0) -> Criterion:
    """The simple gradient noise scale as batch size: B = tr Σ / ‖∇F‖².

    ‖∇F‖² is estimated without bias by ‖ḡ‖² − tr Σ / b, which can be negative by chance: average over
    steps (`adapt_batch_size(..., ema_decay=0.9)`). Below B a larger batch saves steps almost for
    free; above it, it mostly costs examples.

    Args:
      multiple: batch size as a multiple of B, > 0.

    Returns:
      A criterion: `GradientNoise` → required batch size in examples, float32 scalar; +inf where the
      estimate of ‖∇F‖² is not positive.

    Raises:
      ValueError: `multiple` is not a positive number.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import GradientNoise
      >>> noise = GradientNoise(jnp.array([2.0, 1.0]), scatter=jnp.array(112.0),
      ...                       num_examples=jnp.array(16), num_groups=jnp.array(8))
      >>> float(gradient_noise_scale()(noise))  # 16 / (5 − 16/16)
      4.0

    Source: McCandlish, Kaplan, Amodei (2018), arXiv 1812.06162, equation 2.9 and appendix A.1.
    """
    where = "gradient_noise_scale"
    _validate.positive(where, multiple=multiple)

    def evidence(noise: GradientNoise) -> Evidence:
        trace = noise.trace
        return Evidence(trace, noise.squared_norm, trace)

    return Criterion(where, evidence, 1.0 / multiple, debias=True)


def _squared(x: Any) -> Any:
    return x * x


def _at_least_one(*thresholds: Any) -> bool:
    """Whether all are known to be: no test then asks for more than the present batch, on average."""
    return all(isinstance(x, numbers.Real) and float(x) >= 1 for x in thresholds)


def _squares(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda g: abs_squared(g).astype(jnp.float32), widen(tree))


def _needed(field: Any, criterion: str, name: str, option: str) -> Any:
    if field is None:
        raise ValueError(
            f"{criterion} needs noise.{name}, which is None: measure the noise with "
            f"value_and_grad_noise(..., {option}=True)"
        )
    return field


def _variance_along(noise: GradientNoise, square: jax.Array, criterion: str) -> jax.Array:
    """Var⟨g_i, ḡ⟩ / ‖ḡ‖²: the variance of one example's gradient along the mean gradient."""
    scatter = _needed(
        noise.inner_product_scatter, criterion, "inner_product_scatter", "inner_products"
    )
    return noise.variance(scatter) / jnp.where(square > 0, square, 1.0)
