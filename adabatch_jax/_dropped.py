"""A step that is dropped, its optimizer state with it, and what a link must remember of it even so."""

from __future__ import annotations

from typing import Any

import jax

from adabatch_jax._protocols import remembers_dropped_steps
from adabatch_jax._types import PyTree


def state_after_dropped_step(before: PyTree, after: PyTree, *, used_up: bool) -> PyTree:
    """The optimizer state `before` a step that is dropped, with what its links remember of that step.

    AutoWU leaves one loss out that is not finite, and reacts to the second in a row: it could not tell
    them apart if all of its state went back. A state that has something to remember offers
    `after_dropped_step` (see `_protocols.py`).

    Args:
      before: state of an optimizer.
      after: the state that its `update` returned in the step that is dropped.
      used_up: whether the examples of the step are: every clock then goes on, or a decay over the run
        would not end with it. False where the step is made up for.
    """

    def one(old: Any, new: Any) -> Any:
        return old.after_dropped_step(new, used_up) if remembers_dropped_steps(old) else old

    return jax.tree.map(one, before, after, is_leaf=remembers_dropped_steps)
