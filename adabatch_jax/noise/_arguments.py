"""What an estimator is given: arrays, the parameters that are trained, and what the loss returns."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax._axes import explicit_spec
from adabatch_jax._types import PyTree
from adabatch_jax.noise._groups import is_key

_NNX = (
    "an nnx model goes straight into adabatch_jax.integrations.nnx.value_and_grad_noise. Or take its "
    "parameters alone, `graphdef, params, rest = nnx.split(model, nnx.Param, ...)`, and put it together in "
    "the loss, `nnx.merge(graphdef, params, rest, copy=True)`"
)


class Parameters(NamedTuple):
    """Parameters taken apart: the trained ones, by which the loss is differentiated, and the frozen ones.

    `marks` says of every leaf whether it is trained; None: all are, and `trained` is the tree itself.
    """

    trained: PyTree
    frozen: list[jax.Array]
    structure: Any
    marks: list[bool] | None

    def whole(self, trained: PyTree) -> PyTree:
        """The tree that the loss takes."""
        return self._join(trained, self.frozen)

    def filled(self, trained: PyTree, dtype: Any = None) -> PyTree:
        """The same tree, with zeros for what is frozen."""
        return self._join(trained, [jnp.zeros_like(p, dtype) for p in self.frozen])

    def _join(self, trained: PyTree, frozen: list[jax.Array]) -> PyTree:
        if self.marks is None or trained is None:
            return trained
        own, others = iter(trained), iter(frozen)
        leaves = [next(own if mark else others) for mark in self.marks]
        return jax.tree.unflatten(self.structure, leaves)


def take_apart(where: str, params: PyTree, trained: PyTree) -> Parameters:
    """Parameters as arrays, taken apart by `trained`, a prefix of bools or None; integers are refused."""
    params = to_arrays(where, "params", params)
    paths, structure = jax.tree.flatten_with_path(params)
    marks = as_bools(where, "trained", True if trained is None else trained, params, "params")
    for (path, leaf), mark in zip(paths, marks, strict=True):
        if mark and not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"{where}: params{jax.tree_util.keystr(path)} is {leaf.dtype}, which has no gradient: "
                "close over it, hand it to the loss as a further argument, or mark it with "
                f"trained=False; {_NNX}"
            )
    if trained is None:
        return Parameters(params, [], structure, None)
    own = [p for (_, p), mark in zip(paths, marks, strict=True) if mark]
    frozen = [p for (_, p), mark in zip(paths, marks, strict=True) if not mark]
    return Parameters(own, frozen, structure, marks)


def as_bools(where: str, name: str, marks: PyTree, tree: PyTree, of: str) -> list[bool]:
    """One bool for every leaf of `tree`, from a pytree of bools like it, or a prefix of one."""
    check_bools(where, name, marks)
    try:
        return [bool(mark) for mark in jax.tree.leaves(jax.tree.broadcast(marks, tree))]
    except ValueError as error:
        raise ValueError(
            f"{where}: {name} must be a bool or a pytree of bools like {of}, or a prefix of it: "
            f"{jax.tree.structure(marks)} is none of {jax.tree.structure(tree)}"
        ) from error


def check_bools(where: str, name: str, marks: PyTree) -> None:
    """Every leaf is a Python or NumPy bool: what is traced cannot choose what is computed."""
    other = [mark for mark in jax.tree.leaves(marks) if not isinstance(mark, bool | np.bool_)]
    if other:
        raise ValueError(f"{where}: {name} must hold bools, True or False, got {other[0]!r}")


def to_arrays(where: str, name: str, tree: PyTree) -> PyTree:
    """Every leaf as an array, or a sentence about one that is none."""

    def one(path: Any, leaf: Any) -> jax.Array:
        try:
            return jnp.asarray(leaf)
        except (TypeError, ValueError) as error:  # the latter for a string
            raise ValueError(
                f"{where}: {name}{jax.tree_util.keystr(path)} is no array but {leaf!r}: hand in the arrays "
                "alone and close over the rest, as in `arrays, static = eqx.partition(model, "
                "eqx.is_inexact_array)` with `eqx.combine(arrays, static)` inside the loss, or let "
                "adabatch_jax.integrations.equinox.value_and_grad_noise do so"
            ) from error

    return jax.tree.map_with_path(one, tree)


def check_in_turn(where: str, groups: PyTree) -> None:
    """Groups that go one after the other are not sharded along their first axis."""
    for x in jax.tree.leaves(groups):
        if (explicit_spec(x) or (None,))[0] is not None:
            raise ValueError(
                f"{where}: groups is sharded over the Explicit mesh axis {explicit_spec(x)[0]!r} along its "
                "first axis, along which groups go one after the other: shard the examples of each group "
                "(axis 1), or for value_and_grad_noise(..., lanes=True) the lanes (axis 1 of [num_loops, "
                "num_lanes, …]), or make the mesh with AxisType.Auto"
            )


def warn_of_shared_keys(where: str, args: tuple[Any, ...]) -> None:
    """A PRNG key among the further arguments of the loss is the same in every group."""
    for path, x in jax.tree.leaves_with_path(args):
        if isinstance(x, jax.Array | np.ndarray) and is_key(jnp.asarray(x), 0):
            warnings.warn(
                f"{where}: args{jax.tree_util.keystr(path)} is a PRNG key, the same in every group: what "
                "is drawn from it, such as dropout, repeats in every group, and its noise is not seen. "
                "Give each group a key of its own as a leaf of groups: (groups, jax.random.split(key, "
                "num_groups))",
                stacklevel=4,  # whoever calls the function that an estimator returned
            )
            return


def taken_apart_loss(where: str, name: str, out: Any, has_aux: bool) -> tuple[Any, PyTree]:
    """Loss and auxiliary data, None without `has_aux`."""
    pair = isinstance(out, tuple | list) and len(out) == 2
    if has_aux and not pair:
        raise ValueError(
            f"{where}: with has_aux=True {name} must return (loss, aux), got {type(out)}"
        )
    value, aux = out if has_aux else (out, None)
    if isinstance(value, tuple | list | dict):
        hint = "" if has_aux else "; for (loss, aux) pass has_aux=True"
        raise ValueError(f"{where}: {name} must return one array, got {type(value)}{hint}")
    return value, aux


def check_scalar(where: str, value: Any) -> None:
    """A loss is one real number."""
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        remedy = "the mean over the group (jnp.mean)" if shape else "a real number (jnp.real)"
        raise ValueError(
            f"{where}: loss_fn must return a real floating-point scalar, {remedy}, got "
            f"{jnp.dtype(dtype).name}{list(shape)}"
        )


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Adds a sentence to the error of an nnx model that is changed inside the loops over groups."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "TraceContextError":
            error.add_note(f"{where}: the loss is traced in a loop over groups; {_NNX}")
        raise
