"""Writing files: a folder that can be written to, files that are replaced as a whole, strict JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

PathLike = str | os.PathLike[str]

FLOATS = "fV"  # NumPy's kinds of floats: "V" are bfloat16 and the 8-bit floats


def prepare_output(folder: pathlib.Path) -> pathlib.Path:
    """Makes the folder and shows that it can be written to, before any time is spent.

    Raises:
      OSError: naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out {folder} cannot be written: {error.strerror or error}") from None
    return folder


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
        if array.dtype.kind in FLOATS:
            return _plain(float(str(array.astype(np.float32))))  # 0.1, not 0.10000000149011612
    raise TypeError(f"write_json: cannot write {type(data).__name__}: {data!r}")
