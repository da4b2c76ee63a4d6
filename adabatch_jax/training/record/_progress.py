"""What a run shows while it goes on: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import collections
import datetime
import math
import sys
import time
from collections.abc import Iterable
from typing import Any, Self

import rich.console
import rich.progress
import rich.text

_REFRESH_SECONDS = 0.1
_SPEED_WINDOW = 300  # samples taken at most every _REFRESH_SECONDS: about the last 30 seconds


class Progress:
    """Shows how far a run is, in examples: a bar on a terminal, plain lines anywhere else.

    An update costs one reading of the clock: between two refreshes the values are not even looked
    at, so device arrays may be passed without waiting for them. In a pipe or a log file there is a
    line at the start and one for about every 10 % of the run.

    Args:
      total_examples: length of the run in examples, at least 1.
      console: where to write; default: the standard output.
      start: examples of the run that were consumed before, where it is gone on with.

    Raises:
      ValueError: if `total_examples` is not positive.
    """

    def __init__(
        self, total_examples: int, console: rich.console.Console | None = None, start: int = 0
    ) -> None:
        if total_examples < 1:
            raise ValueError(f"Progress: total_examples must be at least 1, got {total_examples}")
        self._total, self._start = total_examples, start
        # FORCE_COLOR and the like make rich take a pipe for a terminal: ask the stream itself.
        real = console is not None or sys.stdout.isatty()
        self._console = console or rich.console.Console()
        live = real and self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = _Bar(self._console, total_examples) if live else None
        self._samples = collections.deque[tuple[float, int]](maxlen=_SPEED_WINDOW)
        self._next_refresh = -math.inf
        self._next_line: float = 0
        self._printed = -1
        self._last: tuple[int, Any, Any, Any, Any] | None = None

    def update(
        self, examples: int, loss: Any, batch_size: Any, learning_rate: Any, noise_scale: Any
    ) -> None:
        """Tells where the run is.

        Args:
          examples: examples consumed so far.
          loss: scalar.
          batch_size: examples of the step.
          learning_rate: scalar; NaN for a step that was skipped.
          noise_scale: gradient noise scale in examples; NaN while it is unknown.
        """
        self._last = (examples, loss, batch_size, learning_rate, noise_scale)
        now = time.monotonic()
        if now >= self._next_refresh:
            self._next_refresh = now + _REFRESH_SECONDS
            self._samples.append((now, examples))
            if self._bar is not None:
                self._bar.show(examples, self._left(examples), _describe(*self._last[1:]))
        if self._bar is None and examples >= self._next_line:
            self._line(*self._last)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        else:
            gone = f", going on after {self._start:,}" if self._start else ""
            self._print(f"training on {self._total:,} examples{gone}")
            self._next_line = self._start + self._total / 10
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # After an error the values may be those of a failed step: reading them could hide it.
            if kind is None and self._last is not None:
                if self._bar is not None:
                    self._bar.show(self._last[0], "", _describe(*self._last[1:]))
                elif self._last[0] != self._printed:
                    self._line(*self._last)  # a run that ends early still says where
        finally:
            if self._bar is not None:
                self._bar.stop()

    def _line(self, examples: int, *values: Any) -> None:
        tenth = 10 * examples // self._total + 1
        self._next_line = tenth * self._total / 10 if tenth <= 10 else math.inf
        self._printed = examples
        percent = min(100, 100 * examples // self._total)
        count = f"{examples:{len(f'{self._total:,}')},} examples"
        line = f"{percent:3d} %  {count}  {_describe(*values)}  {self._left(examples)}"
        self._print(line.rstrip())

    def _print(self, line: str) -> None:
        # Past rich, which would wrap the line at a guessed width.
        self._console.file.write(line + "\n")
        self._console.file.flush()

    def _left(self, examples: int) -> str:
        """The time left at the recent speed; the first sample comes after the compilation."""
        if len(self._samples) < 2:
            return ""
        (start, before), (now, after) = self._samples[0], self._samples[-1]
        remaining = self._total - examples
        if remaining <= 0 or after <= before:
            return ""
        seconds = round((now - start) * remaining / (after - before))
        return f"{datetime.timedelta(seconds=seconds)} left"


def _describe(loss: Any, batch_size: Any, learning_rate: Any, noise_scale: Any) -> str:
    parts = [f"loss {float(loss):<7.4g}", f"batch size {int(batch_size):<6,}"]
    if not math.isnan(rate := float(learning_rate)):
        parts.append(f"learning rate {rate:<8.3g}")
    if math.isfinite(noise := float(noise_scale)):
        parts.append(f"noise scale {noise:,.0f}" if noise >= 10 else f"noise scale {noise:.2g}")
    return " ".join(parts).rstrip()


class _Bar(rich.progress.Progress):
    """A bar with a line of numbers below it, since both together are wider than a terminal."""

    _status = ""  # on the class: the base class draws before its own __init__ has ended

    def __init__(self, console: rich.console.Console, total: int) -> None:
        super().__init__(
            rich.progress.TextColumn("{task.percentage:>3.0f} %"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} examples"),
            rich.progress.TextColumn("{task.fields[left]}", style="cyan"),
            console=console,
            expand=True,
        )
        self._task = self.add_task("", total=total, left="")

    def show(self, examples: int, left: str, status: str) -> None:
        self._status = status
        self.update(self._task, completed=examples, left=left)

    def get_renderables(self) -> Iterable[rich.console.RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield rich.text.Text(self._status, style="dim", no_wrap=True, overflow="ellipsis")
