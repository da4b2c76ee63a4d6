"""Everything that a run needs to go on: what the loop hands on and what a checkpoint holds."""

from __future__ import annotations

from typing import NamedTuple

from adabatch_jax._types import PyTree


class RunState(NamedTuple):
    """Everything that a run needs to go on, between two steps.

    Args:
      params: parameters.
      opt_state: state of the optimizer: accumulators, batch-size controller, AutoWU, curvature.
      position: examples taken from the feed.
      step: steps made.
      batch_size: of the last step.
      decided: the sizes that the last steps decided, not used yet: one, and one for each step of lag.
      skipped_in_a_row: steps skipped just now.
      seconds: time spent.
    """

    params: PyTree
    opt_state: PyTree
    position: int = 0
    step: int = 0
    batch_size: int = 0
    decided: tuple[int, ...] = ()
    skipped_in_a_row: int = 0
    seconds: float = 0.0
