"""How the learning rate follows the batch size."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._tree import scale
from adabatch_jax._types import ArrayLike, PyTree, ScalingRule
from adabatch_jax.curvature import inverse_effective_batch_size
from adabatch_jax.learning_rate._examples import batch_sizes
from adabatch_jax.noise import GradientNoise


def linear_scaling() -> ScalingRule:
    """Linear scaling of the learning rate: factor b / b₀, for SGD with or without momentum.

    Returns:
      A rule: (batch size, base batch size), float32 scalars, → factor.

    Example:
      >>> float(linear_scaling()(256.0, 64.0))
      4.0

    Source: Goyal et al. (2017), arXiv 1706.02677, section 2.1; Granziol, Zohren, Roberts (2022),
    arXiv 2006.09092, abstract.
    """
    return lambda batch_size, base: batch_size / base


def sqrt_scaling() -> ScalingRule:
    """Square-root scaling of the learning rate: factor √(b / b₀), for adaptive methods.

    Returns:
      A rule: (batch size, base batch size), float32 scalars, → factor.

    Example:
      >>> float(sqrt_scaling()(256.0, 64.0))
      2.0

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092, abstract; Malladi et al. (2022),
    arXiv 2205.10287.
    """
    return lambda batch_size, base: jnp.sqrt(batch_size / base)


def random_matrix_scaling(
    transition_batch_size: ArrayLike, *, adaptive: bool, dataset_size: ArrayLike | None = None
) -> ScalingRule:
    """Scaling by the largest stable rate: linear below the transition batch size b*, flat above it.

    Factor r = (1 + b*/𝔟₀) / (1 + b*/𝔟), or √r for adaptive methods. 1/𝔟 is (N − b)/(b N) with a data set
    of N examples, else 1/b. While noise dominates, 𝔟 ≪ b*, this is `linear_scaling` (`sqrt_scaling`);
    once both are saturated, 𝔟 ≫ b*, it is 1. For SGD, with or without momentum, it is the ratio of the
    `max_stable_learning_rate` of the two batch sizes, if b* is the transition with that momentum. Near
    the whole data set 𝔟 grows beyond all bounds, and r with it, up to 1 + b*/𝔟₀.

    Args:
      transition_batch_size: b* ≥ 0, from `adabatch.curvature.transition_batch_size`, which takes the
        momentum of the optimizer; may be traced.
        As an array it may be anything: infinite is r = b/b₀, whatever the data set; NaN, b* not being
        known, is the cautious r = min(1, b/b₀); negative counts as 0.
      adaptive: √r, for Adam and the like, instead of r; static.
      dataset_size: N, examples > 0; None: so large that batches do not exhaust it.

    Returns:
      A rule: (batch size, base batch size), float32 scalars, → factor.

    Raises:
      ValueError: `transition_batch_size` is a number that is negative or not finite; `dataset_size` is
        a number that is not positive.

    Example:
      >>> rule = random_matrix_scaling(192.0, adaptive=False)
      >>> [round(float(rule(b, 64.0)), 3) for b in (16.0, 64.0, 192.0, 576.0, 1e6)]
      [0.308, 1.0, 2.0, 3.0, 3.999]

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092, abstract; the form between the limits is
    ours.
    """
    where = "random_matrix_scaling"
    _validate.between(where, 0.0, float("inf"), transition_batch_size=transition_batch_size)
    if dataset_size is not None:
        _validate.positive(where, dataset_size=dataset_size)

    def rule(batch_size: jax.Array, base: jax.Array) -> jax.Array:
        transition = jnp.maximum(jnp.asarray(transition_batch_size, jnp.float32), 0.0)
        before = inverse_effective_batch_size(base, dataset_size)
        after = inverse_effective_batch_size(batch_size, dataset_size)
        known = jnp.isfinite(transition)
        finite = jnp.where(known, transition, 0.0)
        ratio = (1.0 + finite * before) / (1.0 + finite * after)
        linear = inverse_effective_batch_size(base) / inverse_effective_batch_size(batch_size)
        limit = jnp.where(jnp.isnan(transition), jnp.minimum(linear, 1.0), linear)
        ratio = jnp.where(known, ratio, limit)
        return jnp.sqrt(ratio) if adaptive else ratio

    return rule


class ScaleByBatchSizeState(NamedTuple):
    """State of `scale_by_batch_size`."""

    applied_scale: jax.Array  # float32: the factor last applied

    def report_metrics(self) -> dict[str, Any]:
        """The numbers that `adabatch.metrics` shows."""
        return {"learning_rate_scale": self.applied_scale}


def scale_by_batch_size(
    scaling: ScalingRule, *, base_batch_size: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by `scaling(b, base_batch_size)`, b being the batch behind the present gradient.

    `update` reads the batch size from `noise=` (`noise.num_examples`) or, if given, from
    `num_examples=` (or `batch_size=`); `base_batch_size=` there overrides the one given here. Put it
    after the direction (`optax.scale_by_adam()`, …), beside the learning rate.

    Args:
      scaling: `linear_scaling()`, `sqrt_scaling()`, `random_matrix_scaling(…)`, or any function of
        (batch size, base batch size).
      base_batch_size: the batch size at which the learning rate was chosen, > 0.

    Returns:
      A `GradientTransformationExtraArgs`. Under `optax.inject_hyperparams` `scaling` belongs to
      static_args.

    Raises:
      ValueError: `base_batch_size` is not positive; `scaling` is not callable; at trace time, neither
        `noise=` nor `num_examples=`.

    Example:
      >>> import jax.numpy as jnp
      >>> link = scale_by_batch_size(sqrt_scaling(), base_batch_size=64)
      >>> state = link.init(jnp.ones(2))
      >>> updates, state = link.update(jnp.ones(2), state, num_examples=256)
      >>> updates.tolist()
      [2.0, 2.0]

    Source: see the rules.
    """
    where = "scale_by_batch_size"
    _validate.positive(where, base_batch_size=base_batch_size)
    _validate.function(where, scaling=scaling)
    default_base = base_batch_size

    def init(params: PyTree) -> ScaleByBatchSizeState:
        del params
        return ScaleByBatchSizeState(jnp.ones((), jnp.float32))

    def update(
        updates: PyTree,
        state: ScaleByBatchSizeState,
        params: PyTree | None = None,
        *,
        noise: GradientNoise | None = None,
        num_examples: ArrayLike | None = None,
        batch_size: ArrayLike | None = None,
        base_batch_size: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByBatchSizeState]:
        del state, params, extra_args
        given = default_base if base_batch_size is None else base_batch_size
        number = batch_size if num_examples is None else num_examples
        size, base = batch_sizes(where, given, noise, number)
        factor = jnp.asarray(scaling(size, base)).astype(jnp.float32)
        return scale(updates, factor), ScaleByBatchSizeState(factor)

    return optax.GradientTransformationExtraArgs(init, update)
