"""Auxiliary data of a loss over groups: what is averaged, what is added up, and what is one group's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax._tree import wide
from adabatch_jax._types import PyTree
from adabatch_jax.noise._arguments import as_bools, to_arrays

Parts = tuple[list[jax.Array], list[jax.Array], list[jax.Array]]


def split_aux(where: str, aux: PyTree, sum_aux: PyTree) -> Parts:
    """The leaves that are averaged, those that are added up, and those of which one group's are taken."""
    leaves = jax.tree.leaves(to_arrays(where, "aux", aux))
    kinds = _kinds(where, aux, sum_aux)
    averaged, summed, taken = (
        [x for x, k in zip(leaves, kinds, strict=True) if k == kind]
        for kind in ("averaged", "summed", "taken")
    )
    # Keys have no arithmetic, and small integers no room for a sum.
    taken = [jax.random.key_data(x) if _is_typed_key(x) else x for x in taken]
    return averaged, [x.astype(_sum_dtype(x.dtype)) for x in summed], taken


def join_aux(where: str, shape: PyTree, sum_aux: PyTree, parts: Parts) -> PyTree:
    """What `split_aux` took apart; `shape` is that of aux. Float leaves come back in their own dtype."""
    given = dict(zip(("averaged", "summed", "taken"), map(iter, parts), strict=True))

    def whole(kind: str, s: Any) -> jax.Array:
        x = next(given[kind])
        if _is_typed_key(s):
            return jax.random.wrap_key_data(x, impl=jax.random.key_impl(jnp.empty((), s.dtype)))
        return x.astype(s.dtype) if jnp.issubdtype(s.dtype, jnp.inexact) else x

    leaves, structure = jax.tree.flatten(shape)
    kinds = _kinds(where, shape, sum_aux)
    return jax.tree.unflatten(structure, [whole(*x) for x in zip(kinds, leaves, strict=True)])


def _kinds(where: str, aux: PyTree, sum_aux: PyTree) -> list[str]:
    marked = as_bools(where, "sum_aux", sum_aux, aux, "aux")
    return [
        _kind(jnp.asarray(x) if not hasattr(x, "dtype") else x, m)
        for x, m in zip(jax.tree.leaves(aux), marked, strict=True)
    ]


def _kind(x: Any, marked: bool) -> str:
    raw_key = x.dtype == jnp.uint32 and x.shape[-1:] == (2,)
    if raw_key or _is_typed_key(x):
        return "taken"
    if marked:
        return "summed"
    return "averaged" if jnp.issubdtype(x.dtype, jnp.inexact) else "taken"


def _is_typed_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _sum_dtype(dtype: Any) -> Any:
    """Room for a sum: at least float32 or int32; booleans count as 0 and 1."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return wide(dtype)
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.int32
