"""Data sets that need no account: digits (embedded), MNIST and Fashion-MNIST (IDX files).

IDX files are found where they already lie, or fetched once. Every one is checked before it is used:
its compression, its header, its length, and the md5 of its unpacked bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import pathlib
import struct
import urllib.request
import zlib
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from adabatch_jax.training._files import PathLike, atomic_path

ImagesName: TypeAlias = Literal["digits", "mnist", "fashion-mnist"]
DatasetName: TypeAlias = Literal[ImagesName, "text"]

_TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_NUM_CLASSES = 10

# md5 of the unpacked bytes, in the order of _TRAIN + _TEST.
_MD5 = {
    "mnist": (
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ),
    "fashion-mnist": (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
}

# Each holds the four files as NAME.gz. The checksums make an unencrypted mirror as good as another.
_MIRRORS = {
    "mnist": (
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "fashion-mnist": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
}
_SYSTEM_DIR = pathlib.Path("/usr/share/datasets")
_TIMEOUT_SECONDS = 20.0


class Dataset(NamedTuple):
    """A data set in host memory: grey images, or windows of a text.

    Args:
      name: the name it was loaded by; "text" for a text.
      train_inputs: images [N, H, W], uint8 in 0…255 or float32 in [0, 1], `to_float` takes both; or
        text, uint8 [N, L]: bytes.
      train_labels: int32, in 0…num_classes - 1: [N] for images; [N, L] for text, the next bytes.
      test_inputs: like `train_inputs`, with M in place of N.
      test_labels: like `train_labels`, with M in place of N.
      num_classes: number of classes; 256 for text.
    """

    name: str
    train_inputs: npt.NDArray[np.uint8] | npt.NDArray[np.float32]
    train_labels: npt.NDArray[np.int32]
    test_inputs: npt.NDArray[np.uint8] | npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int32]
    num_classes: int


def load_dataset(name: str, data_dir: PathLike | None = None) -> Dataset:
    """Loads a data set by name, from the disk if it is there and from a public mirror if not.

    Args:
      name: "digits" (1437 + 360 images of 8x8, embedded in scikit-learn, float32), "mnist" or
        "fashion-mnist" (60,000 + 10,000 images of 28x28, uint8).
      data_dir: the only folder to look in for IDX files (and in its subfolder `name`); nothing is
        downloaded then. Default: $ADABATCH_DATA_DIR, /usr/share/datasets/NAME,
        ~/.cache/adabatch-jax/NAME, ./data/NAME, then the mirrors. "digits" needs no folder.

    Returns:
      The data set. Its arrays of images may be read-only.

    Raises:
      ValueError: if the name is unknown, or a file is damaged or not the one it should be.
      FileNotFoundError: if a file is neither on the disk nor to be had from a mirror.

    Example:
      >>> load_dataset("digits").train_inputs.shape
      (1437, 8, 8)
    """
    if name == "digits":
        return _load_digits()
    if name not in _MD5:
        choices = ", ".join(map(repr, ("digits", *_MD5)))
        raise ValueError(f"load_dataset: name must be one of {choices}, got {name!r}")
    folders = _folders(name, data_dir)
    train_inputs, train_labels = _load_pair(name, _TRAIN, folders, download=data_dir is None)
    test_inputs, test_labels = _load_pair(name, _TEST, folders, download=data_dir is None)
    return Dataset(name, train_inputs, train_labels, test_inputs, test_labels, _NUM_CLASSES)


def to_float(inputs: jax.Array) -> jax.Array:
    """Scales raw images inside the jitted loss, so that they travel to the device as bytes.

    Args:
      inputs: uint8 of any shape, in 0…255, or floats that are scaled already.

    Returns:
      float32 inputs / 255 for uint8; floats unchanged. Same shape.

    Raises:
      ValueError: for any other dtype.

    Example:
      >>> import numpy as np
      >>> to_float(np.array([0, 255], np.uint8))
      Array([0., 1.], dtype=float32)
    """
    inputs = jnp.asarray(inputs)
    if inputs.dtype == jnp.uint8:
        return inputs.astype(jnp.float32) / 255.0
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(f"to_float: inputs must be uint8 or floats, got {inputs.dtype}")
    return inputs


def _load_digits() -> Dataset:
    import sklearn.datasets  # slow to import, and only this data set needs it

    digits = sklearn.datasets.load_digits()
    # Raw Philox words are the same in every NumPy version, and so is this split.
    order = np.argsort(np.random.Philox(key=0).random_raw(len(digits.target)), kind="stable")
    inputs = (digits.images[order] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    train = 1437  # of 1797
    return Dataset(
        "digits", inputs[:train], labels[:train], inputs[train:], labels[train:], _NUM_CLASSES
    )


def _folders(name: str, data_dir: PathLike | None) -> list[pathlib.Path]:
    """Where to look, in order. A folder's own subfolder comes first: both sets share file names."""
    if data_dir is not None:
        places = [pathlib.Path(data_dir)]
    else:
        environment = os.environ.get("ADABATCH_DATA_DIR")
        places = [pathlib.Path(environment)] if environment else []
        places += [_SYSTEM_DIR / name, _cache_dir(name), pathlib.Path("data", name)]
    return [folder for place in places for folder in (place / name, place)]


def _cache_dir(name: str) -> pathlib.Path:
    return pathlib.Path.home() / ".cache" / "adabatch-jax" / name


def _load_pair(
    name: str, files: tuple[str, str], folders: list[pathlib.Path], download: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """The images and labels of one half of a data set, each from the first place that has it."""
    arrays = []
    for file, ndim in zip(files, (3, 1), strict=True):
        path = _find(file, folders)
        if path is not None:
            array = _parse(path.read_bytes(), name, file, ndim, os.fspath(path))
        elif download:
            array = _download(name, file, ndim, folders)
        else:
            raise FileNotFoundError(f"load_dataset: {name}: {_nowhere(file, folders)}")
        arrays.append(array)
    images, labels = arrays
    if len(images) != len(labels):
        raise ValueError(
            f"load_dataset: {name}: {files[0]} has {len(images)} images, "
            f"{files[1]} has {len(labels)} labels"
        )
    return images, labels.astype(np.int32)


def _find(file: str, folders: list[pathlib.Path]) -> pathlib.Path | None:
    for folder in folders:
        for stem in (file, file.replace("-idx", ".idx")):  # two spellings are in circulation
            for path in (folder / stem, folder / f"{stem}.gz"):
                if path.is_file():
                    return path
    return None


def _parse(content: bytes, name: str, file: str, ndim: int, source: str) -> npt.NDArray[np.uint8]:
    """Unpacks and checks an IDX file: 0, 0, type 8 (uint8), rank; the lengths, big-endian; bytes.

    Whatever is wrong is a ValueError of one line that begins with `source`. The md5 would find all
    of it, but could not say what it is.
    """
    if content[:2] == b"\x1f\x8b":  # by content: browsers unpack .gz files and keep the name
        try:
            content = gzip.decompress(content)
        except EOFError:
            raise ValueError(f"{source}: truncated gzip file") from None
        except (OSError, zlib.error) as error:
            raise ValueError(f"{source}: corrupt gzip file ({error})") from None
    start = 4 + 4 * ndim
    if content[:4] != bytes((0, 0, 8, ndim)) and len(content) >= 4:
        expected = bytes((0, 0, 8, ndim)).hex()
        raise ValueError(f"{source}: wrong magic number {content[:4].hex()}, expected {expected}")
    if len(content) < start:
        raise ValueError(f"{source}: truncated, {len(content)} bytes end inside the IDX header")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    promised, found = math.prod(shape), len(content) - start
    if found != promised:
        what = "truncated" if found < promised else "too long"
        raise ValueError(f"{source}: {what}, {found} bytes where the header says {promised}")
    _check_md5(content, name, file, source)
    array = np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    if ndim == 1 and array.size and array.max() >= _NUM_CLASSES:
        raise ValueError(
            f"{source}: label {array.max()} out of range, expected 0 to {_NUM_CLASSES - 1}"
        )
    return array


def _check_md5(content: bytes, name: str, file: str, source: str) -> None:
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    position = (_TRAIN + _TEST).index(file)
    if digest == _MD5[name][position]:
        return
    for other, digests in _MD5.items():  # the four names are the same in both sets
        if digest in digests:
            belongs = (_TRAIN + _TEST)[digests.index(digest)]
            raise ValueError(f"{source}: this is {belongs} of {other}, expected {file} of {name}")
    raise ValueError(f"{source}: md5 mismatch, {digest} instead of {_MD5[name][position]}")


def _download(
    name: str, file: str, ndim: int, folders: list[pathlib.Path]
) -> npt.NDArray[np.uint8]:
    """Fetches a file from the first mirror that has the right one, and keeps it in the cache."""
    failures = []
    for mirror in _MIRRORS[name]:
        url = f"{mirror}{file}.gz"
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
                content: bytes = response.read()
            array = _parse(content, name, file, ndim, "download")
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{url} ({error})")
            continue
        # Only after every check: the cache never holds a file that a later run would reject.
        with atomic_path(_cache_dir(name) / f"{file}.gz") as temporary:
            temporary.write_bytes(content)
        return array
    package = " or install Debian's dataset-fashion-mnist" if name == "fashion-mnist" else ""
    raise FileNotFoundError(
        f"load_dataset: {name}: {_nowhere(file, folders)}, and no mirror has it: "
        f"{'; '.join(failures)}. Point --data-dir (data_dir=) or $ADABATCH_DATA_DIR to a folder "
        f"with the four IDX files{package}."
    )


def _nowhere(file: str, folders: list[pathlib.Path]) -> str:
    places = folders[1::2]  # their subfolders stand before them and need no mention
    return f"no {file}[.gz] in {', '.join(map(os.fspath, places))}"
