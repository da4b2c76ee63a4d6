"""Small tools for pytrees; reductions are in float32 whatever the dtype of the leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax._types import PyTree


def wide(dtype: Any) -> Any:
    """The dtype in which statistics of `dtype` are kept: at least float32; complex numbers stay complex."""
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    return dtype if inexact and jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def widen(tree: PyTree) -> PyTree:
    """Casts every leaf to at least float32."""
    return jax.tree.map(lambda x: jnp.asarray(x).astype(wide(jnp.asarray(x).dtype)), tree)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Casts every leaf to the dtype of its partner in `like`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def scale(tree: PyTree, factor: jax.Array) -> PyTree:
    """`tree` times a float32 number, rounded once: float16 would make 1e-8 zero and 1e5 infinite."""
    wide = jax.tree.map(lambda x: x * factor.astype(x.dtype), widen(tree))
    return cast_like(wide, tree)


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Σ a·b over all entries of two real trees, float32.

    A sum of products, not `optax.tree.vdot`: on a TPU a dot product of float32 is one of bfloat16, and a
    dot product flattens its operands, which gathers what is sharded.
    """
    total = jnp.zeros((), jnp.float32)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        total = total + jnp.sum(x * y).astype(jnp.float32)
    return total


def align(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Gives `weight` the dtype of `x`, and trailing axes so that it broadcasts against `x`."""
    return jnp.expand_dims(weight, range(weight.ndim, x.ndim)).astype(x.dtype)


def abs_squared(x: jax.Array) -> jax.Array:
    """|x|² entry by entry, real: of a complex number both parts."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.square(jnp.real(x)) + jnp.square(jnp.imag(x))
    return jnp.square(x)


def squared_norm(tree: PyTree, batch_ndim: int = 0) -> jax.Array:
    """‖tree‖² in float32, summed over all axes but the first `batch_ndim`."""
    total = jnp.zeros((1,) * batch_ndim, jnp.float32)
    for x in jax.tree.leaves(widen(tree)):
        square = abs_squared(x)
        total = total + jnp.sum(square, axis=range(batch_ndim, x.ndim)).astype(jnp.float32)
    return total


def trainable(square: jax.Array) -> jax.Array:
    """Whether a gradient with this squared norm may be learned from: below 1e30, so neither NaN nor inf.

    Longer ones explode without overflowing yet. A few of them would make AdaGrad's sum of squares
    infinite, and every update after that 0, without a word.
    """
    return jnp.sqrt(square) < 1e15


def of_structure(function: Callable[[PyTree], Any]) -> Callable[[PyTree], Any]:
    """The function, called once for every structure of its tree, with shapes and dtypes alone."""

    @functools.cache
    def known(structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
        return function(jax.tree.unflatten(structure, shapes))

    def call(tree: PyTree) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        shapes = (jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)) for p in leaves)
        return known(structure, tuple(shapes))

    return call
