"""`check_dataset`: whatever cannot be trained or judged on is refused, and the message says where it is."""

import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax.training import load_dataset
from adabatch_jax.training.data import check_dataset


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def test_the_embedded_digits_pass(digits):
    check_dataset(digits)


def spoilt(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize("half", ["train", "test"])
@pytest.mark.parametrize("label", [-1, 10, 255])
def test_a_label_out_of_range_is_named(digits, half, label):
    labels = spoilt(getattr(digits, f"{half}_labels"), [7, 9], label)
    message = (
        f"digits: label {label} of example 7 of the {half} data is out of range, expected 0 to 9 "
        rf"\(2 of {len(labels)} labels are wrong\)"
    )
    with pytest.raises(ValueError, match=message):
        check_dataset(digits._replace(**{f"{half}_labels": labels}))


@pytest.mark.parametrize("half", ["train", "test"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_are_named(digits, half, value):
    inputs = spoilt(getattr(digits, f"{half}_inputs"), (11, 3, 4), value)
    with pytest.raises(ValueError, match=rf"{half} data hold NaN or inf \(1 of .* example 11\)"):
        check_dataset(digits._replace(**{f"{half}_inputs": inputs}))


def test_bfloat16_inputs_are_looked_at_too(digits):
    inputs = spoilt(digits.train_inputs.astype(jnp.bfloat16), (3, 0, 0), np.nan)
    with pytest.raises(ValueError, match=r"train data hold NaN or inf .* example 3"):
        check_dataset(digits._replace(train_inputs=inputs))


@pytest.mark.parametrize("half", ["train", "test"])
def test_a_label_too_few_is_refused(digits, half):
    labels = getattr(digits, f"{half}_labels")[:-1]
    with pytest.raises(ValueError, match=rf"{half} data need a label for .* \({len(labels)},\)"):
        check_dataset(digits._replace(**{f"{half}_labels": labels}))


@pytest.mark.parametrize("half", ["train", "test"])
@pytest.mark.parametrize("nothing", [slice(0, 0), (slice(None), slice(0, 0))])
def test_empty_data_are_refused(digits, half, nothing):
    inputs, labels = (getattr(digits, f"{half}_{k}") for k in ("inputs", "labels"))
    empty = {f"{half}_inputs": inputs[nothing]}
    if isinstance(nothing, slice):
        empty[f"{half}_labels"] = labels[nothing]
    with pytest.raises(ValueError, match=f"the {half} data are empty"):
        check_dataset(digits._replace(**empty))


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_labels_that_are_not_integers_are_refused(digits, dtype):
    with pytest.raises(ValueError, match=f"train data must be integers, got {np.dtype(dtype)}"):
        check_dataset(digits._replace(train_labels=digits.train_labels.astype(dtype)))


def test_halves_of_different_shape_are_refused(digits):
    with pytest.raises(ValueError, match=r"differ in shape.*\(8, 8\).*\(8, 4\)"):
        check_dataset(digits._replace(test_inputs=digits.test_inputs[:, :, :4]))


def test_sequences_have_a_label_for_every_position(digits):
    text = np.arange(60, dtype=np.uint8).reshape(6, 10) % 50
    sequences = digits._replace(
        name="text",
        train_inputs=text,
        train_labels=text.astype(np.int32),
        test_inputs=text[:2],
        test_labels=text[:2].astype(np.int32),
        num_classes=50,
    )
    check_dataset(sequences)
    with pytest.raises(ValueError, match=r"text: label 49 of example 4 .* expected 0 to 48"):
        check_dataset(sequences._replace(num_classes=49))
