"""The numbers of the steps for TensorBoard: what metrics.csv holds, as event files."""

from __future__ import annotations

import importlib.util
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any, Self

from adabatch_jax.training._files import PathLike
from adabatch_jax.training.record._metrics_file import read_metrics

FLUSH_SECONDS = 2  # TensorBoard may look on while the run goes on


def check_tensorboard() -> None:
    """Says what is missing before a run begins.

    Raises:
      ValueError: tensorboardX is not installed.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise ValueError(
            "train: --tensorboard needs tensorboardX, which is not installed: "
            "pip install 'adabatch-jax[tensorboard]'"
        )


class EventWriter:
    """Writes one scalar per column and step; `examples` is among them, the axis is the step.

    Event files cannot be cut as metrics.csv can, and a killed run leaves them without its last
    seconds. So they are written anew from the rows of metrics.csv that a run keeps: no step comes
    twice and none is missing, even where the part before ran without TensorBoard. One that is
    looking on is told to forget the steps that it has seen.

    Args:
      folder: for the event files; those that are there are removed.
      metrics: csv file by `MetricsWriter`.
      keep_rows: how many of its rows belong to this run.
      seconds: the training time behind the last of them.
    """

    def __init__(
        self, folder: PathLike, metrics: PathLike, keep_rows: int = 0, seconds: float = 0.0
    ) -> None:
        from tensorboardX import SummaryWriter  # an extra of its own

        target = pathlib.Path(folder)
        for old in target.glob("events.out.tfevents.*"):
            old.unlink()
        self._start = time.time() - seconds
        # The suffix: tensorboardX names a file by the second, and would overwrite one as young.
        self._writer = SummaryWriter(
            str(target),
            purge_step=0,
            flush_secs=FLUSH_SECONDS,
            filename_suffix=f".{keep_rows}",
        )
        if keep_rows:
            columns = read_metrics(metrics)
            for number in range(keep_rows):
                self.write({name: values[number] for name, values in columns.items()})

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds the numbers of a step; one that is NaN or missing leaves a gap.

        Args:
          row: scalars by column name, `step` among them; `seconds` since the run began is its time.
        """
        when = self._start + float(row.get("seconds", 0.0))
        for name, value in row.items():
            if name != "step" and value is not None and not math.isnan(float(value)):
                self._writer.add_scalar(name, float(value), int(row["step"]), walltime=when)

    def close(self) -> None:
        """Writes what is left and closes the file; a second call does nothing."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
