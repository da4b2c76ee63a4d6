"""How the search for a learning rate went: numbers for the summary, and words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adabatch_jax import WarmupEnd
from adabatch_jax.learning_rate import SmoothedLosses


def describe_warmup(shown: Mapping[str, Any], smoothed: SmoothedLosses) -> dict[str, Any]:
    """How AutoWU's warm-up went.

    Args:
      shown: `adabatch_jax.metrics` of the run's last state.
      smoothed: what AutoWU saw.

    Returns:
      Why it `ended`, whether a `minimum_found` of the loss decided about the rate, after how many
      `examples`, the `peak_learning_rate`, `tests` and `setbacks`.
    """
    return {
        "ended": WarmupEnd(int(shown["warmup_end"])).name,
        "minimum_found": bool(shown["minimum_found"]),
        "examples": smoothed.end,
        "peak_learning_rate": float(shown["peak_learning_rate"]),
        "tests": int(shown["tests_made"]),
        "setbacks": int(shown["setbacks"]),
    }


def was_searched(warmup: Mapping[str, Any]) -> bool:
    """Whether there was a warm-up at all: a run may be too short for one."""
    return warmup["ended"] != WarmupEnd.NO_WARMUP.name


def tell_warmup(warmup: Mapping[str, Any]) -> str:
    """What came of it, in a line.

    Example:
      >>> found = dict(ended="MINIMUM_PASSED", minimum_found=True, examples=560, setbacks=0)
      >>> tell_warmup({**found, "peak_learning_rate": 0.09})
      'peak learning rate 0.09, found in 560 examples (minimum passed)'
    """
    rate = f"peak learning rate {warmup['peak_learning_rate']:.2g}"
    if not was_searched(warmup):
        short = "no minimum of the loss was found, the run is too short to search"
        return f"{short}: {rate}, from the length of the parameters"
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
    if not was_searched(warmup):
        return "no minimum was found, too short a run: by the length of the parameters"
    return "no minimum of the loss was found"
