"""A step that is made or not, in place: the optimizer of a batch that may not be complete yet.

On a CPU `lax.cond` copies the optimizer state in either branch, and `where` computes an update only to
throw it away. A loop of one turn or none does neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax._axes import to_varying, varying_axes
from adabatch_jax._types import PyTree


def run_if(
    wanted: jax.Array,
    act: Callable[[jax.Array, PyTree], tuple[PyTree, PyTree]],
    like: PyTree,
    state: PyTree,
) -> tuple[PyTree, PyTree]:
    """`act(turn, state)` where `wanted`; else the state as it is, and updates without a meaning.

    Args:
      wanted: bool scalar, traced.
      act: `act(turn, state) -> (updates, state)`; what it reads besides must come by `unmoved`.
      like: arrays that nobody needs any more, in the structure of the updates. Where one has the type of
        its update, it takes the place of an update that is not made: zeros would have to be written.
      state: what `act` changes. It keeps its dtypes, as in `optax.MultiSteps`: of parameters of several
        dtypes some optimizers make a state of one, and of another with every further step.
    """
    updates, made = jax.eval_shape(act, jnp.zeros((), jnp.int32), state)
    needed: Any = jax.tree.structure(updates)
    alike = needed == jax.tree.structure(like)

    def room(shape: Any, x: Any) -> jax.Array:
        kind, given = jax.typeof(shape), jax.typeof(x)
        fits = alike and (kind.shape, kind.dtype) == (given.shape, given.dtype)
        fits = fits and kind.sharding == given.sharding and varying_axes(x) <= varying_axes(shape)
        unused = x if fits else jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
        return to_varying(jnp.asarray(unused), varying_axes(shape))

    def ready(x: Any, other: Any) -> jax.Array:
        return to_varying(jnp.asarray(x), varying_axes(other))

    def kept(x: Any, other: Any) -> jax.Array:
        """`x` in the type of `other`: the state keeps its types, whatever a step makes of them."""
        x = jnp.asarray(x)
        return to_varying(
            x if x.dtype == other.dtype else x.astype(other.dtype), varying_axes(other)
        )

    start = (
        jax.tree.map(room, updates, like if alike else updates),
        jax.tree.map(ready, state, made),
    )

    def turn(index: jax.Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        return jax.tree.map(kept, act(index, carry[1]), start)

    return jax.lax.fori_loop(0, wanted.astype(jnp.int32), turn, start)


def unmoved(tree: PyTree, turn: jax.Array) -> PyTree:
    """The same tree, but XLA believes that its arrays change with the turn.

    Otherwise it would compute before the loop what needs nothing else, the squares of a gradient say, and
    so in every call.
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = [
        i
        for i, x in enumerate(leaves)
        if isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    held, _ = jax.lax.optimization_barrier(([leaves[i] for i in arrays], turn))
    for i, x in zip(arrays, held, strict=True):
        leaves[i] = x
    return jax.tree.unflatten(structure, leaves)
