"""Groups: how a batch is split, and how many examples each group holds."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from adabatch_jax import _validate
from adabatch_jax._axes import explicit_spec
from adabatch_jax._types import PyTree


def split_groups(batch: PyTree, num_groups: int) -> PyTree:
    """Splits a batch into equal groups: [B, …] → [num_groups, B / num_groups, …], rows in order.

    Args:
      batch: pytree of arrays with one leading axis of B examples (typed PRNG keys included).
      num_groups: number of groups, a Python int that divides B.

    Returns:
      A pytree of the same structure; group 0 holds the first B / num_groups rows.

    Raises:
      ValueError: `num_groups` is not positive, does not divide B, or the leaves disagree about B.

    Example:
      >>> import jax.numpy as jnp
      >>> split_groups(jnp.arange(6), 3).tolist()
      [[0, 1], [2, 3], [4, 5]]
    """
    _validate.positive_int("split_groups", num_groups=num_groups)
    num_groups = int(num_groups)
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(
            f"split_groups: every leaf of batch needs the same leading axis, got shapes {shapes}"
        )
    size = shapes[0][0]
    if size % num_groups:
        raise ValueError(f"split_groups: num_groups={num_groups} does not divide batch size {size}")
    return jax.tree.map(lambda x: _split(x, num_groups, size // num_groups), batch)


def _split(x: Any, number: int, size: int) -> Any:
    shape = (number, size, *x.shape[1:])
    if not (spec := explicit_spec(x)) or spec[0] is None:
        return x.reshape(shape)
    # A mesh with Explicit axes wants to be told where the devices go: to the groups if they divide them.
    axes, mesh = spec[0], jax.typeof(x).sharding.mesh
    devices = math.prod(mesh.shape[a] for a in (axes if isinstance(axes, tuple) else (axes,)))
    by_group, by_row = (axes, None), (None, axes if size % devices == 0 else None)
    leading = by_group if number % devices == 0 else by_row
    sharding = NamedSharding(mesh, PartitionSpec(*leading, *spec[1:]))
    return jax.lax.reshape(x, shape, out_sharding=sharding)


def leading_shape(groups: PyTree, ndim: int) -> tuple[int, ...]:
    """The first `ndim` axes, which all leaves of `groups` share: [num_groups] or [loops, lanes]."""
    leaves = jax.tree.leaves(groups)
    if not leaves:
        raise ValueError("value_and_grad_noise: groups has no leaves")
    shapes = {tuple(jnp.shape(x)[:ndim]) for x in leaves}
    if len(shapes) != 1 or len(next(iter(shapes))) != ndim:
        what = "[num_groups]" if ndim == 1 else "[num_loops, num_lanes]"
        raise ValueError(
            f"value_and_grad_noise: every leaf of groups needs the same leading axes {what}, "
            f"got {sorted(shapes)}"
        )
    leading = shapes.pop()
    if 0 in leading:
        raise ValueError(f"value_and_grad_noise: groups is empty: its leading axes are {leading}")
    return leading


def group_sizes(groups: PyTree, sizes: Any, leading: tuple[int, ...]) -> jax.Array:
    """Examples in each group, int32 of shape `leading`: as given, or the axis after the leading ones.

    PRNG keys have no example axis and are passed over. Anything else without one is refused rather
    than guessed at: a group of one example *without* its axis of length 1 would otherwise have its
    features counted as examples.
    """
    if sizes is not None:
        if jnp.shape(sizes) != leading:
            raise ValueError(
                f"value_and_grad_noise: sizes must have shape {leading}, got {jnp.shape(sizes)}"
            )
        return jnp.maximum(jnp.asarray(sizes).astype(jnp.int32), 0)
    ndim = len(leading)
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(groups)]
    shapes = [x.shape for x in leaves if not is_key(x, ndim)] or [x.shape for x in leaves]
    lengths = {shape[ndim : ndim + 1] for shape in shapes}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            "value_and_grad_noise: the leaves of groups do not agree on a number of examples per "
            f"group (shapes {shapes}): pass sizes=, an integer array of shape {leading}, "
            "or give each group an axis of examples"
        )
    return jnp.full(leading, lengths.pop()[0], jnp.int32)


def is_key(x: jax.Array, ndim: int) -> bool:
    """A typed PRNG key per group, or a raw one: uint32 pairs."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return True
    return x.dtype == jnp.uint32 and x.shape[ndim:] == (2,)
