"""The numbers of a step: which columns its row has, and which of them are its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from adabatch_jax import BatchSizeStatus

Row = dict[str, Any]
MAX_SKIPPED_IN_A_ROW = 10
UNTRAINED = (
    "No step was ever made, so this is not the learning rate: the loss of the model as it begins is "
    "not finite on these data"
)
EVIDENCE = "noise_numerator", "noise_denominator", "degrees_of_freedom", "required_batch_size"
COLUMNS = (
    "step",
    "examples",
    "loss",
    "batch_size",
    "noise_numerator",
    "noise_denominator",
    "degrees_of_freedom",
    "required_batch_size",
    "next_batch_size",
    "test_status",
    "noise_scale",
    "learning_rate",
    "phase",
    "minimum_probability",
    "minimum_location",
    "setbacks",
    "momentum",
    "curvature_largest",
    "transition_batch_size",
    "refreshes",
    "micro_batch_size",
    "skipped",
    "seconds",
)
OF_A_SKIPPED_STEP = (
    *("step", "examples", "loss", "batch_size", "micro_batch_size", "next_batch_size", "skipped"),
    *("phase", "setbacks", "refreshes", "seconds"),
)


class TrainingError(RuntimeError):
    """Training cannot go on: every recent step gave a loss or gradient that is not finite."""


class RowReader:
    """Takes the numbers of the steps in their order, and stops a run that learns nothing.

    Attributes:
      skipped_in_a_row: steps skipped just now.
    """

    def __init__(self, on_row: Callable[[Row], None], skipped_in_a_row: int, hint: str) -> None:
        self._on_row, self._hint = on_row, hint
        self.skipped_in_a_row = skipped_in_a_row

    def __call__(self, row: Row, report: dict[str, Any], seconds: float) -> int:
        """Completes and hands on the row; returns the batch size that the step decided."""
        row = {**{k: v for k, v in report.items() if k in COLUMNS}, **row}
        next_batch_size, skipped = int(report["next_batch_size"]), int(report["skipped"])
        row.update(next_batch_size=next_batch_size, seconds=seconds, skipped=skipped)
        for name in _not_of_this_step(report):
            if name in row:
                row[name] = np.float32(np.nan)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self._on_row(row)
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            never = self.skipped_in_a_row == row["step"]
            raise TrainingError(
                f"step {row['step']}: {MAX_SKIPPED_IN_A_ROW} steps in a row gave a loss or "
                f"gradient that is not finite (last loss {float(row['loss'])}); nothing was "
                f"learned from them. {UNTRAINED if never else self._hint}"
            )
        return next_batch_size


def _not_of_this_step(report: dict[str, Any]) -> set[str]:
    """Columns that stay empty: what the step did not measure, or what is of the step before it."""
    if report["skipped"]:  # what it did is undone; counts and the phase are as they were
        return set(COLUMNS) - set(OF_A_SKIPPED_STEP)
    empty: set[str] = set()
    status = int(report["test_status"])
    if status not in (BatchSizeStatus.PASSED, BatchSizeStatus.CHANGED):
        empty.update(EVIDENCE)
    # Not measured yet, or the last one measured instead of this step's.
    if status == BatchSizeStatus.AT_MAXIMUM or not report["noise_scale"] > 0:
        empty.add("noise_scale")
    if report.get("tests_made") == 0:
        empty.update(("minimum_probability", "minimum_location"))
    if report.get("refreshes") == 0:
        empty.update(("curvature_largest", "transition_batch_size"))
    return empty
