"""The command, as a user runs it: messages, exit status, files."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest

from adabatch_jax.cli import main
from adabatch_jax.training import _train, load_dataset
from adabatch_jax.training.spectrum import _command
from tests.marks import slow


def test_a_small_run_prints_its_result_and_where_it_lies(tmp_path, capsys):
    status = main(["train", "--model", "logistic", "--epochs", "2", "--out", str(tmp_path / "a")])
    said = capsys.readouterr().out
    assert status == 0
    assert "test accuracy 0." in said
    assert f"summary.json, run.png and checkpoint are in {tmp_path / 'a'}" in said
    assert "\x1b" not in said, "piped output carries no control characters"
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["examples"] == 2 * 1437


def test_help_that_nobody_reads_on_is_no_error(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["train", "--help"]) == 0
        print("what follows goes nowhere")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing subcommand"),
        (["fly"], "Unrecognized options: fly"),
        (["train", "--wings", "2"], "--wings"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--dataset", "cifar"], "--dataset must be one of digits, mnist, fashion-mnist"),
        (["train", "--eta", "0"], "--eta must be a positive number, got 0.0"),
        (["train", "--initial-batch-size", "0"], "--initial-batch-size must be a positive integer"),
        (["train", "--initial-batch-size", "64", "--max-batch-size", "32"], "exceeds"),
        (["train", "--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
        (
            ["train", "--auto", "--learning-rate", "0.1"],
            "--auto decides by itself, leave out --lea",
        ),
        (["train", "--auto", "--criterion", "none"], "leave out --criterion none"),
        (["train", "--criterion", "none", "--eta", "0.5"], "leave out --eta 0.5"),
        (["train", "--auto", "--no-debias"], "leave out --no-debias"),
        (
            ["train", "--max-batch-size", "8"],
            "--max-batch-size 8 is below the first batch, 16 by d",
        ),
        (["train", "--debias", "perhaps"], "--debias must be False or True, got 'perhaps'"),
        (
            ["train", "--schedule", "autowu", "--learning-rate", "1"],
            "leave out --learning-rate 1.0",
        ),
        (
            ["train", "--schedule", "autowu", "--epochs", "2"],
            "train: --schedule autowu with --epochs 2 and --initial-batch-size 16: ",
        ),
        (["train", "--out", "/dev/null/below"], "--out /dev/null/below cannot be written"),
        (["spectrum", "--wings", "2"], "--wings"),
        (["spectrum", "--batch-sizes", "some"], "--batch-sizes"),
        (["spectrum", "--matrix", "fisher"], "--matrix must be one of hessian, gauss-newton"),
        (
            ["spectrum", "--run", "a", "--model", "mlp"],
            "--run has a model of its own, leave out --m",
        ),
        (["spectrum", "--examples", "1438"], "--examples 1438 exceeds the 1437 training examples"),
        (["spectrum", "--batch-sizes", "16", "2000"], "--batch-sizes 2000 exceeds the 1437 exam"),
        (["spectrum", "--run", "nowhere"], "--run nowhere is not the folder of a finished run"),
        (["spectrum", "--out", "/dev/null/below"], "--out /dev/null/below cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1 and output.err.startswith("adabatch-jax: ")
    assert output.out == ""


@pytest.mark.slow
def test_a_rate_that_was_found_is_told(tmp_path, capsys):
    """Slow: a whole run with a Gaussian process in its step."""
    arguments = ["--schedule", "autowu-improved", "--criterion", "none", "--model", "logistic"]
    assert main(["train", *arguments, "--epochs", "2", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    warmup = json.loads((tmp_path / "summary.json").read_text())["warmup"]
    assert warmup["minimum_found"] == (warmup["ended"] != "AT_LIMIT")
    if warmup["minimum_found"]:
        told = r"peak learning rate \S+, found in \d+ examples \((minimum passed|diverged)"
    else:
        told = r"no minimum of the loss was found in the \d+ examples of the warm-up \(at limit"
    assert re.search(told, said)


def test_a_run_too_short_to_search_says_so_and_learns(tmp_path, capsys):
    assert main(["train", "--auto", "--epochs", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("warning: --auto: the run is too short to find a learning rate: ")
    assert "has 8 steps of --initial-batch-size 16, and it takes 40" in " ".join(said.err.split())
    assert said.err.count("\n") == 1
    assert "no minimum of the loss was found, the run is too short to search: peak l" in said.out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test_accuracy"] >= 0.937, "three points below the same without --auto"
    assert (summary["warmup"]["ended"], summary["warmup"]["minimum_found"]) == ("NO_WARMUP", False)
    assert summary["warmup"]["peak_learning_rate"] > 1e-3


def test_a_warning_is_one_line_and_told_once(monkeypatch, capsys):
    def train(config):
        for _ in range(2):
            warnings.warn("two lines\nof text", stacklevel=1)
        return type("Result", (), {"summary": {}})

    monkeypatch.setattr("adabatch_jax.training.train", train)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["train"]) == 0
    assert capsys.readouterr().err == "warning: two lines of text\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--optimizer", "lanczos-sgd"],
            r"largest curvature \S+, momentum 0\.\d+ \(\d+ measurements",
        ),
        *slow(
            (
                ["--optimizer", "sgd", "--scaling", "random-matrix"],
                r"largest curvature \S+, noise bounds the rate below a batch size of \d+ \(\d+ meas",
            )
        ),
    ],
)
def test_a_curvature_that_was_measured_is_told(arguments, told, tmp_path, capsys):
    few = ["--model", "logistic", "--epochs", "1", "--criterion", "none", "--out", str(tmp_path)]
    assert main(["train", *arguments, *few]) == 0
    assert re.search(told, capsys.readouterr().out)


FEW = ["--examples", "64", "--batch-sizes", "8", "--probes", "2", "--steps", "8", "--seed", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "--model", "logistic", "--epochs", "1", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_a_trained_model_is_measured(trained, capsys):
    """Slow: a spectrum, for which many products are compiled."""
    assert main(["spectrum", "--run", str(trained), *FEW]) == 0
    said = capsys.readouterr().out
    assert f"Hessian of logistic ({trained / 'checkpoint'}), 650 parameters" in said
    assert f"spectrum.json and spectrum.png are in {trained}" in said
    assert "\x1b" not in said, "piped output carries no control characters"
    written = json.loads((trained / "spectrum.json").read_text())
    assert (written["dataset"], written["model"]) == ("digits", "logistic")
    assert written["batches"][0]["largest"] > written["full"]["largest"] > 0
    assert (trained / "spectrum.png").stat().st_size > 10_000
    assert (trained / "metrics.csv").exists(), "the run is still there"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run / "checkpoint"), "checkpoint: no checkpoint"),
        (lambda run: (run / "checkpoint" / "manifest.ocdbt").write_bytes(b"?"), "is damaged"),
        (lambda run: (run / "summary.json").write_text("{"), "summary.json is damaged"),
        (
            lambda run: (run / "summary.json").write_text(
                (run / "summary.json").read_text().replace('"logistic"', '"mlp"')
            ),
            "of another model",
        ),
    ],
    ids=["missing", "damaged", "no summary", "other model"],
)
def test_a_run_that_cannot_be_measured_is_one_line(trained, damage, message, tmp_path, capfd):
    run = shutil.copytree(trained, tmp_path / "run")
    damage(run)
    capfd.readouterr()
    assert main(["spectrum", "--run", str(run), "--out", str(tmp_path / "out"), *FEW]) == 2
    output = capfd.readouterr()
    assert message in output.err and str(run) in output.err
    assert output.err.count("\n") == 1 and output.out == ""
    assert not (tmp_path / "out").exists()


def test_an_interrupted_measurement_writes_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_command, "measure_subject", interrupted)
    assert main(["spectrum", "--out", str(tmp_path), *FEW]) == 130
    assert capsys.readouterr().err == "adabatch-jax: interrupted: nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_one_line_and_leaves_nothing_behind(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03\x00\x00")
    arguments = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main(["train", "--dataset", "mnist", *arguments]) == 2
    assert "train-images-idx3-ubyte" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_module_runs_as_the_command_does():
    done = subprocess.run(
        [sys.executable, "-m", "adabatch_jax", "train", "--eta", "-1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "adabatch-jax: train: --eta must be a positive number, got -1.0"
    )


def test_resume_alone_means_always(tmp_path, capsys):
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == f"adabatch-jax: train: --resume: no checkpoint in {tmp_path / 'state'}\n"
    assert main(["train", "--out", str(tmp_path), "--resume"]) == 2


def test_data_that_cannot_be_learned_are_refused_before_a_file_is_written(
    tmp_path, capsys, monkeypatch
):
    digits = load_dataset("digits")
    wrong = digits._replace(train_labels=digits.train_labels + 1)
    monkeypatch.setattr(_train, "load_dataset", lambda *_: wrong)
    assert main(["train", "--out", str(tmp_path / "out")]) == 2
    assert "label 10 of example" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_text_is_learned(tmp_path, capsys):
    """Slow: a whole run of a transformer."""
    words = "the quick brown fox jumps over the lazy dog "
    (tmp_path / "text").write_text(words * 400)
    arguments = ["--dataset", "text", "--data-file", str(tmp_path / "text"), "--epochs", "4"]
    arguments += ["--model", "transformer", "--optimizer", "adam", "--learning-rate", "0.003"]
    arguments += ["--eta", "0.1"]  # one sentence again and again is not noisy
    assert main(["train", *arguments, "--out", str(tmp_path / "out")]) == 0
    assert "test accuracy" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["bits_per_byte"] == pytest.approx(summary["test_loss"] / math.log(2))
    assert summary["bits_per_byte"] < 4.5, (
        "eight for a guess, four and a half for its letters alone"
    )
    assert summary["final_batch_size"] > summary["initial_batch_size"]
