"""How the search for a learning rate went: numbers for the summary, and words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adabatch_jax import SmoothedLosses, WarmupEnd

_FOUND = (WarmupEnd.MINIMUM_PASSED, WarmupEnd.DIVERGED)  # where the state does not say by itself
NOT_SEARCHED = "NOT_SEARCHED"  # why a warm-up "ended" that a run was too short for


def describe_warmup(shown: Mapping[str, Any], smoothed: SmoothedLosses) -> dict[str, Any]:
    """How AutoWU's warm-up went.

    Args:
      shown: `adabatch_jax.metrics` of the run's last state.
      smoothed: what AutoWU saw.

    Returns:
      Why it `ended`, whether a `minimum_found` of the loss decided about the rate, after how many
      `examples`, the `peak_learning_rate`, `tests` and `setbacks`.
    """
    end = WarmupEnd(int(shown["warmup_end"]))
    return {
        "ended": end.name,
        "minimum_found": bool(shown.get("minimum_found", end in _FOUND)),
        "examples": smoothed.end,
        "peak_learning_rate": float(shown["peak_learning_rate"]),
        "tests": int(shown["tests_made"]),
        "setbacks": int(shown["setbacks"]),
    }


def no_warmup(learning_rate: float) -> dict[str, Any]:
    """The same of a run that was too short to search, and took this rate."""
    return {
        "ended": NOT_SEARCHED,
        "minimum_found": False,
        "examples": 0,
        "peak_learning_rate": learning_rate,
        "tests": 0,
        "setbacks": 0,
    }


def tell_warmup(warmup: Mapping[str, Any]) -> str:
    """What came of it, in a line.

    Example:
      >>> tell_warmup(no_warmup(0.02))
      'no minimum of the loss was found, the run is too short to search: peak learning rate 0.02, a default'
    """
    rate = f"peak learning rate {warmup['peak_learning_rate']:.2g}"
    if warmup["ended"] == NOT_SEARCHED:
        short = "no minimum of the loss was found, the run is too short to search"
        return f"{short}: {rate}, a default"
    reason = warmup["ended"].lower().replace("_", " ")
    halved = f"; halved {warmup['setbacks']} × after setbacks" if warmup["setbacks"] else ""
    examples = f"{warmup['examples']:.0f} examples"
    if warmup["minimum_found"]:
        return f"{rate}, found in {examples} ({reason}{halved})"
    return (
        f"no minimum of the loss was found in the {examples} of the warm-up ({reason}{halved}): {rate} may "
        "be far from the best, a longer run would tell more"
    )


def note_warmup(warmup: Mapping[str, Any] | None) -> str:
    """The same for a picture, which shows the rest: nothing where all went well, or nothing was sought."""
    if warmup is None or warmup["minimum_found"]:
        return ""
    if warmup["ended"] == NOT_SEARCHED:
        return "too short to search for a rate: a default"
    return "no minimum of the loss was found"
