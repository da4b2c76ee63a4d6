"""What the state of a transformation may offer to others, and by which names.

Optimizer states are nested in each other in any order, so wrappers and readers cannot know their types.
They look for methods and fields of the names below. A state of ours that stands in no registry, or a
user's own, takes part by having them. `tests/contract/test_protocols.py` checks every state of ours.
"""

from __future__ import annotations

import enum
from typing import Any, Protocol, TypeGuard

import jax

from adabatch_jax._validate import is_traced


class ReportsMetrics(Protocol):
    """A state with numbers for `adabatch.metrics`.

    Its first field is one number: the rank of that number tells how many axes of devices or of an
    ensemble stand before all fields (`pmap` stacks states). When `report_metrics` is called, fields of one
    array each are freed from these axes, and so are those of its records, NamedTuples in fields named
    last_…: what was last seen, apart from what is carried to the next step.

    The keys `learning_rate` and `learning_rate_scale` are multiplied over all states. Other keys of one
    name overwrite each other.

    A state that reports is no part of a direction: `return_to_minimum` does not take it back.
    """

    def report_metrics(self) -> dict[str, Any]:
        """Name → scalar; the same names at every step."""


class EmitsSteps(Protocol):
    """A wrapper that may gather a gradient without making a step: for `has_updated` and `metrics`.

    It may have a field `skipped_call`, too: whether the last call left its gradient out.
    """

    @property
    def emitted(self) -> Any:
        """Bool scalar: whether the last call made a step."""


class GoesBack(Protocol):
    """A wrapper that may take the parameters back to a snapshot, whatever the gradient is.

    Such a step is made even where the loss is not finite.
    """

    @property
    def returns_made(self) -> Any:
        """int32 scalar: how often it has."""


class MayCountSteps(Protocol):
    """A schedule that may count optimizer steps, of which there are fewer while a batch grows."""

    @property
    def counts_steps(self) -> Any:
        """Bool scalar: whether it does, as `init` leaves it."""


class RemembersDroppedSteps(Protocol):
    """A state that learns from a step whose update is dropped: see `state_after_dropped_step`."""

    def after_dropped_step(self, after: Any, used_up: bool) -> Any:
        """This state, with what it keeps of the state `after` the dropped step."""


def by_name(kind: type[enum.IntEnum], code: Any) -> Any:
    """A code as a member of its enumeration on the host, which prints its name; as it is while tracing."""
    return code if is_traced(code) else kind(int(jax.device_get(code)))


def reports_metrics(x: Any) -> TypeGuard[ReportsMetrics]:
    """Whether `x` is a state with numbers for `metrics`."""
    return hasattr(type(x), "report_metrics")


def is_record(name: str, field: Any) -> bool:
    """Whether a field of a state that reports is a record."""
    return name.startswith("last_") and hasattr(field, "_fields")


def emits_steps(x: Any) -> TypeGuard[EmitsSteps]:
    """Whether `x` is the state of a wrapper that may gather."""
    return hasattr(type(x), "emitted")


def goes_back(x: Any) -> TypeGuard[GoesBack]:
    """Whether `x` is the state of a wrapper that may take the parameters back."""
    return hasattr(type(x), "returns_made")


def may_count_steps(x: Any) -> TypeGuard[MayCountSteps]:
    """Whether `x` is the state of a schedule that may count steps."""
    return hasattr(type(x), "counts_steps")


def remembers_dropped_steps(x: Any) -> TypeGuard[RemembersDroppedSteps]:
    """Whether `x` is a state that keeps something of a step that is dropped."""
    return hasattr(type(x), "after_dropped_step")


def inner_fields(state: Any) -> tuple[str, ...]:
    """The fields in which a wrapper keeps the states that it wraps: those named inner_…, as in Optax."""
    return tuple(name for name in getattr(state, "_fields", ()) if name.startswith("inner_"))
