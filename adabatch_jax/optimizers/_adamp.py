"""AdamP: Adam without the radial part of the step, where a parameter's length means nothing."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._types import ArrayLike, PyTree

_TINY = 1e-16  # under the square roots of norms: float32 has room for it


class ScaleByAdampState(NamedTuple):
    """State of `scale_by_adamp`; the moments are float32."""

    adamp_count: jax.Array  # int32
    adamp_mu: PyTree
    adamp_nu: PyTree


def scale_by_adamp(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: ArrayLike = 0.0,
    delta: ArrayLike = 0.1,
    wd_ratio: ArrayLike = 0.1,
    nesterov: bool = False,
    channel_axis: int = -1,
) -> optax.GradientTransformation:
    """The direction of AdamP, weight decay included.

    u = m̂ / (√v̂ + ε) as in Adam. A weight w, seen as rows, counts as scale-invariant if its gradient g
    is nearly orthogonal to it: max over rows of |⟨g, w⟩| / (‖g‖ ‖w‖) < δ / √(row length). Then the
    radial part is taken out, u ← u − ŵ ⟨ŵ, u⟩ with ŵ = w / ‖w‖, and the decay is multiplied by
    `wd_ratio`. Rows are the output channels or, where that view says no, the whole weight. Weights
    with fewer than two axes get Adam's step and the full decay. Returned is u + λ w.

    Args:
      b1: decay of m, in [0, 1).
      b2: decay of v, in [0, 1).
      eps: ε ≥ 0, outside the root.
      weight_decay: λ ≥ 0, decoupled.
      delta: δ ≥ 0.
      wd_ratio: in [0, 1].
      nesterov: m̂ looks one step ahead: (β₁ m + (1 − β₁) g) / (1 − β₁ᵗ).
      channel_axis: axis of the output channels: the last in Flax (kernels [in, out] and
        [height, width, in, out]), the first in PyTorch.

    Returns:
      A `GradientTransformation` whose `update` needs `params`. Under `optax.inject_hyperparams`
      nesterov and channel_axis belong to static_args.

    Raises:
      ValueError: an argument out of range; in `init`, a parameter that is no array of real floating-point
        numbers, or has no axis `channel_axis`; at trace time, a missing `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> link = scale_by_adamp()
      >>> w = jnp.array([[1.0], [0.0]])
      >>> u, state = link.update(jnp.array([[0.0], [2.0]]), link.init(w), w)  # g ⊥ w: as Adam
      >>> [round(float(x), 4) for x in u[:, 0]]
      [0.0, 1.0]

    Source: Heo et al. (2021), arXiv 2006.08217, algorithm 2 and the authors' defaults.
    """
    where = "scale_by_adamp"
    _validate.between(where, 0.0, 1.0, b1=b1, b2=b2)
    _validate.between(where, 0.0, float("inf"), eps=eps, weight_decay=weight_decay, delta=delta)
    _validate.between(where, 0.0, 1.0, closed=True, wd_ratio=wd_ratio)
    if not isinstance(channel_axis, int) or isinstance(channel_axis, bool):
        raise ValueError(f"{where}: channel_axis must be an integer, got {channel_axis!r}")

    def init(params: PyTree) -> ScaleByAdampState:
        _validate.real_arrays(where, params=params)
        for leaf in jax.tree.leaves(params):
            if jnp.ndim(leaf) >= 2 and not -jnp.ndim(leaf) <= channel_axis < jnp.ndim(leaf):
                raise ValueError(
                    f"{where}: a parameter of shape {jnp.shape(leaf)} has no axis "
                    f"channel_axis={channel_axis}"
                )

        def zeros(p: Any) -> jax.Array:
            return jnp.zeros(jnp.shape(p), jnp.float32)

        return ScaleByAdampState(
            adamp_count=jnp.zeros((), jnp.int32),
            adamp_mu=jax.tree.map(zeros, params),
            adamp_nu=jax.tree.map(zeros, params),
        )

    def update(
        updates: PyTree, state: ScaleByAdampState, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByAdampState]:
        if params is None:
            raise ValueError(
                "scale_by_adamp projects along the parameters: call optimizer.update(gradient, "
                "state, params)"
            )
        decay_1, decay_2, epsilon, decay, bound, ratio = (
            jnp.asarray(x).astype(jnp.float32) for x in (b1, b2, eps, weight_decay, delta, wd_ratio)
        )
        count = optax.safe_increment(state.adamp_count)
        steps = count.astype(jnp.float32)
        correct_1, correct_2 = (1.0 - jnp.power(b, steps) for b in (decay_1, decay_2))

        def mean(old: jax.Array, new: jax.Array, b: jax.Array) -> jax.Array:
            return b * old + (1.0 - b) * new

        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        mu = jax.tree.map(lambda m, g: mean(m, g, decay_1), state.adamp_mu, gradients)
        nu = jax.tree.map(lambda v, g: mean(v, jnp.square(g), decay_2), state.adamp_nu, gradients)

        def direction(u: Any, g: jax.Array, m: jax.Array, v: jax.Array, p: jax.Array) -> jax.Array:
            w = p.astype(jnp.float32)
            ahead = mean(m, g, decay_1) if nesterov else m
            step = (ahead / correct_1) / (jnp.sqrt(v / correct_2) + epsilon)
            step, share = _project(step, g, w, bound, ratio, channel_axis)
            return (step + decay * share * w).astype(u.dtype)

        result = jax.tree.map(direction, updates, gradients, mu, nu, params)
        return result, ScaleByAdampState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: ArrayLike = 0.0,
    delta: ArrayLike = 0.1,
    wd_ratio: ArrayLike = 0.1,
    nesterov: bool = False,
    channel_axis: int = -1,
) -> optax.GradientTransformation:
    """AdamP: Adam that does not lengthen weights whose length has no meaning.

    w ← w − α (u + λ w) with u and the share of λ as in `scale_by_adamp`.

    Args:
      learning_rate: α, or a schedule over steps.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root.
      weight_decay: λ ≥ 0, decoupled: α λ w is subtracted.
      delta: δ ≥ 0, threshold of the cosine between weight and gradient.
      wd_ratio: share of the decay that scale-invariant weights get.
      nesterov: Nesterov's momentum.
      channel_axis: axis of the output channels: the last in Flax.

    Returns:
      A `GradientTransformation` whose `update` needs `params`. Under `optax.inject_hyperparams`
      nesterov and channel_axis belong to static_args.

    Raises:
      ValueError: as `scale_by_adamp`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = adamp(0.1)
      >>> w = jnp.array([1.0])
      >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(w), w)
      >>> round(float(optax.apply_updates(w, updates)[0]), 4)
      0.9

    Source: Heo et al. (2021), arXiv 2006.08217, algorithm 2.
    """
    options = dict(weight_decay=weight_decay, delta=delta, wd_ratio=wd_ratio)
    return optax.chain(
        scale_by_adamp(b1, b2, eps, nesterov=nesterov, channel_axis=channel_axis, **options),
        optax.scale_by_learning_rate(learning_rate),
    )


def _project(
    step: jax.Array, g: jax.Array, w: jax.Array, delta: jax.Array, ratio: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
    """The step without its radial part where a view says so, and the share of weight decay."""
    share = jnp.ones((), jnp.float32)
    if w.ndim < 2 or w.size == 0:
        return step, share
    done = jnp.zeros((), bool)
    channels = w.shape[axis]
    result = step
    for rows in (channels, 1):

        def view(x: jax.Array, rows: int = rows) -> jax.Array:
            return jnp.moveaxis(x, axis, 0).reshape(rows, -1)

        def unview(x: jax.Array) -> jax.Array:
            moved = (channels, *(n for i, n in enumerate(w.shape) if i != axis % w.ndim))
            return jnp.moveaxis(x.reshape(moved), 0, axis)

        gradient, weight = view(g), view(w)
        length = jnp.sqrt(jnp.sum(jnp.square(weight), axis=1, keepdims=True) + _TINY)
        size = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=1, keepdims=True) + _TINY)
        along = jnp.sum(gradient * weight, axis=1, keepdims=True)
        invariant = jnp.max(jnp.abs(along) / (length * size)) < delta / math.sqrt(weight.shape[1])
        unit = weight / length
        tangent = view(step) - unit * jnp.sum(unit * view(step), axis=1, keepdims=True)
        here = invariant & ~done
        result = jnp.where(here, unview(tangent), result)
        share = jnp.where(here, ratio, share)
        done |= invariant
    return result, share
