"""`GradientNoise`: one result type for every way of measuring the noise in a gradient, and its merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax._axes import to_varying, varying_axes
from adabatch_jax._tree import abs_squared, align, cast_like, squared_norm, widen
from adabatch_jax._types import PyTree

UNMEASURED = -1.0  # in place of a scatter: no NaN, which jax_debug_nans would take for an accident


class GradientNoise(NamedTuple):
    """A mean gradient together with the scatter of the groups it was averaged from.

    Group j holds n_j examples whose mean gradient is ḡ_j; ḡ = Σ n_j ḡ_j / Σ n_j. For independent
    groups `scatter / (num_groups − 1)` is an unbiased estimate of tr Σ, the trace of the covariance
    of *one example's* gradient, whatever the n_j are. Per-example gradients are the case n_j = 1;
    micro-batches, devices and halves of a batch are others.

    Attributes:
      mean: ḡ, a pytree like the parameters, in their dtypes: the gradient to hand to the optimizer.
      scatter: Σ_j n_j ‖ḡ_j − ḡ‖², float32 scalar, in units of squared gradient × examples. Of complex
        gradients |ḡ_j − ḡ|² is both parts, so every scatter is real. −1, which no scatter can be, where it
        was not measured (`measure=False`): so are the others then, and every variance is NaN.
      num_examples: Σ_j n_j, int32 scalar: the examples behind `mean`, over all devices.
      num_groups: the number of groups with at least one example, int32 scalar.
      coordinate_scatter: Σ_j n_j (ḡ_j − ḡ)² coordinate by coordinate, a float32 pytree like `mean`,
        or None where it was not asked for.
      inner_product_scatter: Σ_j n_j (⟨ḡ_j, ḡ⟩ − ‖ḡ‖²)² with the inner product over the whole gradient
        vector, float32 scalar, or None where it was not asked for.

    Example:
      >>> import jax.numpy as jnp
      >>> noise = GradientNoise(mean={"w": jnp.array([1.0, 0.0])}, scatter=jnp.array(6.0),
      ...                       num_examples=jnp.array(8), num_groups=jnp.array(4))
      >>> float(noise.trace), float(noise.squared_norm)
      (2.0, 1.0)

    Source: Lau, Liu, Kolar (2024), arXiv 2402.11215, for the statistics; the unequal
    group sizes are the standard one-way analysis of variance.
    """

    mean: PyTree
    scatter: Any
    num_examples: Any
    num_groups: Any
    coordinate_scatter: PyTree | None = None
    inner_product_scatter: Any = None

    def variance(self, scatter: jax.Array) -> jax.Array:
        """`scatter / (num_groups − 1)`: NaN for fewer than two groups, or a scatter not measured."""
        groups = jnp.asarray(self.num_groups, jnp.float32)
        scatter = jnp.asarray(scatter, jnp.float32)
        with jax.debug_nans(False):  # NaN is an answer here, and no accident
            value = scatter / jnp.maximum(groups - 1.0, 1.0)
            return jnp.where((groups > 1.0) & ~(scatter < 0.0), value, jnp.nan)

    @property
    def trace(self) -> jax.Array:
        """tr Σ of one example's gradient, float32 scalar; NaN for fewer than two groups, or unmeasured."""
        return self.variance(self.scatter)

    @property
    def squared_norm(self) -> jax.Array:
        """‖ḡ‖², float32 scalar. Its expectation is ‖∇F‖² + tr Σ / num_examples."""
        return squared_norm(self.mean)


def _count(n: Any) -> jax.Array:
    return jnp.asarray(n).astype(jnp.float32)


def blend(
    n_a: jax.Array, a: PyTree, n_b: jax.Array, b: PyTree, gaps: PyTree | None = None
) -> PyTree:
    """The mean of n_a examples of mean `a` and n_b of mean `b`; a side without examples is ignored.

    With `gaps`, ‖a − b‖² leaf by leaf, each leaf waits for its number: where that is NaN so is the
    mean, as it is anyway. XLA could not tell otherwise that the old mean has been read before the new one
    takes its place, and would copy it, in every turn of a loop.
    """
    share = n_b / jnp.maximum(n_a + n_b, 1.0)

    def one(x: jax.Array, y: jax.Array, gap: jax.Array | None = None) -> jax.Array:
        part = share if gap is None else jnp.where(gap >= 0, share, jnp.nan)
        both = x + (y - x) * align(part, x)
        return jnp.where(align(n_b, x) == 0, x, jnp.where(align(n_a, x) == 0, y, both))

    return jax.tree.map(one, a, b) if gaps is None else jax.tree.map(one, a, b, gaps)


def merge_noise(a: GradientNoise, b: GradientNoise) -> GradientNoise:
    """The noise of two disjoint sets of groups taken together.

    `scatter = scatter_a + scatter_b + n_a n_b/(n_a + n_b) ‖ḡ_a − ḡ_b‖²`, the same coordinate by
    coordinate, and the counts add: associative and commutative to float32 rounding. No large sums
    are subtracted from each other. Inner products refer to the joint mean, which neither side knew,
    so they cannot be merged and become None; so does a coordinate scatter that one side lacks. A
    side without examples changes nothing, even if its numbers are NaN. A scatter that one side has not
    measured stays unmeasured.

    Args:
      a: noise of one set of groups.
      b: noise of another, with a mean of the same structure, shapes and dtypes.

    Returns:
      The noise of the union.

    Raises:
      ValueError: the two means differ in structure or in shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> one = lambda g: GradientNoise(jnp.array(g), jnp.array(0.0), jnp.array(1), jnp.array(1))
      >>> both = merge_noise(one([1.0, 0.0]), one([3.0, 0.0]))
      >>> both.mean.tolist(), float(both.trace)
      ([2.0, 0.0], 2.0)

    Source: Chan, Golub, LeVeque (1983), "Algorithms for computing the sample variance".
    """
    _check_same_shapes(a.mean, b.mean)
    return join_noise(a, b)


def squared_gaps(a: PyTree, b: PyTree) -> PyTree:
    """‖a − b‖² leaf by leaf."""
    return jax.tree.map(lambda x, y: squared_norm(x - y), a, b)


def join_noise(
    a: GradientNoise, b: GradientNoise, measure: Any = None, gaps: PyTree | None = None
) -> GradientNoise:
    """`merge_noise`, unchecked; where the traced `measure` is false, without the cost of the scatter.

    The scatter then is that of the two sides, too small, and to be thrown away. A coordinate scatter is
    merged whether or not. `gaps`: `squared_gaps` of the means, where the caller has them.
    """
    n_a, n_b = _count(a.num_examples), _count(b.num_examples)
    mean_a, mean_b = widen(a.mean), widen(b.mean)
    weight = n_a * (n_b / jnp.maximum(n_a + n_b, 1.0))

    def join(scatter_a: Any, scatter_b: Any, squared_gap: Any) -> jax.Array:
        gap = jnp.where(weight > 0, weight * squared_gap, 0.0)
        left = jnp.where(n_a > 0, scatter_a, jnp.zeros_like(scatter_a))
        right = jnp.where(n_b > 0, scatter_b, jnp.zeros_like(scatter_b))
        unknown = (left < 0) | (right < 0)  # a side whose scatter was not measured
        return jnp.where(unknown, UNMEASURED, left + right + gap).astype(jnp.float32)

    def zeros(a: PyTree, b: PyTree) -> PyTree:
        zero = 0.0 * weight  # under `vmap` one for every lane, as the other branch has
        return jax.tree.map(lambda x, y: to_varying(zero, varying_axes((x, y))), a, b)

    if gaps is None and measure is None:
        gaps = squared_gaps(mean_a, mean_b)
    elif gaps is None:
        gaps = jax.lax.cond(measure, squared_gaps, zeros, mean_a, mean_b)
    coordinate_scatter = None
    if a.coordinate_scatter is not None and b.coordinate_scatter is not None:
        coordinate_scatter = jax.tree.map(
            lambda x, y, m_a, m_b: join(x, y, abs_squared(m_a - m_b).astype(jnp.float32)),
            a.coordinate_scatter,
            b.coordinate_scatter,
            mean_a,
            mean_b,
        )
    squared_gap = sum(jax.tree.leaves(gaps), start=jnp.zeros((), jnp.float32))
    return GradientNoise(
        mean=cast_like(blend(n_a, mean_a, n_b, mean_b, gaps), a.mean),
        scatter=join(a.scatter, b.scatter, squared_gap),
        num_examples=jnp.asarray(a.num_examples) + jnp.asarray(b.num_examples),
        num_groups=jnp.asarray(a.num_groups) + jnp.asarray(b.num_groups),
        coordinate_scatter=coordinate_scatter,
    )


def unless_measured(noise: GradientNoise, measured: jax.Array) -> GradientNoise:
    """The same noise, with −1 for every scatter where it was not `measured`."""

    def known(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.where(measured, x, UNMEASURED), tree)

    return noise._replace(
        scatter=known(noise.scatter),
        coordinate_scatter=known(noise.coordinate_scatter),
        inner_product_scatter=known(noise.inner_product_scatter),
    )


def pool_noise(
    noise: GradientNoise, extra: jax.Array, total: Callable[[jax.Array], jax.Array]
) -> tuple[GradientNoise, jax.Array]:
    """Merges many noises at once: the lanes of a leading axis, or the devices of a mesh axis.

    `total` sums over what is merged: `x.sum(0)` for a leading axis (the counts then have shape
    [lanes]), `lax.psum` for devices. The same formula as `merge_noise`, arranged so that devices
    exchange what a data-parallel step exchanges anyway (the gradient and a few scalars beside the
    loss) and one scalar more. `extra` holds scalars to be averaged along, weighted by examples: the
    loss. It has one axis more than the counts.

    Returns:
      The pooled noise (mean and scatters still wide) and the weighted mean of `extra`.
    """
    examples = jnp.asarray(noise.num_examples, jnp.int32)
    n = _count(examples)
    # Two words, so that the float32 sum of the counts stays exact beyond 2**24 examples.
    counts = jnp.stack([examples // 4096, examples % 4096, noise.num_groups], axis=-1)
    weighted = jnp.where(align(n, extra) > 0, align(n, extra) * extra, 0.0)
    scalars = total(jnp.concatenate([_count(counts), weighted.astype(jnp.float32)], axis=-1))
    high, low, num_groups = (scalars[i].astype(jnp.int32) for i in range(3))
    num_examples = high * 4096 + low
    all_n = jnp.maximum(_count(num_examples), 1.0)

    def average(x: jax.Array) -> jax.Array:
        return total(jnp.where(align(n, x) > 0, align(n, x) * x, 0)) / all_n.astype(x.dtype)

    def join(scatter: Any, squared_gap: Any) -> jax.Array:
        own = scatter + align(n, squared_gap) * squared_gap
        return total(jnp.where(align(n, squared_gap) > 0, own, 0.0))

    mean = jax.tree.map(average, noise.mean)
    gap = jax.tree.map(lambda x, m: x - (m[None] if n.ndim else m), noise.mean, mean)
    coordinate_scatter = noise.coordinate_scatter
    if coordinate_scatter is not None:
        coordinate_scatter = jax.tree.map(
            lambda c, d: join(c, abs_squared(d).astype(jnp.float32)), coordinate_scatter, gap
        )
    pooled = GradientNoise(
        mean=mean,
        scatter=join(noise.scatter, squared_norm(gap, batch_ndim=n.ndim)),
        num_examples=num_examples,
        num_groups=num_groups,
        coordinate_scatter=coordinate_scatter,
    )
    return pooled, scalars[3:] / all_n


def _check_same_shapes(a: PyTree, b: PyTree) -> None:
    shapes_a, shapes_b = (jax.tree.map(jnp.shape, tree) for tree in (a, b))
    if shapes_a != shapes_b:
        raise ValueError(
            f"merge_noise: the two means differ in structure or shapes: {shapes_a} and {shapes_b}"
        )
