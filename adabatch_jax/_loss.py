"""The loss of a call of `update`, under either of its names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def loss_of_call(value: Any, extra_args: Mapping[str, Any]) -> Any:
    """`value=`, as Optax calls the loss; where it was not given `loss=`, as some training libraries do.

    With both, `value` is the loss, and `loss=` one more keyword that nobody here reads.
    """
    return extra_args.get("loss") if value is None else value
