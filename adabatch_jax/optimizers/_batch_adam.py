"""Adam whose averages and ε follow the batch size."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._types import ArrayLike, PyTree, ScalingRule
from adabatch_jax.learning_rate import (
    batch_sizes,
    scaled_beta,
    scaled_eps,
    share_of_new,
)
from adabatch_jax.noise import GradientNoise


class ScaleByBatchAdamState(NamedTuple):
    """State of `scale_by_batch_adam`; everything in it is float32."""

    batch_adam_beta1: jax.Array  # the β₁, β₂ and ε of the last step; before it, those of the base
    batch_adam_beta2: jax.Array
    batch_adam_eps: jax.Array
    batch_adam_weight1: jax.Array  # 1 − ∏ β₁ over all steps
    batch_adam_weight2: jax.Array
    batch_adam_mu: PyTree  # m̂ and v̂: bias-corrected
    batch_adam_nu: PyTree

    def report_metrics(self) -> dict[str, Any]:
        """The numbers that `adabatch.metrics` shows."""
        return {
            "adam_beta1": self.batch_adam_beta1,
            "adam_beta2": self.batch_adam_beta2,
            "adam_eps": self.batch_adam_eps,
        }


def scale_by_batch_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    base_batch_size: ArrayLike,
    scale_betas: bool = True,
    scaling: ScalingRule | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The direction of Adam, with averages that remember examples instead of steps.

    u = m̂ / (√v̂ + ε_b), m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², where
    βᵢ = max(0, 1 − κ (1 − bᵢ)) and ε_b = ε r(b) / κ for a batch of b examples, κ = b / b₀; r = √κ
    unless `scaling` says else. m̂ = m / (1 − ∏ β₁) and v̂ = v / (1 − ∏ β₂), products of the βs
    used, so a constant gradient gives m̂ = g and v̂ = g² however the batch changes. At b = b₀ this is
    `optax.scale_by_adam`.

    * `scale_by_batch_size(sqrt_scaling(), ...)` behind it completes the rule of Malladi et al. Once
      κ ≥ 1 / (1 − b₁) (10 for 0.9) it can be followed no further: β₁ stays at 0.
    * `scale_betas=False` is the rule of Granziol et al.: the βs stay and damping alone follows the
      learning rate. Give their `scaling` to `scale_by_batch_size`, too.

    `update` reads the batch size as `scale_by_batch_size` does: from `noise=` or `num_examples=`,
    with `base_batch_size=` over the one given here. One that is not finite counts as the base.

    Args:
      b1: β₁ at the base batch size, in [0, 1).
      b2: β₂ at the base batch size, in [0, 1).
      eps: ε ≥ 0 at the base batch size, outside the root.
      base_batch_size: b₀, the batch size at which these were chosen, > 0.
      scale_betas: let β₁ and β₂ follow the batch, by `scaled_beta`.
      scaling: r, the rule by which the learning rate follows the batch, for `scaled_eps`. None:
        `sqrt_scaling()`.
      nesterov: m̂ looks one step ahead, as in `optax.scale_by_adam`.

    Returns:
      A `GradientTransformationExtraArgs`; m̂ and v̂ are float32 whatever the parameters are. (Of complex
      ones m̂ is complex, and v̂ the mean of |g|².)
      `adabatch.metrics` shows `adam_beta1`, `adam_beta2` and `adam_eps` of the last step. Under
      `optax.inject_hyperparams` scale_betas, scaling and nesterov belong to static_args.

    Raises:
      ValueError: an argument out of range; `scaling` is not callable; at trace time, neither
        `noise=` nor `num_examples=`.

    Example:
      >>> import jax.numpy as jnp
      >>> link = scale_by_batch_adam(base_batch_size=64)
      >>> g = jnp.array([3.0, -0.5])
      >>> u, state = link.update(g, link.init(g), num_examples=64)
      >>> u, state = link.update(g, state, num_examples=256)
      >>> [round(float(x), 4) for x in u]
      [1.0, -1.0]
      >>> [round(float(x), 4) for x in (state.batch_adam_beta1, state.batch_adam_beta2)]
      [0.6, 0.996]

    Source: Malladi et al. (2022), arXiv 2205.10287, the square-root scaling rule; Granziol, Zohren,
    Roberts (2022), arXiv 2006.09092, abstract, for the damping; Kingma, Ba (2014), arXiv 1412.6980.
    The bias correction for a β that changes is ours.
    """
    where = "scale_by_batch_adam"
    _validate.between(where, 0.0, 1.0, b1=b1, b2=b2)
    _validate.between(where, 0.0, float("inf"), eps=eps)
    _validate.positive(where, base_batch_size=base_batch_size)
    if scaling is not None:
        _validate.function(where, scaling=scaling)
    rules = (scaled_beta(b1), scaled_beta(b2), scaled_eps(eps, scaling))
    default_base = base_batch_size

    def init(params: PyTree) -> ScaleByBatchAdamState:
        def zeros(p: Any) -> jax.Array:
            return jnp.zeros(jnp.shape(p), jnp.float32)

        def zeros_of_mean(p: Any) -> jax.Array:
            return jnp.zeros(jnp.shape(p), _wide(p))

        beta_1, beta_2, epsilon = (rule(default_base, default_base) for rule in rules)
        return ScaleByBatchAdamState(
            batch_adam_beta1=beta_1,
            batch_adam_beta2=beta_2,
            batch_adam_eps=epsilon,
            batch_adam_weight1=jnp.zeros((), jnp.float32),
            batch_adam_weight2=jnp.zeros((), jnp.float32),
            batch_adam_mu=jax.tree.map(zeros_of_mean, params),
            batch_adam_nu=jax.tree.map(zeros, params),
        )

    def update(
        updates: PyTree,
        state: ScaleByBatchAdamState,
        params: PyTree | None = None,
        *,
        noise: GradientNoise | None = None,
        num_examples: ArrayLike | None = None,
        base_batch_size: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByBatchAdamState]:
        del params, extra_args
        given = default_base if base_batch_size is None else base_batch_size
        size, base = batch_sizes(where, given, noise, num_examples)
        remembered = size if scale_betas else base
        beta_1, beta_2, epsilon = (
            rule(x, base) for rule, x in zip(rules, (remembered, remembered, size), strict=True)
        )
        share_1, share_2 = (share_of_new(b, remembered, base) for b in (b1, b2))
        weight_1 = _between(state.batch_adam_weight1, jnp.ones((), jnp.float32), share_1)
        weight_2 = _between(state.batch_adam_weight2, jnp.ones((), jnp.float32), share_2)
        # Averages that are kept corrected need no division by 1 − ∏ β, and a constant gradient
        # passes through them without rounding.
        gradients = jax.tree.map(lambda g: g.astype(_wide(g)), updates)
        mu = jax.tree.map(
            lambda m, g: _between(m, g, share_1 / weight_1), state.batch_adam_mu, gradients
        )
        nu = jax.tree.map(
            lambda v, g: _between(v, jnp.real(g * jnp.conj(g)), share_2 / weight_2),
            state.batch_adam_nu,
            gradients,
        )

        def direction(u: Any, g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            if nesterov:
                old = (1.0 - share_1) * weight_1
                m = m * (old / (old + share_1)) + g * (share_1 / weight_1)
            return (m / (jnp.sqrt(v) + epsilon)).astype(u.dtype)

        result = jax.tree.map(direction, updates, gradients, mu, nu)
        return result, ScaleByBatchAdamState(beta_1, beta_2, epsilon, weight_1, weight_2, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(x: Any) -> Any:
    return jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32


def _between(old: jax.Array, new: jax.Array, share: jax.Array) -> jax.Array:
    """(1 − share) old + share new, from the nearer end: exact for share 1 and for old = new."""
    return jnp.where(share < 0.5, old + share * (new - old), new + (1.0 - share) * (old - new))
