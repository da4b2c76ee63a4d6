"""What else follows the batch size: Adam's decays and ε, weight decay, averages of parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._types import ArrayLike, ScalingRule
from adabatch_jax.learning_rate._examples import batch_sizes
from adabatch_jax.learning_rate._scaling import sqrt_scaling
from adabatch_jax.noise import GradientNoise

_BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 there


def follow_batch_size(rule: ScalingRule, *, base_batch_size: ArrayLike) -> _FollowBatchSize:
    """A hyperparameter for `optax.inject_hyperparams` that follows the batch size.

    Its value in a step is `rule(b, base_batch_size)`, b being the batch behind the gradient of that
    same step. b is read as `scale_by_batch_size` does: from `noise=` (`noise.num_examples`) or, if
    given, from `batch_size=`; `base_batch_size=` there overrides the one given here. Before the
    first step the value is that at the base. It is float32 whatever the parameters are, since a β
    close to 1 would not survive bfloat16; so `optax.add_decayed_weights` then hands on float32.

    Args:
      rule: `scaled_weight_decay`, `scaled_eps`, `scaled_beta`, or any function of (batch size, base
        batch size).
      base_batch_size: the batch size at which the hyperparameter was chosen, > 0.

    Returns:
      An Optax `StatefulSchedule`.

    Raises:
      ValueError: `base_batch_size` is not positive; `rule` is not callable; at trace time, neither
        `noise=` nor `num_examples=`, or use as a plain schedule without `optax.inject_hyperparams`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> decay = follow_batch_size(scaled_weight_decay(0.25), base_batch_size=64)
      >>> link = optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=decay)
      >>> params = jnp.array(2.0)
      >>> updates, state = link.update(jnp.array(0.0), link.init(params), params, num_examples=256)
      >>> float(state.hyperparams["weight_decay"]), float(updates)
      (1.0, 2.0)

    Source: see the rules.
    """
    where = "follow_batch_size"
    _validate.positive(where, base_batch_size=base_batch_size)
    _validate.function(where, rule=rule)
    return _FollowBatchSize(rule, base_batch_size)


class _FollowBatchSize:
    """An Optax `StatefulSchedule` that remembers nothing."""

    def __init__(self, rule: ScalingRule, base_batch_size: ArrayLike) -> None:
        self.rule = rule
        self.base_batch_size = base_batch_size

    def init(self) -> optax.EmptyState:
        return optax.EmptyState()

    def __call__(
        self,
        state: optax.EmptyState,
        *,
        noise: GradientNoise | None = None,
        num_examples: ArrayLike | None = None,
        base_batch_size: ArrayLike | None = None,
        **extra_args: Any,
    ) -> jax.Array:
        del extra_args
        if not isinstance(state, optax.EmptyState):  # a step count: it would stay at the base
            raise ValueError(
                "follow_batch_size is no schedule over steps: wrap the factory that takes it, as "
                "in optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=...)"
            )
        base = self.base_batch_size if base_batch_size is None else base_batch_size
        if noise is None and num_examples is None:  # Optax asks for a value before the first step
            num_examples = base
        sizes = batch_sizes("follow_batch_size", base, noise, num_examples)
        return jnp.asarray(self.rule(*sizes)).astype(jnp.float32)

    def update(
        self,
        state: optax.EmptyState,
        *,
        noise: GradientNoise | None = None,
        num_examples: ArrayLike | None = None,
        **extra_args: Any,
    ) -> optax.EmptyState:
        """Checks the arguments: Optax calls this in every step, and at init never."""
        del extra_args
        batch_sizes("follow_batch_size", self.base_batch_size, noise, num_examples)
        return state


def scaled_beta(beta: ArrayLike) -> ScalingRule:
    """Decay of a moment of the gradient that remembers the same number of examples: β for batch b.

    1 − κ (1 − β), κ = b / b₀. The rule needs κ < 1 / (1 − β): beyond, the decay stays at 0 and the
    moment is the last gradient alone, a mean over more examples than the rule asks for. For tiny κ
    it stays below 1 by one float32 step.

    Args:
      beta: β at the base batch size, in [0, 1).

    Returns:
      A rule: (batch size, base batch size) → float32 scalar in [0, 1). `optax.scale_by_adam`
      corrects a bias that supposes a constant β: take `scale_by_batch_adam`.

    Raises:
      ValueError: `beta` is not in [0, 1).

    Example:
      >>> rule = scaled_beta(0.75)
      >>> float(rule(128, 64)), float(rule(256, 64)), float(rule(512, 64))
      (0.5, 0.0, 0.0)

    Source: Malladi et al. (2022), arXiv 2205.10287, the square-root scaling rule for Adam; the clip
    is ours.
    """
    _validate.between("scaled_beta", 0.0, 1.0, beta=beta)
    return lambda size, base: jnp.minimum(1.0 - share_of_new(beta, size, base), _BELOW_ONE)


def scaled_eps(eps: ArrayLike, scaling: ScalingRule | None = None) -> ScalingRule:
    """Damping proportional to learning rate / batch size: ε for batch b.

    ε r(b) b₀ / b, where r is the rule by which the learning rate follows the batch. With the square
    root it is ε / √κ, κ = b / b₀: as noise shrinks, so does √v̂, and ε keeps its share of the sum.

    Args:
      eps: ε ≥ 0 at the base batch size.
      scaling: the rule of the learning rate; None: `sqrt_scaling()`.

    Returns:
      A rule: (batch size, base batch size) → float32 scalar.

    Raises:
      ValueError: `eps` is negative or not finite; `scaling` is not callable.

    Example:
      >>> float(scaled_eps(0.5)(256, 64))
      0.25

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092, abstract; Malladi et al. (2022),
    arXiv 2205.10287, for the square root.
    """
    where = "scaled_eps"
    _validate.between(where, 0.0, float("inf"), eps=eps)
    rate = sqrt_scaling() if scaling is None else scaling
    _validate.function(where, scaling=rate)

    def rule(batch_size: ArrayLike, base: ArrayLike) -> jax.Array:
        return _float32(eps) * _scale(rate, batch_size, base) / _ratio(batch_size, base)

    return rule


def scaled_weight_decay(weight_decay: ArrayLike, scaling: ScalingRule | None = None) -> ScalingRule:
    """Weight decay that takes the same share of a weight per example: λ for batch b.

    A step takes away the share α r λ, with r the factor of `scale_by_batch_size` where that comes
    after the decay, and 1 where it comes before. Per example this stays if λ(b) = λ κ / r,
    κ = b / b₀. So in the chain direction → decay → `scale_by_batch_size(scaling)` give `scaling`
    here, too, and in direction → `scale_by_batch_size(scaling)` → decay give none. Holds to first
    order in α λ(b), which must stay far below 1.

    Args:
      weight_decay: λ ≥ 0 at the base batch size, decoupled.
      scaling: the rule of the `scale_by_batch_size` behind the decay; None: none is behind it.

    Returns:
      A rule: (batch size, base batch size) → float32 scalar, for `follow_batch_size`.

    Raises:
      ValueError: `weight_decay` is negative or not finite; `scaling` is neither callable nor None.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from adabatch_jax import scale_by_batch_size
      >>> def decay(*scaling):
      ...     value = follow_batch_size(scaled_weight_decay(0.1, *scaling), base_batch_size=64)
      ...     return optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=value)
      >>> scale = scale_by_batch_size(sqrt_scaling(), base_batch_size=64)
      >>> params, zero = jnp.array(1.0), jnp.array(0.0)
      >>> for links in [(decay(sqrt_scaling()), scale), (scale, decay())]:
      ...     chain = optax.chain(*links)
      ...     taken, _ = chain.update(zero, chain.init(params), params, num_examples=256)
      ...     print(round(float(taken), 4))  # 4 · 0.1, for four times as many examples
      0.4
      0.4

    Source: Wang, Aitchison (2024), arXiv 2405.13698: the timescale 1 / (α λ) in epochs is what to
    keep; the two placements are ours.
    """
    where = "scaled_weight_decay"
    _validate.between(where, 0.0, float("inf"), weight_decay=weight_decay)
    if scaling is not None:
        _validate.function(where, scaling=scaling)

    def rule(batch_size: ArrayLike, base: ArrayLike) -> jax.Array:
        decay = _float32(weight_decay) * _ratio(batch_size, base)
        return decay if scaling is None else decay / _scale(scaling, batch_size, base)

    return rule


def scaled_average(decay: ArrayLike) -> ScalingRule:
    """Decay of an average of the parameters that forgets at the same pace per example.

    ρ^(b / b₀), for `average ← ρ average + (1 − ρ) params` after a step on b examples: b₀ examples
    always weigh ρ, whether they came in one step or in several. With `adaptive_multi_steps` the
    average may move only with the parameters, on calls after which `has_updated` is true. It begins as a
    float32 copy of them, since a bfloat16 number does not move by less than 0.2 %:

        size = adabatch.get_batch_size(opt_state)  # of the step that this call may complete
        updates, opt_state = optimizer.update(gradient, opt_state, params, value=value)
        params = optax.apply_updates(params, updates)
        weight = jnp.where(adabatch.has_updated(opt_state), 1 - rule(size, 64), 0.0)
        average = optax.incremental_update(params, average, weight)

    Args:
      decay: ρ at the base batch size, in [0, 1).

    Returns:
      A rule: (batch size, base batch size) → float32 scalar in [0, 1].

    Raises:
      ValueError: `decay` is not in [0, 1).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> rule = scaled_average(0.5)
      >>> params, average = jnp.array(1.0), jnp.array(0.0)
      >>> float(optax.incremental_update(params, average, 1 - rule(128, 64)))
      0.75

    Source: Busbridge et al. (2023), arXiv 2307.13813, the scaling rule for averages of models.
    """
    _validate.between("scaled_average", 0.0, 1.0, decay=decay)
    return lambda size, base: jnp.power(_float32(decay), _ratio(size, base))


def share_of_new(beta: ArrayLike, batch_size: ArrayLike, base: ArrayLike) -> jax.Array:
    """1 − β for a batch: min(κ (1 − β), 1), without the digits that 1 − (1 − x) would lose."""
    return jnp.minimum(_ratio(batch_size, base) * _float32(1.0 - beta), 1.0)


def _float32(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)


def _ratio(batch_size: ArrayLike, base: ArrayLike) -> jax.Array:
    return _float32(batch_size) / _float32(base)


def _scale(scaling: ScalingRule, batch_size: ArrayLike, base: ArrayLike) -> jax.Array:
    return _float32(scaling(_float32(batch_size), _float32(base)))
