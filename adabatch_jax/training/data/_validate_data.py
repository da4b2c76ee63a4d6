"""What is wrong with the data, said before training starts.

`optax.losses.softmax_cross_entropy_with_integer_labels` does not: a label from the number of classes
up gives a NaN loss with a finite gradient, and -1 means the last class, without a word.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from adabatch_jax.training.data._datasets import Dataset

_HALVES = ("train", "test")


def check_dataset(dataset: Dataset) -> None:
    """Refuses data that cannot be trained or judged on.

    Args:
      dataset: both halves, as `load_dataset` returns them: inputs [N, …] of integers or floats, labels
        [N] or [N, L], integers in 0…num_classes - 1.

    Raises:
      ValueError: a half is empty; it has more or fewer labels than inputs; labels that are not integers
        or are out of range; NaN or inf in the inputs; examples of different shapes in the two halves.
        The message names the half, and the first example that is wrong.

    Example:
      >>> import numpy as np
      >>> from adabatch_jax.training import load_dataset
      >>> digits = load_dataset("digits")
      >>> check_dataset(digits)
      >>> check_dataset(digits._replace(test_labels=digits.test_labels + 1))
      Traceback (most recent call last):
      ValueError: digits: label 10 of example 6 of the test data is out of range, expected 0 to 9 ...
    """
    shapes = []
    for half in _HALVES:
        inputs = np.asarray(getattr(dataset, f"{half}_inputs"))
        labels = np.asarray(getattr(dataset, f"{half}_labels"))
        _check_half(f"{half} data", dataset.name, inputs, labels, dataset.num_classes)
        shapes.append((inputs.shape[1:], labels.shape[1:]))
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{dataset.name}: the examples of the train and test data differ in shape: inputs and labels "
            f"are {shapes[0]} and {shapes[1]}"
        )


def _check_half(where: str, name: str, inputs: Any, labels: Any, num_classes: int) -> None:
    if not inputs.ndim or not labels.ndim or len(inputs) != len(labels):
        raise ValueError(
            f"{name}: the {where} need a label for every example, got inputs of shape {inputs.shape} "
            f"and labels of shape {labels.shape}"
        )
    if not inputs.size or not labels.size:
        raise ValueError(
            f"{name}: the {where} are empty: inputs of shape {inputs.shape}, labels of shape "
            f"{labels.shape}"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}: the labels of the {where} must be integers, got {labels.dtype}")
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        first = _first_example(wrong)
        raise ValueError(
            f"{name}: label {labels[wrong].flat[0]} of example {first} of the {where} is out of range, "
            f"expected 0 to {num_classes - 1} ({wrong.sum()} of {wrong.size} labels are wrong)"
        )
    if jnp.issubdtype(inputs.dtype, jnp.inexact):  # NumPy's does not know bfloat16
        wrong = ~np.isfinite(inputs)
        if wrong.any():
            raise ValueError(
                f"{name}: the inputs of the {where} hold NaN or inf ({wrong.sum()} of {wrong.size} "
                f"numbers, the first in example {_first_example(wrong)})"
            )


def _first_example(wrong: np.ndarray) -> int:
    """The number of the first example with anything wrong in it."""
    return int(np.argmax(wrong.reshape(len(wrong), -1).any(axis=1)))
