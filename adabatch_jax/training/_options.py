"""The options of the command: how they are spelled, which values they take, and common defaults."""

from __future__ import annotations

import functools
import typing
from typing import Any

FIRST_BATCH_SIZE, LARGEST_BATCH_SIZE = 16, 512


@functools.cache
def choices(config_class: type) -> dict[str, tuple[str, ...]]:
    """The fields of a configuration that are a `Literal`, or one or None: their values, in order."""
    found = {}
    for name, kind in typing.get_type_hints(config_class).items():
        for part in (kind, *typing.get_args(kind)):
            if typing.get_origin(part) is typing.Literal:
                found[name] = typing.get_args(part)
    return found


def spelled(name: str) -> str:
    """The field as the command spells it."""
    return "--" + name.replace("_", "-")


def flag(name: str, value: Any) -> dict[str, Any]:
    """The field for `_validate`, as the command spells it."""
    return {spelled(name): value}


def said(name: str, value: Any) -> str:
    """The option as it is given: --seed 3, --debias, --no-debias; --eta left out where it is None."""
    if value is None:
        return f"{spelled(name)} left out"
    if isinstance(value, bool):
        return spelled(name) if value else spelled(f"no_{name}")
    return f"{spelled(name)} {value}"
