"""The command, as a user runs it: messages, exit status, files."""

import json
import re
import subprocess
import sys

import pytest

from adabatch_jax.cli import main


def test_a_small_run_prints_its_result_and_where_it_lies(tmp_path, capsys):
    status = main(["train", "--model", "logistic", "--epochs", "2", "--out", str(tmp_path / "a")])
    said = capsys.readouterr().out
    assert status == 0
    assert "test accuracy 0." in said and str(tmp_path / "a") in said
    assert "\x1b" not in said, "piped output carries no control characters"
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["examples"] == 2 * 1437


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
        (
            ["train", "--schedule", "autowu", "--learning-rate", "1"],
            "leave out --learning-rate 1.0",
        ),
        (["train", "--schedule", "autowu", "--epochs", "2"], "too short for one test"),
        (["train", "--out", "/dev/null/below"], "--out /dev/null/below cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1 and output.err.startswith("adabatch-jax: ")
    assert output.out == ""


def test_a_rate_that_was_found_is_told(tmp_path, capsys):
    arguments = ["--schedule", "autowu-improved", "--criterion", "none", "--model", "logistic"]
    assert main(["train", *arguments, "--epochs", "2", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"peak learning rate \S+, found in \d+ examples \((minimum|diverged|at)", said)


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
