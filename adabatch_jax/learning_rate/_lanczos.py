"""`scale_by_lanczos`: learning rate and momentum from the curvature, measured while training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from adabatch_jax import _validate
from adabatch_jax._types import AxisName, PyTree
from adabatch_jax.learning_rate._examples import batch_sizes
from adabatch_jax.learning_rate._lanczos_rates import (
    LanczosRules,
    ScaleByLanczosState,
    first_state,
    moved,
    rates,
    refreshed,
)
from adabatch_jax.learning_rate._refresh import Refresh
from adabatch_jax.noise import GradientNoise


def scale_by_lanczos(
    variant: str = "heavy_ball",
    *,
    refresh_every: int,
    refresh_unit: str = "step",
    num_steps: int = 10,
    max_momentum: Any = 0.9,
    safety: Any = 0.3,
    ema_decay: Any = 0.5,
    nu_squared: Any = None,
    curvature_batch_size: Any = None,
    axis_name: AxisName = None,
    seed: int = 0,
    flip_sign: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """SGD that measures the curvature now and then, and sets its learning rate and momentum by it.

    Every `refresh_every` steps, a Lanczos run on the Hessian of `value_fn=` gives Ritz values θ with
    weights. L = max |θ|; without the one that holds more than half of the weight and is below L/10 (the
    many eigenvalues at zero), μ = min |θ|. But μ = 0 if there is negative curvature, as networks have,
    or if the residual of that θ is more than a quarter of it: few steps find the largest curvature long
    before the least one, and a μ that is too large makes β too small (nesterov_authors, whose α would be
    0 then, takes it as it is). Then

    * gradient_descent: α = 2 / (L + median |θ|), no momentum;
    * heavy_ball: α = (2 / (√L + √μ))², β = ((√L − √μ) / (√L + √μ))², Polyak's;
    * nesterov: α = 1 / L, β = (√L − √μ) / (√L + √μ);
    * nesterov_authors: the same β with α = √(μ / L), which depends on the units of the loss.

    β is at most `max_momentum`, α at most `safety` times `max_stable_learning_rate` for that β. The trace
    is t ← β t + g as in `optax.trace`, the update −α t (Nesterov: −α (β t + g)). A rise of L is taken at
    once, since a rate above the bound diverges. A fall may be an echo: training on mini-batches tends to
    bring the curvature down towards 2 (1 − β) / α. So a fall raises α no further than 2 (1 − β) / L, and
    for the rest is averaged over refreshes, geometrically, as μ and the median are. A refresh whose
    curvature is not finite, or whose λ₁ is not positive, is counted and changes nothing. Until the first
    usable one the learning rate is 0 and every step tries again.

    `update` needs `params` and reads `value_fn=`, params → scalar loss on a curvature batch (32 to 1024
    examples), as Optax's line searches do. In a jitted step it may close over the batch, or be a
    `jax.tree_util.Partial`. `emit=False` (from `adaptive_multi_steps`) puts a refresh off.

    Args:
      variant: one of the above; static.
      refresh_every: steps or examples between two refreshes, ≥ 1; static.
      refresh_unit: "step", or "example": counts `noise.num_examples` or `num_examples=`; static.
      num_steps: products with the Hessian in a refresh; static.
      max_momentum: in [0, 1).
      safety: share of the largest stable learning rate, in (0, 1].
      ema_decay: weight of the past at a refresh, in [0, 1).
      nu_squared: ν² of one example, as `adabatch.curvature.hessian_noise` measures it. Then the bound is
        that of a batch of the size behind the present gradient: L is brought from the curvature batch
        to all data, and the noise counts as in `max_stable_learning_rate`. None: L as it is measured.
      curvature_batch_size: examples behind `value_fn`, with `nu_squared`.
      axis_name: device axes over which `value_fn` is averaged.
      seed: of the start vectors; static.
      flip_sign: multiply by −α, as `optax.scale_by_learning_rate` does; static.

    Returns:
      A `GradientTransformationExtraArgs`, the last link of a chain. Under `optax.inject_hyperparams`
      all but max_momentum, safety, ema_decay, nu_squared and curvature_batch_size are static_args.

    Raises:
      ValueError: an argument out of range; only one of `nu_squared` and `curvature_batch_size`; in
        `init`, a parameter that is no array of real floating-point numbers; at trace time, a missing
        `params`, `value_fn=`, or batch size where one is needed.

    Example:
      >>> import jax.numpy as jnp
      >>> link = scale_by_lanczos("gradient_descent", refresh_every=10, safety=1.0)
      >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([4.0, 4.0]) * w**2)
      >>> w = jnp.array([1.0, -1.0])
      >>> u, state = link.update(4.0 * w, link.init(w), w, value_fn=loss)
      >>> round(float(state.lanczos_learning_rate), 4), [round(float(x), 4) for x in u]
      (0.25, [-1.0, 1.0])

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092, and the authors' code; Polyak (1964);
    Nesterov (1983). The caps, the smoothing, the echo, μ = 0, L/10 and 1 / L for Nesterov are ours.
    Defaults: tests/experiments/lanczos_learner.py.
    """
    where = "scale_by_lanczos"
    refresh = Refresh.checked(where, refresh_every, refresh_unit)
    rules = LanczosRules(
        variant=variant,
        num_steps=num_steps,
        max_momentum=max_momentum,
        safety=safety,
        ema_decay=ema_decay,
        nu_squared=nu_squared,
        curvature_batch_size=curvature_batch_size,
        axis_name=axis_name,
    )
    rules.check(where)
    sign = -1.0 if flip_sign else 1.0

    def init(params: PyTree) -> ScaleByLanczosState:
        _validate.real_arrays(where, params=params)
        return first_state(params, refresh.start(), seed)

    def update(
        updates: PyTree,
        state: ScaleByLanczosState,
        params: PyTree | None = None,
        *,
        value_fn: Callable[[PyTree], jax.Array] | None = None,
        noise: GradientNoise | None = None,
        num_examples: Any = None,
        emit: Any = True,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByLanczosState]:
        del extra_args
        if params is None or value_fn is None:
            raise ValueError(
                f"{where} measures the curvature of the loss: call optimizer.update(gradient, state, "
                "params, value_fn=value_fn) with value_fn(params) the loss on a curvature batch"
            )
        size, sharpness = None, {}
        if refresh.by_examples or nu_squared is not None:
            size = batch_sizes(where, 1.0, noise, num_examples)[0]
            if nu_squared is not None:
                sharpness = {"noise": nu_squared, "batch_size": size}
        due = refresh.due(state.since_refresh, state.refreshes > 0, emit)
        if jax.tree.leaves(params):
            # Without the trace: what passes through a cond inside a scan is copied at every step.
            numbers = state._replace(lanczos_trace=())
            numbers = jax.lax.cond(
                due, lambda s: refreshed(rules, s, params, value_fn), lambda s: s, numbers
            )
            state = numbers._replace(lanczos_trace=state.lanczos_trace)
        alpha, beta = rates(rules, state, sharpness)
        updates, trace = moved(rules, updates, state.lanczos_trace, sign * alpha, beta)
        return updates, state._replace(
            lanczos_learning_rate=alpha,
            lanczos_momentum=beta,
            since_refresh=refresh.advance(state.since_refresh, due, size),
            lanczos_trace=trace,
        )

    return optax.GradientTransformationExtraArgs(init, update)
