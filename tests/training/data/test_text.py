"""Text: every byte is predicted once, by the byte after it, and the test part is held back."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from adabatch_jax.training import load_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


def write(folder, content):
    file = folder / "text"
    file.write_bytes(content)
    return file


@given(st.binary(min_size=60, max_size=400), st.integers(1, 5))
def test_windows_are_the_text_and_labels_the_text_one_byte_on(folder, content, length):
    text = load_text(write(folder, content), length=length)
    test = len(content) // 10
    parts = {"train": content[: len(content) - test], "test": content[len(content) - test :]}
    for name, part in parts.items():
        inputs, labels = getattr(text, f"{name}_inputs"), getattr(text, f"{name}_labels")
        number = (len(part) - 1) // length
        assert inputs.shape == labels.shape == (number, length)
        assert inputs.tobytes() == part[: number * length]
        assert labels.astype(np.uint8).tobytes() == part[1 : number * length + 1]


def test_types_and_names(folder):
    text = load_text(write(folder, bytes(range(256)) * 4), length=8)
    assert text.name == "text" and text.num_classes == 256
    assert text.train_inputs.dtype == text.test_inputs.dtype == np.uint8
    assert text.train_labels.dtype == text.test_labels.dtype == np.int32
    assert text.train_labels.max() == 255 and text.train_labels.min() == 0


def test_the_length_is_64_unless_said(folder):
    assert load_text(write(folder, b"x" * 1000)).train_inputs.shape == (14, 64)


def test_the_shortest_text_has_one_window_to_test_and_a_byte_less_has_none(folder):
    text = load_text(write(folder, b"x" * 90), length=8)
    assert len(text.test_inputs) == 1
    with pytest.raises(
        ValueError, match=r"has 89 bytes, too short .* length=8: .* makes 90 in all"
    ):
        load_text(write(folder, b"x" * 89), length=8)


def test_what_cannot_be_read_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.txt"):
        load_text(folder / "missing.txt")
    with pytest.raises(ValueError, match=f"path must be a file, got the folder {folder}"):
        load_text(folder)
    with pytest.raises(ValueError, match="text is empty"):
        load_text(write(folder, b""))


@pytest.mark.parametrize("length", [0, -1, 2.5, "64"])
def test_a_length_that_is_none_is_named(folder, length):
    with pytest.raises(ValueError, match=f"length must be a positive integer, got {length!r}"):
        load_text(write(folder, b"x" * 1000), length=length)
