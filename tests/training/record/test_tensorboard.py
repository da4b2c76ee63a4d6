"""`--tensorboard`: the columns of metrics.csv, read back from the event files."""

import collections
import os
import shutil
import signal
import struct
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from adabatch_jax.cli import main
from adabatch_jax.training import RunInterrupted, TrainConfig, read_metrics, train
from adabatch_jax.training.record import EventWriter, MetricsWriter


def events(folder):
    """A file is records: length (8 bytes), its checksum (4), an event, its checksum (4)."""
    (file,) = folder.glob("events.out.tfevents.*")
    data = file.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert len(data) >= length + 16, "the file was not closed"
        yield Event.FromString(data[12 : 12 + length])
        data = data[length + 16 :]


def scalars(folder):
    """{tag: [(step, value)]}, and the step from which TensorBoard is to forget what it knew."""
    found, forgotten = collections.defaultdict(list), None
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            forgotten = event.step
        for value in event.summary.value:
            (number,) = value.tensor.float_val or [value.simple_value]
            found[value.tag].append((event.step, number))
    return found, forgotten


def check(out):
    """All of metrics.csv and nothing else, every step once."""
    columns = read_metrics(out / "metrics.csv")
    steps = columns.pop("step")
    found, forgotten = scalars(out / "tensorboard")
    assert forgotten == 0
    for name, values in columns.items():
        there = ~np.isnan(values)
        got = np.array(found.pop(name, np.empty((0, 2))))
        np.testing.assert_array_equal(got[:, 0], steps[there], err_msg=name)
        np.testing.assert_array_equal(np.float32(got[:, 1]), np.float32(values[there]))
    assert not found


@pytest.mark.slow
def test_a_run_that_was_stopped_and_resumed_has_every_step_once(tmp_path, monkeypatch):
    """Slow: a run in two parts."""
    write = EventWriter.write

    def signalled(self, row):
        write(self, row)
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    options = dict(model="logistic", optimizer="adam", epochs=1, max_batch_size=32)
    config = TrainConfig(**options, tensorboard=True, out=tmp_path, resume="auto")
    monkeypatch.setattr(EventWriter, "write", signalled)
    with pytest.raises(RunInterrupted):
        train(config)
    monkeypatch.setattr(EventWriter, "write", write)
    check(tmp_path)
    summary = train(config).summary
    assert summary["resumed_after"] >= 5 and summary["optimizer_steps"] > 40
    check(tmp_path)


ROWS = [dict(step=i, loss=1 / i, batch_size=16 * i, noise=np.nan, seconds=i) for i in range(1, 9)]


def write(folder, rows, **options):
    csv = folder / "metrics.csv"
    kept = options.get("keep_rows", 0)
    with (
        MetricsWriter(csv, list(ROWS[0]), keep_rows=kept) as metrics,
        EventWriter(folder / "tensorboard", csv, **options) as events,
    ):
        for row in rows:
            metrics.write(row)
            events.write(row)
            if row["step"] == 8:
                raise RuntimeError


@pytest.fixture
def written(tmp_path):
    """A run that an error ended after eight steps."""
    with pytest.raises(RuntimeError):
        write(tmp_path, ROWS)
    return tmp_path


def test_an_error_loses_no_step_and_what_is_not_known_is_left_out(written):
    check(written)
    assert set(scalars(written / "tensorboard")[0]) == {"loss", "batch_size", "seconds"}


@pytest.mark.parametrize("kept", [5, 0])
@pytest.mark.parametrize("before", ["with", "without"])
def test_only_the_steps_that_are_kept_remain(kept, before, written):
    """Five: a checkpoint is gone on with, whatever was written after it. None: a run starts anew."""
    if before == "without":
        shutil.rmtree(written / "tensorboard")
    write(written, ROWS[kept:7], keep_rows=kept, seconds=5.0)
    check(written)
    assert len(scalars(written / "tensorboard")[0]["loss"]) == 7


def test_without_tensorboardx_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["train", "--tensorboard", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "pip install 'adabatch-jax[tensorboard]'" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
