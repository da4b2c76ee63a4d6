"""How the learning rate follows the batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax.noise import GradientNoise

PyTree = Any
ScalingRule = Callable[[jax.Array, jax.Array], jax.Array]


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


class ScaleByBatchSizeState(NamedTuple):
    """State of `scale_by_batch_size`."""

    applied_scale: jax.Array  # float32: the factor last applied

    def report_metrics(self) -> dict[str, Any]:
        """The numbers that `adabatch.metrics` shows."""
        return {"learning_rate_scale": self.applied_scale}


def scale_by_batch_size(
    rule: ScalingRule, *, base_batch_size: Any
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by `rule(b, base_batch_size)`, b being the batch behind the present gradient.

    `update` reads the batch size from `noise=` (`noise.num_examples`) or, if given, from
    `batch_size=`; `base_batch_size=` there overrides the one given here. Put it after the direction
    (`optax.scale_by_adam()`, …), beside the learning rate.

    Args:
      rule: `linear_scaling()`, `sqrt_scaling()`, or any function of (batch size, base batch size).
      base_batch_size: the batch size at which the learning rate was chosen, > 0.

    Returns:
      A `GradientTransformationExtraArgs`. Under `optax.inject_hyperparams` `rule` belongs to
      static_args.

    Raises:
      ValueError: `base_batch_size` is not positive; `rule` is not callable; at trace time, neither
        `noise=` nor `batch_size=`.

    Example:
      >>> import jax.numpy as jnp
      >>> link = scale_by_batch_size(sqrt_scaling(), base_batch_size=64)
      >>> state = link.init(jnp.ones(2))
      >>> updates, state = link.update(jnp.ones(2), state, batch_size=256)
      >>> updates.tolist()
      [2.0, 2.0]

    Source: see the rules.
    """
    _validate.positive("scale_by_batch_size", base_batch_size=base_batch_size)
    if not callable(rule):
        raise ValueError(f"scale_by_batch_size: rule must be callable, got {rule!r}")
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
        batch_size: Any = None,
        base_batch_size: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByBatchSizeState]:
        del state, params, extra_args
        if noise is None and batch_size is None:
            raise ValueError(
                "scale_by_batch_size needs the batch size: pass noise=noise (from "
                "value_and_grad_noise) or batch_size= to optimizer.update"
            )
        size = noise.num_examples if batch_size is None and noise is not None else batch_size
        base = default_base if base_batch_size is None else base_batch_size
        size, base = (jnp.asarray(x).astype(jnp.float32) for x in (size, base))
        factor = jnp.asarray(rule(jnp.maximum(size, 1.0), base)).astype(jnp.float32)
        scaled = jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)
        return scaled, ScaleByBatchSizeState(factor)

    return optax.GradientTransformationExtraArgs(init, update)
