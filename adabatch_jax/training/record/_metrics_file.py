"""The numbers of the steps in a csv file: written row by row, read back column by column."""

from __future__ import annotations

import csv
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self, TextIO

import numpy as np
import numpy.typing as npt

from adabatch_jax.training._files import FLOATS, PathLike

_FLUSH_SECONDS = 2.0


class MetricsWriter:
    """Writes one csv row per step, exact enough to be read back bit for bit.

    Floats are float32, written with the fewest digits that give the same float32 again; NaN is an
    empty cell, integers stay integers. The file is flushed every two seconds and on closing.

    Args:
      path: csv file, replaced if it exists; its folder is created if it is missing.
      columns: names of the columns, in order.
      keep_rows: go on after this many rows of the file that is there, and cut off the rest.

    Raises:
      ValueError: if there are no columns or a name occurs twice; if the file has other columns, or
        fewer rows than are to be kept.
    """

    def __init__(self, path: PathLike, columns: Sequence[str], keep_rows: int = 0) -> None:
        if not columns or len(set(columns)) != len(columns):
            raise ValueError(f"MetricsWriter: columns must be distinct, got {list(columns)}")
        self.columns = tuple(columns)
        target = pathlib.Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if keep_rows:
            _cut(target, self.columns, keep_rows)
        self._file: TextIO = open(  # noqa: SIM115  (closed by close)
            target, "a" if keep_rows else "w", encoding="utf-8", newline=""
        )
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not keep_rows:
            self._writer.writerow(self.columns)
        self.flush()

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
            self.flush()

    def close(self) -> None:
        """Flushes and closes the file; a second call does nothing."""
        self._file.close()

    def flush(self) -> None:
        """Hands every row to the operating system: they outlive this process."""
        self._file.flush()
        self._next_flush = time.monotonic() + _FLUSH_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut(path: pathlib.Path, columns: tuple[str, ...], rows: int) -> None:
    """Leaves the header and the first `rows` rows of a csv file. Numbers hold no line breaks."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if not lines or lines[0].decode(errors="replace").rstrip("\n").split(",") != list(columns):
        raise ValueError(f"{os.fspath(path)} is missing or has other columns: cannot go on with it")
    complete = sum(line.endswith(b"\n") for line in lines) - 1
    if complete < rows:
        raise ValueError(f"{os.fspath(path)} has {complete} rows, {rows} are needed to go on")
    os.truncate(path, sum(map(len, lines[: rows + 1])))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):  # Python's own integers have no size limit; True is 1
        return str(int(value))
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "biu" + FLOATS:
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
