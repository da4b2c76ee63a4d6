"""Writes API.md: every public name, by room, with the first line of its docstring.

python tests/api_index.py writes it; tests/test_api_index.py compares it with the docstrings.
"""

from __future__ import annotations

import importlib
import inspect
import pathlib
import typing

import adabatch_jax
import adabatch_jax.training

PATH = pathlib.Path(__file__).parents[1] / "API.md"
ROOMS = ("noise", "batch_size", "curvature", "learning_rate", "optimizers", "training")
ROOMS += ("integrations.flax", "integrations.nnx", "integrations.equinox")
HEAD = """# Public names

Written by `python tests/api_index.py` from the docstrings; `help(name)` shows all of one: formula,
arguments, example, source. Names marked * are those that a user needs first: `import adabatch_jax as
adabatch` has them. The others are found in their room, as `adabatch.curvature.top_eigenvector`.
"""


def first_line(room: str, name: str) -> str:
    """The docstring's first line; a name without one of its own says so as a ValueError."""
    thing = getattr(importlib.import_module(f"adabatch_jax.{room}"), name)
    doc = inspect.cleandoc(thing.__doc__ or "")
    if not doc or doc.startswith(f"{name}("):  # what dataclasses and NamedTuples make up
        raise ValueError(f"adabatch_jax.{room}.{name} has no docstring of its own")
    return doc.splitlines()[0]


def shown(room: str, name: str) -> str:
    """`name(arguments)` without defaults; a type alone as its name."""
    thing = getattr(importlib.import_module(f"adabatch_jax.{room}"), name)
    in_facade = name in adabatch_jax.__all__ and thing is getattr(adabatch_jax, name)
    first = " *" if in_facade else ""
    if inspect.isclass(thing):
        return f"`{name}`{first}"
    parts, starred = [], False
    for parameter in inspect.signature(thing).parameters.values():
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(
            parameter.kind, ""
        )
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("…")
            break
        starred |= prefix == "*"
        parts.append(prefix + parameter.name)
    return f"`{name}({', '.join(parts)})`{first}"


def index() -> str:
    """All of API.md."""
    lines, missing = [HEAD], set(adabatch_jax.__all__)
    for room in ROOMS:
        module = importlib.import_module(f"adabatch_jax.{room}")
        missing -= set(module.__all__)
        guide = inspect.cleandoc(typing.cast(str, module.__doc__)).splitlines()[0]
        lines += [f"## `{room}`", "", guide, "", "| name | gives |", "|---|---|"]
        for name in module.__all__:
            summary = first_line(room, name).replace("|", "\\|")
            lines.append(f"| {shown(room, name)} | {summary} |")
        lines.append("")
    if missing:
        raise ValueError(f"in no room of {ROOMS}: {sorted(missing)}")
    return "\n".join(lines)


if __name__ == "__main__":
    PATH.write_text(index(), encoding="utf-8")
    print(PATH)
