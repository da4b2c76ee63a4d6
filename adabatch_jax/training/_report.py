"""What a run tells: a csv file of its steps, a json file of its result, and a line for the eye."""

from __future__ import annotations

import collections
import contextlib
import csv
import datetime
import json
import math
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TextIO

import numpy as np
import numpy.typing as npt
import rich.console
import rich.progress
import rich.text

PathLike = str | os.PathLike[str]

_FLOATS = "fV"  # NumPy's kinds: "V" are bfloat16 and the 8-bit floats
_FLUSH_SECONDS = 2.0
_REFRESH_SECONDS = 0.1
_SPEED_WINDOW = 300  # samples taken at most every _REFRESH_SECONDS: about the last 30 seconds


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path` that takes its place when the block succeeds.

    Args:
      path: the file to write or replace; its folder is created if it is missing.

    Returns:
      A context manager. If the block raises, `path` stays as it was and nothing is left behind.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Opened by the caller, not by tempfile: the result gets the usual permissions.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: PathLike, data: Any) -> None:
    """Writes strict JSON atomically: NaN and infinities, which JSON lacks, become null.

    Args:
      path: the file to write.
      data: mappings, sequences, arrays and scalars (Python, NumPy or JAX), strings, paths, None.

    Raises:
      TypeError: for anything else.
    """
    text = json.dumps(_plain(data), indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _plain(data: Any) -> Any:
    if data is None or isinstance(data, str | bool | int):
        return data
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    if hasattr(data, "__array__"):
        array = np.asarray(data)
        if array.ndim:
            return [_plain(value) for value in array]
        if array.dtype.kind in "biu":
            return array.item()
        if array.dtype == np.float64:
            return _plain(float(array))
        if array.dtype.kind in _FLOATS:
            return _plain(float(str(array.astype(np.float32))))  # 0.1, not 0.10000000149011612
    raise TypeError(f"write_json: cannot write {type(data).__name__}: {data!r}")


class MetricsWriter:
    """Writes one csv row per step, exact enough to be read back bit for bit.

    Floats are float32, written with the fewest digits that give the same float32 again; NaN is an
    empty cell, integers stay integers. The file is flushed every two seconds and on closing.

    Args:
      path: csv file, replaced if it exists; its folder is created if it is missing.
      columns: names of the columns, in order.

    Raises:
      ValueError: if there are no columns or a name occurs twice.
    """

    def __init__(self, path: PathLike, columns: Sequence[str]) -> None:
        if not columns or len(set(columns)) != len(columns):
            raise ValueError(f"MetricsWriter: columns must be distinct, got {list(columns)}")
        self.columns = tuple(columns)
        target = pathlib.Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = target.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(self.columns)
        self._flush()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row.

        Args:
          row: scalars by column name (Python, NumPy or JAX); a missing name or None is an empty
            cell.

        Raises:
          ValueError: if a name is not among the columns or a value is not a scalar number.
        """
        unknown = row.keys() - set(self.columns)
        if unknown:
            raise ValueError(f"MetricsWriter: unknown columns {sorted(unknown)}")
        self._writer.writerow([_cell(name, row.get(name)) for name in self.columns])
        if time.monotonic() >= self._next_flush:
            self._flush()

    def close(self) -> None:
        """Flushes and closes the file; a second call does nothing."""
        self._file.close()

    def _flush(self) -> None:
        self._file.flush()
        self._next_flush = time.monotonic() + _FLUSH_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):  # Python's own integers have no size limit; True is 1
        return str(int(value))
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "biu" + _FLOATS:
        raise ValueError(f"MetricsWriter: {name}={value!r} is not a scalar number")
    if array.dtype.kind in "biu":
        return str(int(array))
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf: what a device says
        number = array.astype(np.float32)[()]
    return "" if np.isnan(number) else str(number)


def read_metrics(path: PathLike) -> dict[str, npt.NDArray[Any]]:
    """Reads what `MetricsWriter` wrote.

    Args:
      path: csv file. A last row that a killed run left half-written is dropped.

    Returns:
      Column name → array [num_rows]. Integers are int64, floats float32 with NaN for empty cells;
      integers with empty cells between them are float64, which holds them exactly below 2**53.

    Raises:
      ValueError: if the file has no header, a row has the wrong length or a cell is not a number.
    """
    text = pathlib.Path(path).read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    header, *rows = list(csv.reader(complete.splitlines())) or [[]]
    if not header:
        raise ValueError(f"read_metrics: {os.fspath(path)} has no header line")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(
                f"read_metrics: {os.fspath(path)} line {number} has {len(row)} cells, "
                f"the header has {len(header)}"
            )
    cells = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    try:
        return {name: _column(values) for name, values in cells.items()}
    except ValueError as error:
        raise ValueError(f"read_metrics: {os.fspath(path)}: {error}") from None


def _column(cells: Sequence[str]) -> npt.NDArray[Any]:
    integers = [cell.removeprefix("-").isdecimal() for cell in cells]
    if cells and all(integers):
        return np.array([int(cell) for cell in cells], np.int64)
    # Cells of floats have a point, an exponent or a name (nan, inf), so they never look like these.
    mixed = any(integers) and all(
        is_integer or not cell for is_integer, cell in zip(integers, cells, strict=True)
    )
    dtype = np.float64 if mixed else np.float32
    return np.array([float(cell or "nan") for cell in cells]).astype(dtype)


class Progress:
    """Shows how far a run is, in examples: a bar on a terminal, plain lines anywhere else.

    An update costs one reading of the clock: between two refreshes the values are not even looked
    at, so device arrays may be passed without waiting for them. In a pipe or a log file there is a
    line at the start and one for about every 10 % of the run.

    Args:
      total_examples: length of the run in examples, at least 1.
      console: where to write; default: the standard output.

    Raises:
      ValueError: if `total_examples` is not positive.
    """

    def __init__(self, total_examples: int, console: rich.console.Console | None = None) -> None:
        if total_examples < 1:
            raise ValueError(f"Progress: total_examples must be at least 1, got {total_examples}")
        self._total = total_examples
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
          learning_rate: scalar.
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
            self._print(f"training on {self._total:,} examples")
            self._next_line = self._total / 10
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
    parts = [
        f"loss {float(loss):<7.4g}",
        f"batch size {int(batch_size):<6,}",
        f"learning rate {float(learning_rate):<8.3g}",
    ]
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
