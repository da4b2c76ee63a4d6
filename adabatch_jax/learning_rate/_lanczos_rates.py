"""From Ritz values to a learning rate and a momentum: the state of `scale_by_lanczos` and its formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._tree import widen
from adabatch_jax._types import AxisName, PyTree
from adabatch_jax.curvature import (
    Spectrum,
    full_hessian_extremes,
    hessian_vector_product,
    lanczos,
    max_stable_learning_rate,
    random_unit,
)

VARIANTS = ("gradient_descent", "heavy_ball", "nesterov", "nesterov_authors")
_ROUNDING = 1e-3  # of L: a negative Ritz value beyond it is negative curvature
_SMALL = 0.1  # of L: below, a Ritz value with most of the weight stands for the mass at zero
_KNOWN = 0.25  # of μ: with a larger residual, it is only what so few steps see of smaller ones


@dataclass(frozen=True)
class LanczosRules:
    """Arguments of `scale_by_lanczos`."""

    variant: str
    num_steps: int
    max_momentum: Any
    safety: Any
    ema_decay: Any
    nu_squared: Any
    curvature_batch_size: Any
    axis_name: AxisName

    @property
    def nesterov(self) -> bool:
        """Whether the momentum looks ahead."""
        return self.variant.startswith("nesterov")

    def check(self, where: str) -> None:
        """Every argument by itself.

        Raises:
          ValueError: naming argument and value.
        """
        _validate.one_of(where, VARIANTS, variant=self.variant)
        _validate.positive_int(where, num_steps=self.num_steps)
        _validate.between(where, 0.0, 1.0, max_momentum=self.max_momentum, ema_decay=self.ema_decay)
        _validate.positive(where, safety=self.safety)
        _validate.between(where, 0.0, 1.0, closed=True, safety=self.safety)
        if (self.nu_squared is None) != (self.curvature_batch_size is None):
            raise ValueError(f"{where}: nu_squared and curvature_batch_size belong together")
        if self.nu_squared is not None:
            _validate.between(where, 0.0, float("inf"), nu_squared=self.nu_squared)
            _validate.positive(where, curvature_batch_size=self.curvature_batch_size)


class ScaleByLanczosState(NamedTuple):
    """State of `scale_by_lanczos`; statistics and trace are at least float32."""

    lanczos_learning_rate: jax.Array  # of the last step; 0 before the curvature is known
    lanczos_momentum: jax.Array
    curvature_largest: jax.Array  # λ₁ and λ_P as last measured
    curvature_smallest: jax.Array
    curvature_residual: jax.Array  # of λ₁: bounds its error
    curvature_scale: jax.Array  # L, μ and the median of |θ|, smoothed over refreshes
    curvature_floor: jax.Array
    curvature_median: jax.Array
    refreshes: jax.Array  # int32: that gave a usable curvature
    failed_refreshes: jax.Array  # int32: whose curvature was not finite or not positive
    since_refresh: jax.Array  # uint32, in steps or examples; the first step is due
    lanczos_key: jax.Array
    lanczos_trace: PyTree

    def report_metrics(self) -> dict[str, Any]:
        """The numbers that `adabatch.metrics` shows."""
        return {
            "learning_rate": self.lanczos_learning_rate,
            "momentum": self.lanczos_momentum,
            "curvature_largest": self.curvature_largest,
            "curvature_smallest": self.curvature_smallest,
            "curvature_residual": self.curvature_residual,
            "refreshes": self.refreshes,
            "failed_refreshes": self.failed_refreshes,
        }


def first_state(params: PyTree, since_refresh: jax.Array, seed: int) -> ScaleByLanczosState:
    """Before the first step."""

    def zero() -> jax.Array:  # a buffer of its own: a state with shared ones cannot be donated
        return jnp.zeros((), jnp.float32)

    return ScaleByLanczosState(
        lanczos_learning_rate=zero(),
        lanczos_momentum=zero(),
        curvature_largest=zero(),
        curvature_smallest=zero(),
        curvature_residual=zero(),
        curvature_scale=zero(),
        curvature_floor=zero(),
        curvature_median=zero(),
        refreshes=jnp.zeros((), jnp.int32),
        failed_refreshes=jnp.zeros((), jnp.int32),
        since_refresh=since_refresh,
        lanczos_key=jax.random.key_data(jax.random.key(seed)),
        lanczos_trace=optax.tree.zeros_like(widen(params)),
    )


def refreshed(
    rules: LanczosRules,
    state: ScaleByLanczosState,
    params: PyTree,
    value_fn: Callable[[PyTree], jax.Array],
) -> ScaleByLanczosState:
    """The state after a refresh: curvature measured anew, and averaged with what was measured before.

    One whose curvature is not finite or not positive is counted as failed, and changes nothing else.
    """
    key, draw = jax.random.split(jax.random.wrap_key_data(state.lanczos_key))
    product = hessian_vector_product(value_fn, params, axis_name=rules.axis_name)
    found, _ = lanczos(product.linear(), random_unit(draw, params), rules.num_steps)
    largest, smallest = found.largest, found.smallest
    scale, floor, residual, median = _landmarks(found)
    if rules.variant != "nesterov_authors":
        floor = jnp.where(residual <= _KNOWN * floor, floor, 0.0)
    if rules.nu_squared is not None:
        full = full_hessian_extremes(scale, -scale, rules.nu_squared, rules.curvature_batch_size)
        floor, median = jnp.minimum(floor, full.largest), jnp.minimum(median, full.largest)
        scale = full.largest
    usable = jnp.isfinite(scale + floor + median) & (largest > 0) & (scale > 0)
    convex = smallest >= -_ROUNDING * scale
    old = jnp.where(state.refreshes == 0, 0.0, jnp.asarray(rules.ema_decay, jnp.float32))

    def mean(before: jax.Array, now: jax.Array) -> jax.Array:
        safe = jnp.where(before > 0, before, now)
        return jnp.power(safe, old) * jnp.power(now, 1.0 - old)

    new = state._replace(
        curvature_largest=largest,
        curvature_smallest=smallest,
        curvature_residual=found.residuals[jnp.argmax(found.eigenvalues)],
        curvature_scale=scale,
        curvature_floor=jnp.where(convex, mean(state.curvature_floor, floor), 0.0),
        curvature_median=mean(state.curvature_median, median),
        refreshes=state.refreshes + 1,
    )
    alpha, beta = rates(rules, new, {})
    echo = scale * jnp.maximum(alpha * scale / (2.0 * (1.0 - beta)), 1.0)
    held = jnp.maximum(jnp.minimum(state.curvature_scale, echo), scale)
    new = new._replace(curvature_scale=jnp.maximum(mean(state.curvature_scale, scale), held))
    failed = state._replace(failed_refreshes=state.failed_refreshes + 1)
    kept = optax.tree.where(usable, new, failed)
    return kept._replace(lanczos_key=jax.random.key_data(key))


def rates(
    rules: LanczosRules, state: ScaleByLanczosState, sharpness: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """Learning rate α and momentum β for the curvature in the state; α = 0 before it is known.

    Args:
      rules: what does not change.
      state: with L, μ and the median of |θ|.
      sharpness: `noise=` and `batch_size=` of `max_stable_learning_rate`, or nothing.
    """
    known = state.refreshes > 0
    full = top = jnp.where(known, state.curvature_scale, 1.0)
    if sharpness:  # 2 / bound is the L of a batch of that size
        top = 2.0 / max_stable_learning_rate(full, **sharpness)
    low = jnp.minimum(state.curvature_floor, top)
    root, small = jnp.sqrt(top), jnp.sqrt(low)
    ratio = (root - small) / (root + small)
    # The formulas of all variants side by side, as in a table. `rules.variant` is static, and the compiler
    # drops the few scalars that are not looked up.
    beta = {
        "gradient_descent": 0.0 * ratio,
        "heavy_ball": jnp.square(ratio),
        "nesterov": ratio,
        "nesterov_authors": ratio,
    }[rules.variant]
    beta = jnp.minimum(beta, jnp.asarray(rules.max_momentum, jnp.float32))
    alpha = {
        "gradient_descent": 2.0 / (top + jnp.minimum(state.curvature_median, top)),
        "heavy_ball": jnp.square(2.0 / (root + small)),
        "nesterov": 1.0 / top,
        "nesterov_authors": small / root,
    }[rules.variant]
    bound = max_stable_learning_rate(full, momentum=beta, nesterov=rules.nesterov, **sharpness)
    alpha = jnp.minimum(alpha, jnp.asarray(rules.safety, jnp.float32) * bound)
    return jnp.where(known, alpha, 0.0), beta


def moved(
    rules: LanczosRules, updates: PyTree, trace: PyTree, rate: jax.Array, beta: jax.Array
) -> tuple[PyTree, PyTree]:
    """The updates along the trace, t ← β t + g, times the rate, which has the sign; and the trace."""

    def followed(t: jax.Array, u: jax.Array) -> jax.Array:
        return beta.astype(t.dtype) * t + u.astype(t.dtype)

    def step(u: jax.Array, t: jax.Array) -> jax.Array:
        ahead = followed(t, u) if rules.nesterov else t
        return (rate.astype(t.dtype) * ahead).astype(u.dtype)

    trace = jax.tree.map(followed, trace, updates)
    return jax.tree.map(step, updates, trace), trace


def _landmarks(found: Spectrum) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """L = max |θ|, min |θ| and its residual, the median of |θ|; without the mass at zero."""
    sizes, weights = jnp.abs(found.eigenvalues), found.weights
    largest = jnp.max(sizes)
    kept = (weights > 0) & ((weights <= 0.5) | (sizes >= _SMALL * largest))
    ordered, last = jnp.sort(jnp.where(kept, sizes, jnp.inf)), jnp.sum(kept) - 1
    residual = found.residuals[jnp.argmin(jnp.where(kept, sizes, jnp.inf))]
    median = 0.5 * (ordered[last // 2] + ordered[(last + 1) // 2])
    return largest, ordered[0], residual, median
