"""Any text file as a data set: windows of bytes, and after each byte the byte that follows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from adabatch_jax import _validate
from adabatch_jax.training._files import PathLike
from adabatch_jax.training.data._datasets import Dataset

_NUM_BYTES = 256
_TEST_PART = 10  # one in ten bytes


def load_text(path: PathLike, *, length: int = 64) -> Dataset:
    """Cuts a file into windows whose labels are the next bytes.

    Window i holds the bytes i·L … i·L + L - 1 of its part and the labels i·L + 1 … i·L + L: every byte
    is predicted once, from at most L bytes before it. The last tenth of the file is the test part; no
    window reaches over the border, and bytes that do not fill a window are left out.

    Args:
      path: a file; its bytes are taken as they are, whatever the encoding.
      length: L, bytes in a window, at least 1.

    Returns:
      The data set: inputs uint8 [N, L], labels int32 [N, L], 256 classes, of the name "text".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is a folder, empty, or too short for a window in both parts; `length` is not a
        positive integer.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = pathlib.Path(folder, "text.txt")
      ...     _ = file.write_text("In the beginning was the Word. " * 10)
      ...     text = load_text(file, length=16)
      >>> text.train_inputs.shape, text.test_inputs.shape
      ((17, 16), (1, 16))
      >>> bytes(text.train_inputs[0])
      b'In the beginning'
      >>> bytes(text.train_labels[0].astype("uint8"))
      b'n the beginning '
    """
    _validate.positive_int("load_text", length=length)
    length = int(length)
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"load_text: path must be a file, got the folder {file}")
    if not file.exists():
        raise FileNotFoundError(f"load_text: there is no file {file}")
    text = np.frombuffer(file.read_bytes(), np.uint8)
    if not text.size:
        raise ValueError(f"load_text: {file} is empty")
    test = text.size // _TEST_PART
    if test < length + 1:  # the training part is then long enough, too
        raise ValueError(
            f"load_text: {file} has {text.size} bytes, too short for windows of length={length}: "
            f"the last tenth is for testing and needs {length + 1} bytes, which makes "
            f"{_TEST_PART * (length + 1)} in all"
        )
    border = text.size - test
    return Dataset(
        "text", *_windows(text[:border], length), *_windows(text[border:], length), _NUM_BYTES
    )


def _windows(
    text: npt.NDArray[np.uint8], length: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Inputs and labels, [N, length]; N = (bytes - 1) // length, as the last byte has no successor."""
    end = (text.size - 1) // length * length
    inputs = text[:end].reshape(-1, length)
    return inputs, text[1 : end + 1].reshape(-1, length).astype(np.int32)
