"""The data of the scripts: handwritten digits, and the English of Python's own help."""

from __future__ import annotations

import functools
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

Split = tuple[np.ndarray, np.ndarray]


@functools.cache
def digits() -> dict[str, Split]:
    """Images [N, 8, 8, 1], standardised, and labels [N]: 1,200 to train, 297 and 300 held out."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = np.float32((images[order] - 4.9) / 6.0).reshape(-1, 8, 8, 1)
    y = np.int32(labels[order])
    cuts = {"train": slice(1200), "validation": slice(1200, 1497), "test": slice(1497, None)}
    return {name: (x[cut], y[cut]) for name, cut in cuts.items()}


@functools.cache
def paragraphs(length: int) -> dict[str, Split]:
    """Rows of `length` + 1 bytes [N, length + 1], and the weight [N, length] of every byte but the first.

    A paragraph begins a row of its own. Its last row is filled with zeros, of weight zero. Of ten
    paragraphs one is held out for validation and one, at most 512 rows of each, for the test.
    """
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for number, paragraph in enumerate(text.split("\n\n")):
        values = np.frombuffer(paragraph.encode("ascii", "replace"), np.uint8)
        split = {0: "test", 1: "validation"}.get(number % 10, "train")
        for start in range(0, len(values) - 1, length):
            row = values[start : start + length + 1]
            parts[split].append(np.pad(row, (0, length + 1 - len(row))))
    rows = {name: np.int32(part) for name, part in parts.items()}
    for name in ("validation", "test"):
        rows[name] = np.random.default_rng(0).permutation(rows[name])[:512]
    return {name: (row, np.float32(row[:, 1:] > 0)) for name, row in rows.items()}


def order_of(key: jax.Array, available: int, wanted: int, batch: int) -> jax.Array:
    """Indices [wanted // batch, batch]: whole epochs, each in an order of its own.

    The order of the examples does not depend on the size of the batch.
    """
    epochs = -(-wanted // available)
    each = jax.vmap(lambda k: jax.random.permutation(k, available))(jax.random.split(key, epochs))
    return jnp.ravel(each)[: wanted // batch * batch].reshape(-1, batch)
