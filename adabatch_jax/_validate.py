"""Checks of static arguments: a `ValueError` naming the argument and its value, before training starts.

Traced values (from `optax.inject_hyperparams`, or a factory called inside jit) are let through: they
are guarded where they are used.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp


def is_static(*values: Any) -> bool:
    """Whether every value can be checked now: none is an array or traced."""
    return not any(isinstance(value, jax.Array | jax.core.Tracer) for value in values)


def is_traced(value: Any) -> bool:
    """Whether a value is known only when the program runs; that of an array on the device can be read."""
    return isinstance(value, jax.core.Tracer)


def keywords(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The keywords that a factory takes by `**name`.

    `optax.inject_hyperparams` passes them as one argument, called `name`.
    """
    return {**given.get(name, {}), **{k: v for k, v in given.items() if k != name}}


def positive(where: str, **arguments: Any) -> None:
    """Every argument must be a finite number above 0."""
    for name, value in arguments.items():
        if is_static(value) and not (_is_number(value) and value > 0):
            raise ValueError(f"{where}: {name} must be a positive number, got {value!r}")


def positive_int(where: str, **arguments: Any) -> None:
    """Every argument must be an integer of at least 1."""
    for name, value in arguments.items():
        if is_static(value) and not (_is_number(value) and value == int(value) and value >= 1):
            raise ValueError(f"{where}: {name} must be a positive integer, got {value!r}")


def integer(where: str, name: str, value: SupportsIndex, low: int, high: int | None = None) -> int:
    """The value as a Python int, if it is an integer in [low, high)."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{where}: {name} must be an integer, got {value!r}") from None
    if number < low or (high is not None and number >= high):
        limit = f"be at least {low}" if high is None else f"lie in [{low}, {high})"
        raise ValueError(f"{where}: {name} must {limit}, got {number}")
    return number


def between(where: str, low: float, high: float, *, closed: bool = False, **arguments: Any) -> None:
    """Every argument must lie in [low, high), or in [low, high] with `closed`."""
    for name, value in arguments.items():
        inside = is_static(value) and _is_number(value) and low <= value <= high
        if is_static(value) and not (inside and (closed or value < high)):
            bracket = "]" if closed else ")"
            raise ValueError(f"{where}: {name} must lie in [{low}, {high}{bracket}, got {value!r}")


def one_of(where: str, choices: tuple[str, ...], **arguments: Any) -> None:
    """Every argument must be one of `choices`."""
    for name, value in arguments.items():
        if value not in choices:
            raise ValueError(f"{where}: {name} must be one of {', '.join(choices)}, got {value!r}")


def function(where: str, **arguments: Any) -> None:
    """Every argument must be callable."""
    for name, value in arguments.items():
        if not callable(value):
            raise ValueError(f"{where}: {name} must be callable, got {value!r}")


def arrays(where: str, **trees: Any) -> None:
    """Every leaf must be an array or a number."""
    for name, tree in trees.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            if not isinstance(leaf, numbers.Number) and not hasattr(leaf, "dtype"):
                raise ValueError(
                    f"{where}: {name}{jax.tree_util.keystr(path)} is no array but {leaf!r}: give the "
                    "trained arrays alone, and put the model together again inside the loss (Equinox: "
                    "eqx.partition(model, eqx.is_inexact_array), eqx.combine, or "
                    "adabatch_jax.integrations.equinox; Flax: nnx.split(model, nnx.Param, ...), nnx.merge)"
                )


def real_arrays(where: str, **trees: Any) -> None:
    """Every leaf must be an array (or number) of real floating-point numbers."""
    arrays(where, **trees)
    for name, tree in trees.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            place = name + jax.tree_util.keystr(path)
            dtype = jnp.result_type(leaf)
            if jnp.issubdtype(dtype, jnp.complexfloating):
                raise ValueError(
                    f"{where}: {place} is complex ({dtype}), and this is defined for real numbers: "
                    "keep real and imaginary part as two arrays"
                )
            if not jnp.issubdtype(dtype, jnp.floating):
                kind = "a PRNG key" if jnp.issubdtype(dtype, jax.dtypes.prng_key) else str(dtype)
                raise ValueError(
                    f"{where}: {place} is {kind}, and must be floating-point numbers: keep what is not "
                    "trained (keys, counters, buffers) outside, and let the loss close over it"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
