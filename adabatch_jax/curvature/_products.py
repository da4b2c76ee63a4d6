"""Products of a curvature matrix and a vector, without the matrix.

What comes back is a pytree with parameters and batch as leaves, so it can be an argument of a jitted
function. In a closure they would be constants, which XLA spends seconds on folding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._axes import axis_tuple, checked_axes, to_varying, varying_axes
from adabatch_jax._tree import widen
from adabatch_jax._types import AxisName, LossFn, PyTree

Linear = Callable[[PyTree], PyTree]
_STATIC = {"static": True}


@dataclass(frozen=True)
class _Hessian:
    """Forward over reverse: the derivative of the gradient along the vector."""

    loss_fn: LossFn

    def at(self, params: PyTree, batch: tuple[PyTree, ...]) -> Linear:
        return jax.linearize(lambda p: jax.grad(self.loss_fn)(p, *batch), params)[1]


@dataclass(frozen=True)
class _GaussNewton:
    """Forward through the model, the Hessian of the loss in the outputs, and back."""

    model_fn: Callable[..., PyTree]
    loss_fn: LossFn

    def at(self, params: PyTree, batch: tuple[PyTree, ...]) -> Linear:
        inputs, *targets = batch
        outputs, forward = jax.linearize(lambda p: self.model_fn(p, inputs), params)
        backward = jax.linear_transpose(forward, params)
        middle = jax.linearize(lambda z: jax.grad(self.loss_fn)(z, *targets), outputs)[1]
        return lambda vector: backward(middle(forward(vector)))[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CurvatureProduct:
    """A symmetric matrix as a function: a pytree like the parameters → the product, at least float32.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> product = hessian_vector_product(lambda w: 1.5 * jnp.sum(w**2), jnp.ones(2))
      >>> jax.jit(lambda operator, v: operator(v))(product, jnp.ones(2)).tolist()
      [3.0, 3.0]

    Source: see `hessian_vector_product` and `gauss_newton_vector_product`.
    """

    matrix: _Hessian | _GaussNewton = field(metadata=_STATIC)
    axes: tuple[str, ...] = field(metadata=_STATIC)
    params: PyTree
    batch: tuple[PyTree, ...]
    count: jax.Array | None

    def __call__(self, vector: PyTree) -> PyTree:
        """The product with one vector."""
        return _apply(self, vector)

    def linear(self) -> Linear:
        """The product as a function that shares, between vectors, what depends on none of them."""
        checked = checked_axes(self.axes)
        params = to_varying(self.params, checked)

        def tangent(vector: PyTree) -> PyTree:
            like = jax.tree.map(
                lambda v, p: jnp.asarray(v).astype(jnp.result_type(p)), vector, params
            )
            return to_varying(like, checked)

        if self.count is None:
            whole = self.matrix.at(params, self.batch)

            def product(vector: PyTree) -> PyTree:
                result = widen(whole(tangent(vector)))
                return jax.lax.pmean(result, self.axes) if self.axes else result

            return product

        num_allocated = jax.tree.leaves(self.batch)[0].shape[0]
        count = jnp.clip(jnp.asarray(self.count, jnp.int32), 0, num_allocated)

        def accumulated(vector: PyTree) -> PyTree:
            vector = tangent(vector)

            def add(i: jax.Array, total: PyTree) -> PyTree:
                micro_batch = jax.tree.map(lambda x: jnp.asarray(x)[i], self.batch)
                part = self.matrix.at(params, micro_batch)(vector)
                return jax.tree.map(jnp.add, total, widen(part))

            varying = checked | varying_axes((params, self.batch, vector, count))
            zeros = to_varying(jax.tree.map(jnp.zeros_like, widen(vector)), varying)
            total, num = jax.lax.fori_loop(0, count, add, zeros), count
            if self.axes:
                total, num = jax.lax.psum((total, num), self.axes)
            return jax.tree.map(lambda x: x / jnp.maximum(num, 1).astype(x.dtype), total)

        return accumulated


@jax.jit
def _apply(product: CurvatureProduct, vector: PyTree) -> PyTree:
    return product.linear()(vector)


def hessian_vector_product(
    loss_fn: LossFn,
    params: PyTree,
    *batch: PyTree,
    count: Any = None,
    axis_name: AxisName = None,
) -> CurvatureProduct:
    """The Hessian of a loss as a function: v ↦ H v, H = ∇² loss(params).

    Forward over reverse, d/dε ∇loss(params + ε v). With `count` the micro-batches pass one after the
    other: peak memory is that of one of them, and one compilation serves every count. Weight decay
    counts only if it is in the loss. Dropout and batch statistics must be frozen in `loss_fn`.

    Args:
      loss_fn: (params, *batch) → scalar, the mean loss. Flax: `lambda p, x, y: loss(model.apply({"params":
        p}, x), y)` for linen, `nnx.merge(graphdef, p, rest)` inside for nnx.
      params: pytree of floating-point arrays.
      *batch: pytrees; with `count` every leaf has a leading axis of micro-batches of equal size.
      count: int, may be traced: only the first so many micro-batches are used; none gives zeros.
      axis_name: device axes over which the product is averaged (by count), in pmap and shard_map.

    Returns:
      A function (and pytree: pass it to jitted functions as an argument) from a pytree like `params` to
      one of at least float32; products inside the model keep its own precision.

    Raises:
      ValueError: `loss_fn` is not callable; a leaf of `params` is no array of real floating-point numbers;
        leaves disagree on the number of micro-batches.

    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.diag(jnp.array([3.0, 1.0]))
      >>> product = hessian_vector_product(lambda w, a: 0.5 * w @ a @ w, jnp.ones(2), a)
      >>> product(jnp.array([1.0, 2.0])).tolist()
      [3.0, 2.0]

    Source: Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """
    where = "hessian_vector_product"
    _validate.function(where, loss_fn=loss_fn)
    _validate.real_arrays(where, params=params)
    _check_micro_batches(where, batch, count)
    return CurvatureProduct(_Hessian(loss_fn), axis_tuple(axis_name), params, batch, count)


def gauss_newton_vector_product(
    model_fn: Callable[..., PyTree],
    loss_fn: LossFn,
    params: PyTree,
    *batch: PyTree,
    count: Any = None,
    axis_name: AxisName = None,
) -> CurvatureProduct:
    """The generalised Gauss-Newton matrix as a function: v ↦ Jᵀ (∇²_z loss) J v.

    J is the Jacobian of the outputs z in the parameters. For a loss convex in z, such as the
    cross-entropy, the matrix is positive semi-definite.

    Args:
      model_fn: (params, inputs) → outputs z, a pytree.
      loss_fn: (z, *targets) → scalar, the mean loss.
      params: pytree of floating-point arrays.
      *batch: inputs, then targets: pytrees; with `count` as in `hessian_vector_product`.
      count: int, may be traced: how many micro-batches.
      axis_name: device axes over which the product is averaged.

    Returns:
      A function and pytree, as from `hessian_vector_product`.

    Raises:
      ValueError: a function is not callable; no inputs; a leaf of `params` is no array of real
        floating-point numbers; leaves disagree on the number of micro-batches.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros(2)
      >>> product = gauss_newton_vector_product(
      ...     lambda w, x: x @ w, lambda z, y: 0.5 * jnp.mean((z - y) ** 2), jnp.ones(2), x, y)
      >>> product(jnp.ones(2)).tolist()  # xᵀx / 2
      [0.5, 2.0]

    Source: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
    """
    where = "gauss_newton_vector_product"
    _validate.function(where, model_fn=model_fn, loss_fn=loss_fn)
    _validate.real_arrays(where, params=params)
    if not batch:
        raise ValueError(f"{where}: batch must start with the inputs, got nothing")
    _check_micro_batches(where, batch, count)
    matrix = _GaussNewton(model_fn, loss_fn)
    return CurvatureProduct(matrix, axis_tuple(axis_name), params, batch, count)


def _check_micro_batches(where: str, batch: tuple[PyTree, ...], count: Any) -> None:
    if count is None:
        return
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    if not shapes or not all(shapes) or len({s[0] for s in shapes}) > 1:
        raise ValueError(
            f"{where}: with count, all leaves of batch need the same leading axis, got shapes {shapes}"
        )
