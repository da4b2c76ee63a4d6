"""Device axes: which values differ between devices, and how to say so to the type system.

Inside `jax.shard_map` with its varying check on, the gradient of a parameter that is the same on all
devices arrives already summed over them: every device then holds the same number, and the scatter
between devices reads zero. Casting the parameters to "varying" before differentiating keeps the
gradients apart. Under `jax.pmap`, and with the check off, there is nothing to cast.

On a mesh whose axes are `AxisType.Explicit`, the default of `jax.make_mesh`, the type of an array tells how
it is sharded, and what is mapped or multiplied together must agree. Elsewhere the type says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from adabatch_jax._types import AxisName, PyTree


def axis_tuple(axis_name: AxisName) -> tuple[str, ...]:
    """`axis_name` as a tuple of names: None is the empty one."""
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def varying_axes(tree: PyTree) -> frozenset[str]:
    """The axes over which any leaf of `tree` is typed as varying; empty where nothing is checked."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        try:
            kind = getattr(jax.typeof(leaf), "manual_axis_type", None)
        except TypeError:  # no array, but a static part of a model, say
            continue
        axes |= kind.varying if kind is not None else frozenset()
    return axes


def checked_axes(axis_name: AxisName) -> frozenset[str]:
    """The axes among `axis_name` for which shard_map's varying check is on."""
    return frozenset(a for a in axis_tuple(axis_name) if a in varying_axes(jax.lax.axis_index(a)))


def shared_axis(tree: PyTree, checked: frozenset[str]) -> str | None:
    """The first of the `checked` axes whose devices all hold the same `tree`; None if there is none."""
    return min(checked - varying_axes(tree), default=None)


def to_varying(tree: PyTree, axes: Iterable[str]) -> PyTree:
    """Casts every leaf to vary over `axes`, leaving alone the axes over which it already does."""
    wanted = frozenset(axes)

    def cast(x: Any) -> Any:
        missing = tuple(sorted(wanted - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if wanted else tree


def explicit_spec(x: Any) -> tuple[Any, ...]:
    """Mesh axes of type Explicit along each axis of `x`; empty where the type says nothing."""
    spec = tuple(getattr(jax.typeof(x).sharding, "spec", ()))
    return spec if any(axis is not None for axis in spec) else ()


def reshard(x: Any, mesh: Any, spec: Sequence[Any]) -> Any:
    """`x` with this sharding in its type; as it is if it has it already."""
    wanted = tuple(spec) if any(axis is not None for axis in spec) else ()
    if explicit_spec(x) == wanted:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def reshard_like(x: Any, like: Any) -> Any:
    """`x` sharded in its type as `like`, of the same shape, is."""
    spec = explicit_spec(like)
    return reshard(x, jax.typeof(like).sharding.mesh, spec) if spec else x
