"""The numbers of the steps: a file that reads back exactly."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from adabatch_jax.training.record import MetricsWriter, _metrics_file, read_metrics


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(_metrics_file.time, "monotonic", lambda: self.now)


def write_and_read(path, columns, rows):
    with MetricsWriter(path, columns) as writer:
        for row in rows:
            writer.write(row)
    return read_metrics(path)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30))
def test_every_float32_reads_back_bit_for_bit(tmp_path_factory, words):
    values = np.array(words, np.uint32).view(np.float32)
    path = tmp_path_factory.mktemp("metrics") / "metrics.csv"
    back = write_and_read(path, ["x"], [{"x": value} for value in values])["x"]
    assert back.dtype == np.float32
    known = ~np.isnan(values)
    np.testing.assert_array_equal(np.isnan(back), ~known)
    np.testing.assert_array_equal(back[known].view(np.uint32), values[known].view(np.uint32))


def test_many_float32_read_back_bit_for_bit():
    # All exponents and signs, with mantissas that rounding twice could break.
    words = np.random.Generator(np.random.Philox(0)).integers(0, 2**32, 50_000, dtype=np.uint32)
    values = words.view(np.float32)
    values = values[np.isfinite(values)]
    back = _metrics_file._column([_metrics_file._cell("x", value) for value in values])
    np.testing.assert_array_equal(back.view(np.uint32), values.view(np.uint32))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=10))
def test_integers_stay_integers(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("metrics") / "metrics.csv"
    back = write_and_read(path, ["n"], [{"n": value} for value in values])["n"]
    assert back.dtype == np.int64
    assert back.tolist() == values


def test_the_file_as_people_see_it(tmp_path):
    path = tmp_path / "deep" / "metrics.csv"
    rows = [
        {"step": 1, "loss": 0.1, "noise": math.nan, "flag": True},
        {"step": np.int32(2), "loss": np.float32(1e-5), "noise": jnp.float32(512), "flag": False},
        {"step": jnp.uint32(3), "loss": jnp.bfloat16(0.5), "noise": math.inf},
        {"step": 2**40, "loss": np.float64(1e300), "noise": None, "flag": np.bool_(True)},
    ]
    back = write_and_read(path, ["step", "loss", "noise", "flag"], rows)
    assert path.read_text() == (
        "step,loss,noise,flag\n1,0.1,,1\n2,1e-05,512.0,0\n3,0.5,inf,\n1099511627776,inf,,1\n"
    )
    assert back["step"].tolist() == [1, 2, 3, 2**40]
    np.testing.assert_array_equal(back["loss"], np.float32([0.1, 1e-5, 0.5, np.inf]))
    np.testing.assert_array_equal(back["noise"], np.float32([np.nan, 512, np.inf, np.nan]))
    np.testing.assert_array_equal(back["flag"], [1, 0, np.nan, 1])


def test_integers_with_gaps_stay_exact(tmp_path):
    rows = [{"n": 2**40 + 1}, {}, {"n": -3}]
    back = write_and_read(tmp_path / "m.csv", ["n"], rows)["n"]
    np.testing.assert_array_equal(back, np.array([2**40 + 1, np.nan, -3]))


def test_columns_without_values(tmp_path):
    assert write_and_read(tmp_path / "m.csv", ["a", "b"], [])["b"].shape == (0,)
    empty = write_and_read(tmp_path / "m.csv", ["a", "b"], [{"a": 1}, {"a": 2}])["b"]
    assert empty.dtype == np.float32
    assert np.isnan(empty).all()


def test_a_single_column_of_gaps(tmp_path):
    assert write_and_read(tmp_path / "m.csv", ["a"], [{}, {"a": 1.5}, {}])["a"].shape == (3,)


def test_the_file_is_readable_while_the_run_goes_on(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    path = tmp_path / "metrics.csv"
    writer = MetricsWriter(path, ["step"])
    assert path.read_text() == "step\n"
    writer.write({"step": 1})
    clock.now += 10
    writer.write({"step": 2})
    assert read_metrics(path)["step"].tolist() == [1, 2]
    writer.write({"step": 3})
    writer.close()
    writer.close()
    assert read_metrics(path)["step"].tolist() == [1, 2, 3]


def test_rows_survive_an_error(tmp_path):
    path = tmp_path / "metrics.csv"

    def failing_run():
        with MetricsWriter(path, ["step"]) as writer:
            writer.write({"step": 1})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_run()
    assert read_metrics(path)["step"].tolist() == [1]


def test_a_half_written_row_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.5\n2,0.2")
    back = read_metrics(path)
    assert back["step"].tolist() == [1]
    assert back["loss"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no header"),
        ("step,loss\n1,0.5\n2\n", "line 3 has 1 cells, the header has 2"),
        ("step\none\n", "could not convert"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_metrics(path)
    assert str(path) in str(caught.value)


def test_wrong_rows_are_named(tmp_path):
    with MetricsWriter(tmp_path / "m.csv", ["step"]) as writer:
        with pytest.raises(ValueError, match=r"unknown columns \['loss'\]"):
            writer.write({"step": 1, "loss": 2})
        for value in (np.zeros(2), "1", 1j, [1.0]):
            with pytest.raises(ValueError, match=r"step=.* is not a scalar number"):
                writer.write({"step": value})
    for columns in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="columns must be distinct"):
            MetricsWriter(tmp_path / "m.csv", columns)
