"""`scale_by_random_matrix`: the transition batch size, measured while training."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._axes import axis_tuple
from adabatch_jax._tree import scale
from adabatch_jax._types import AxisName, LossFn, PyTree
from adabatch_jax.curvature import (
    full_hessian_extremes,
    group_shape,
    spectrum_and_noise,
    transition_batch_size,
)
from adabatch_jax.learning_rate._examples import batch_sizes
from adabatch_jax.learning_rate._refresh import Refresh
from adabatch_jax.learning_rate._scaling import (
    linear_scaling,
    random_matrix_scaling,
    sqrt_scaling,
)
from adabatch_jax.noise import GradientNoise


class ScaleByRandomMatrixState(NamedTuple):
    """State of `scale_by_random_matrix`."""

    measured_scale: jax.Array  # float32: the factor last applied
    measured_transition: jax.Array  # b*; 0 at first
    measured_largest: jax.Array  # λ₁ of the Hessian on all data, averaged; 0 at first
    measured_noise: jax.Array  # ν², averaged likewise
    transition_refreshes: jax.Array  # int32: usable ones
    failed_transition_refreshes: jax.Array  # int32
    since_transition: jax.Array  # uint32, in steps or examples
    transition_key: jax.Array

    def report_metrics(self) -> dict[str, Any]:
        """The numbers that `adabatch.metrics` shows."""
        return {
            "learning_rate_scale": self.measured_scale,
            "transition_batch_size": self.measured_transition,
            "curvature_largest": self.measured_largest,
            "hessian_noise": self.measured_noise,
            "refreshes": self.transition_refreshes,
            "failed_refreshes": self.failed_transition_refreshes,
        }


def scale_by_random_matrix(
    *,
    base_batch_size: Any,
    adaptive: bool,
    refresh_every: int,
    momentum: Any = 0.0,
    refresh_unit: str = "step",
    num_steps: int = 10,
    ema_decay: Any = 0.5,
    dataset_size: Any = None,
    axis_name: AxisName = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_batch_size` by `random_matrix_scaling`, with a transition batch size that it measures.

    Every `refresh_every` steps, a Lanczos run on the Hessian over all of `groups` gives λ₁ and its Ritz
    vector z, and the products of single groups with z give ν² = E ‖(H_i − H) z‖², as `hessian_noise`
    does. λ₁ is brought from the examples in `groups` to all data by `full_hessian_extremes`; both are
    averaged over refreshes. Updates are multiplied by r = (1 + b*/𝔟₀) / (1 + b*/𝔟), or √r, with the
    `transition_batch_size` b* of λ₁, ν² and the momentum. A refresh whose numbers are not finite, or whose
    λ₁ is not positive, is counted and changes nothing. Until the first usable one the factor is
    min(1, b/b₀), or its root, and every step tries again.

    `update` needs `params`, and reads `noise=` or `num_examples=` for b, `loss_fn=`, (params, group) →
    mean loss, and `groups=`, leaves [num_groups ≥ 2, group_size, …]: the two things that
    `value_and_grad_noise` takes. A fixed set of some hundred examples in eight or more groups will do; one
    group is in memory at a time. In a jitted step `loss_fn` may be any function in scope, or a
    `jax.tree_util.Partial`. `emit=False` (from `adaptive_multi_steps`) puts a refresh off.

    Args:
      base_batch_size: b₀ > 0, at which the learning rate was chosen; `base_batch_size=` in `update`
        overrides it.
      adaptive: √r, for Adam and the like, instead of r; static.
      refresh_every: steps or examples between two refreshes, ≥ 1; static. One costs about
        1.5 × `num_steps` gradients of the examples in `groups`.
      momentum: β in [0, 1) of the direction before, for Adam its b1. It moves b*, by 19 for 0.9.
      refresh_unit: "step" or "example"; static.
      num_steps: Lanczos steps; static.
      ema_decay: weight of the past at a refresh, in [0, 1).
      dataset_size: N, examples > 0, of which `groups` is a part; None: much larger than every batch.
      axis_name: device axes over which `groups` is spread.
      seed: of the start vectors; static.

    Returns:
      A `GradientTransformationExtraArgs` for a chain, after the direction. `adabatch.metrics` shows
      `transition_batch_size`, `curvature_largest`, `hessian_noise` (0 before the first usable refresh),
      `refreshes`, `failed_refreshes`.
      Under `optax.inject_hyperparams` all but base_batch_size, momentum, ema_decay and dataset_size
      are static_args.

    Raises:
      ValueError: an argument out of range; in `init`, a parameter that is no array of real floating-point
        numbers; at trace time, `params`, `loss_fn=`, `groups=` or the batch
        size missing, or fewer than two groups.

    Example:
      >>> import jax.numpy as jnp
      >>> link = scale_by_random_matrix(base_batch_size=1, adaptive=False, refresh_every=10)
      >>> loss = lambda w, a: 0.5 * jnp.mean(a) * jnp.sum(w**2)  # H_i = a_i I
      >>> groups, w = jnp.array([[1.0], [3.0]]), jnp.ones(2)
      >>> updates, state = link.update(
      ...     jnp.ones(2), link.init(w), w, num_examples=4, loss_fn=loss, groups=groups)
      >>> numbers = state.report_metrics()
      >>> [round(float(numbers[k]), 3) for k in ("transition_batch_size", "learning_rate_scale")]
      [2.0, 2.0]

    Source: Granziol, Zohren, Roberts (2022), arXiv 2006.09092; measuring b* while training is ours.
    """
    where = "scale_by_random_matrix"
    _validate.positive(where, base_batch_size=base_batch_size)
    refresh = Refresh.checked(where, refresh_every, refresh_unit)
    _validate.positive_int(where, num_steps=num_steps)
    _validate.between(where, 0.0, 1.0, momentum=momentum, ema_decay=ema_decay)
    if dataset_size is not None:
        _validate.positive(where, dataset_size=dataset_size)
    axes, default_base = axis_tuple(axis_name), base_batch_size

    def init(params: PyTree) -> ScaleByRandomMatrixState:
        _validate.real_arrays(where, params=params)
        return ScaleByRandomMatrixState(
            measured_scale=jnp.ones((), jnp.float32),
            measured_transition=jnp.zeros((), jnp.float32),
            measured_largest=jnp.zeros((), jnp.float32),
            measured_noise=jnp.zeros((), jnp.float32),
            transition_refreshes=jnp.zeros((), jnp.int32),
            failed_transition_refreshes=jnp.zeros((), jnp.int32),
            since_transition=refresh.start(),
            transition_key=jax.random.key_data(jax.random.key(seed)),
        )

    def refreshed(
        state: ScaleByRandomMatrixState,
        params: PyTree,
        loss_fn: LossFn,
        groups: PyTree,
    ) -> ScaleByRandomMatrixState:
        key, draw = jax.random.split(jax.random.wrap_key_data(state.transition_key))
        spectrum, noise = spectrum_and_noise(loss_fn, params, groups, draw, num_steps, axes)
        num_groups, group_size = group_shape(where, groups)
        for axis in axes:
            num_groups = num_groups * jax.lax.axis_size(axis)
        largest = full_hessian_extremes(
            spectrum.largest, spectrum.smallest, noise, num_groups * group_size, dataset_size
        ).largest
        usable = jnp.isfinite(largest + noise) & (spectrum.largest > 0) & (largest > 0)
        old = jnp.where(state.transition_refreshes == 0, 0.0, jnp.asarray(ema_decay, jnp.float32))
        new = state._replace(
            measured_largest=old * state.measured_largest + (1.0 - old) * largest,
            measured_noise=old * state.measured_noise + (1.0 - old) * noise,
            transition_refreshes=state.transition_refreshes + 1,
        )
        failed = state._replace(failed_transition_refreshes=state.failed_transition_refreshes + 1)
        kept = optax.tree.where(usable, new, failed)
        return kept._replace(transition_key=jax.random.key_data(key))

    def update(
        updates: PyTree,
        state: ScaleByRandomMatrixState,
        params: PyTree | None = None,
        *,
        loss_fn: LossFn | None = None,
        groups: PyTree | None = None,
        noise: GradientNoise | None = None,
        num_examples: Any = None,
        base_batch_size: Any = None,
        emit: Any = True,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByRandomMatrixState]:
        del extra_args
        if params is None or loss_fn is None or groups is None:
            raise ValueError(
                f"{where} measures how the Hessian differs between groups of examples: call "
                "optimizer.update(gradient, state, params, noise=noise, loss_fn=loss_fn, "
                "groups=groups), with what value_and_grad_noise takes"
            )
        group_shape(where, groups)
        given = default_base if base_batch_size is None else base_batch_size
        size, base = batch_sizes(where, given, noise, num_examples)
        due = refresh.due(state.since_transition, state.transition_refreshes > 0, emit)
        if jax.tree.leaves(params):
            state = jax.lax.cond(
                due, lambda s: refreshed(s, params, loss_fn, groups), lambda s: s, state
            )
        transition = transition_batch_size(
            state.measured_largest, state.measured_noise, momentum=momentum
        )
        known = state.transition_refreshes > 0
        rule = random_matrix_scaling(transition, adaptive=adaptive, dataset_size=dataset_size)
        cautious = sqrt_scaling() if adaptive else linear_scaling()
        factor = jnp.where(known, rule(size, base), jnp.minimum(cautious(size, base), 1.0))
        return scale(updates, factor), state._replace(
            measured_scale=factor,
            measured_transition=transition,
            since_transition=refresh.advance(state.since_transition, due, size),
        )

    return optax.GradientTransformationExtraArgs(init, update)
