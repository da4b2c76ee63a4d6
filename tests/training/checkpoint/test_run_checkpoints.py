"""A run that is left and gone on with: the same bits, or a line that says why not."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from adabatch_jax.training import (
    RunInterrupted,
    TrainConfig,
    TrainingError,
    _train as training,
    train,
)
from adabatch_jax.training.checkpoint import _run_checkpoints
from adabatch_jax.training.record import _rows
from tests.marks import slow

EVERY = 10
OPTIONS = dict(model="logistic", optimizer="adam", epochs=2, checkpoint_every=EVERY, lag=1)
OPTIONS |= dict(max_batch_size=64)


def run(out, console=None, **changes):
    return train(TrainConfig(**(OPTIONS | changes), out=out), console=console)


def rows(out):
    """metrics.csv but for its last column, the seconds."""
    return [line.rsplit(",", 1)[0] for line in (out / "metrics.csv").read_text().splitlines()]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, run(out)


@pytest.fixture
def copied(whole, tmp_path):
    """The folder of a finished run whose last checkpoint is gone: it ended some steps before its end."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    last = max(steps(out))
    shutil.rmtree(out / "state" / str(last))
    return out


def steps(out):
    return sorted(int(p.name) for p in (out / "state").iterdir())


def test_the_newest_checkpoints_are_kept_and_the_last_is_that_of_the_end(whole):
    out, result = whole
    last = result.summary["optimizer_steps"]
    assert last % EVERY, "the end must not fall on a multiple"
    assert steps(out) == [last // EVERY * EVERY - EVERY, last // EVERY * EVERY, last]


def test_going_on_gives_the_same_bits(whole, copied):
    begun = max(steps(copied))
    found = run(copied, resume="always")
    same(found, whole[1])
    assert rows(copied) == rows(whole[0])
    assert found.summary["resumed_after"] == begun
    assert found.summary["seconds"] > whole[1].columns["seconds"][begun - 1]


def test_a_run_that_has_ended_ends_again(whole, copied):
    run(copied, resume="auto")
    found = run(copied, resume="auto")
    assert found.summary["train_step_compilations"] == 0
    same(found, whole[1])
    assert rows(copied) == rows(whole[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, *slow(signal.SIGINT)])
def test_a_signal_saves_between_two_steps(number, whole, tmp_path, monkeypatch):
    read = _rows.RowReader.__call__

    def read_and_signal(reader, row, *arguments):
        if row["step"] == 3:
            signal.raise_signal(number)
        return read(reader, row, *arguments)

    monkeypatch.setattr(_rows.RowReader, "__call__", read_and_signal)
    with pytest.raises(RunInterrupted, match=f"{number.name} after step 5; its state is saved"):
        run(tmp_path)  # with a lag of one, step 5 is under way when step 3 is read
    monkeypatch.undo()
    assert steps(tmp_path) == [5]
    assert not (tmp_path / "summary.json").exists()
    same(run(tmp_path, resume="auto"), whole[1])
    assert rows(tmp_path) == rows(whole[0])


def test_without_checkpoints_ctrl_c_saves_nothing_and_sigterm_does(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "between_steps", lambda *_: _given(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=r"metrics\.csv holds the steps made"):
        run(tmp_path, checkpoint_every=None)
    assert not (tmp_path / "state").exists()
    monkeypatch.setattr(training, "between_steps", lambda *_: _given(signal.SIGTERM))
    with pytest.raises(RunInterrupted, match="--resume goes on"):
        run(tmp_path, checkpoint_every=None)
    assert steps(tmp_path) == [1]


class _given:
    def __init__(self, number):
        self.number = number

    def __enter__(self):
        return lambda: self.number

    def __exit__(self, *_):
        return None


def test_an_unfinished_run_is_not_overwritten_unasked(whole, copied):
    before = rows(copied)
    with pytest.raises(ValueError, match=r"holds an unfinished run, at step .*--resume goes on"):
        run(copied)
    assert rows(copied) == before
    same(run(copied, resume="never"), whole[1])
    run(copied, epochs=1)  # a finished one is, as every other result in the folder


def test_nothing_to_resume_is_an_error_only_if_it_was_asked_for(tmp_path):
    with pytest.raises(ValueError, match="--resume: no checkpoint in"):
        run(tmp_path, resume="always")
    run(tmp_path, resume="auto", epochs=1)


def test_a_field_that_differs_is_named(copied):
    with pytest.raises(
        ValueError, match=r"run with --seed 0, this one has --seed 1: .*--resume nev"
    ):
        run(copied, resume="always", seed=1)
    averaged = dict(smoothing=0.9, debias=True)  # the state would have other fields
    was, now = "--no-debias, --smoothing left out", "--debias, --smoothing 0.9"
    with pytest.raises(ValueError, match=f"run with {was}, this one has {now}: give the same"):
        run(copied, resume="always", **averaged)
    run(copied, resume="always", keep=1, checkpoint_every=None)  # not part of the run


def _damages(state: Path, newest: int):
    """Ways to spoil a checkpoint, each leaving the others alone."""
    arrays = max((state / str(newest) / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    about = state / str(newest) / "about" / "metadata"

    def flip():
        content = bytearray(arrays.read_bytes())
        # One byte alone may lie where nothing is read: chunks are written in an order of their own.
        content[64::128] = bytes(byte ^ 4 for byte in content[64::128])
        arrays.write_bytes(content)

    def edit():
        text = about.read_text()
        about.write_text(
            text.replace(f'"examples": {json.loads(text)["examples"]}', '"examples": 1')
        )

    return {
        "flipped": flip,
        "cut": lambda: os.truncate(arrays, arrays.stat().st_size // 2),
        "gone": arrays.unlink,
        "no description": about.unlink,
        "half a description": lambda: os.truncate(about, about.stat().st_size // 2),
        "another number": edit,
    }


@pytest.mark.parametrize(
    "kind",
    [
        "flipped",  # "no description" is in the test below
        *slow("no description", "cut", "gone", "half a description", "another number"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(kind, whole, copied, capfd):
    old, newest = steps(copied)
    _damages(copied / "state", newest)[kind]()
    found = run(copied, resume="auto")
    said = capfd.readouterr().err
    assert f"state{os.sep}{newest}" in said and said.endswith("the one before is tried\n")
    assert said.count("\n") == 1, "one line, and no traceback"
    assert found.summary["resumed_after"] == old
    same(found, whole[1])
    assert rows(copied) == rows(whole[0])


def test_if_all_are_damaged_nothing_is_started(copied):
    for step in steps(copied):
        _damages(copied / "state", step)["no description"]()
    before = rows(copied)
    with pytest.raises(ValueError, match="all 2 checkpoints are damaged"):
        run(copied, resume="auto")
    assert rows(copied) == before


def test_a_newer_format_is_refused(copied):
    about = copied / "state" / str(max(steps(copied))) / "about" / "metadata"
    about.write_text(about.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(ValueError, match="has format 3, this version of adabatch_jax reads 2"):
        run(copied, resume="auto")


def test_another_machine_is_told(whole, copied, monkeypatch):
    here = _run_checkpoints._environment()
    monkeypatch.setattr(_run_checkpoints, "_environment", lambda: here | {"cores": 96})
    console = Console(file=open(copied / "said", "w"), width=200)  # noqa: SIM115
    run(copied, console=console, resume="always")
    console.file.close()
    assert f"cores {here['cores']} (now 96)" in (copied / "said").read_text()


def test_metrics_that_are_too_short_are_refused(copied):
    lines = (copied / "metrics.csv").read_text().splitlines(keepends=True)
    (copied / "metrics.csv").write_text("".join(lines[:5]))
    with pytest.raises(ValueError, match=r"has 4 rows, .* are needed to go on"):
        run(copied, resume="always")


def test_a_folder_that_cannot_hold_checkpoints_ends_the_run(tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(OSError, match="a checkpoint cannot be written"):
        run(tmp_path, resume="auto")


def test_the_count_of_skipped_steps_goes_on(tmp_path, monkeypatch):
    """Nine steps skipped before the checkpoint and one after it make ten in a row."""
    monkeypatch.setattr(_rows, "MAX_SKIPPED_IN_A_ROW", EVERY + 1)
    monkeypatch.setattr(
        "adabatch_jax.training.models._classifier._mean_and_deviation",
        lambda _: (0.0, float("nan")),
    )
    with pytest.raises(TrainingError, match=f"step {EVERY + 1}:"):
        run(tmp_path)
    assert steps(tmp_path) == [EVERY]
    with pytest.raises(TrainingError, match=f"step {EVERY + 1}:"):
        run(tmp_path, resume="always")
