"""What the argument parser says, in the words of the command."""

import pytest
import tyro

from adabatch_jax.cli import main


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--wings", "2"], "Unrecognized options: --wings, 2"),
        (["--datset", "x"], "Unrecognized options: --datset, x (did you mean --dataset?)"),
        (["--learning-rate", "fast"], "--learning-rate must be a number, got 'fast'"),
        (["--initial-batch-size", "1e3"], "--initial-batch-size must be an integer, got '1e3'"),
        (["--epochs", "2.5"], "--epochs must be an integer, got '2.5'"),
        (["--eta", "x"], "--eta must be a number, got 'x'"),
        (["--criterion"], "--criterion needs a value"),
        (
            ["--max-batch-size", str(2**30 + 16)],
            f"train: --max-batch-size must be at most 2**30, got {2**30 + 16}",
        ),
        (
            ["--dataset", "text", "--model", "transformer", "--data-file", "none"],
            "train: --data-file none: there is no such file",
        ),
    ],
)
@pytest.mark.parametrize("unicode", [True, False])
def test_a_bad_value_is_said_with_its_option(arguments, line, unicode, capsys, monkeypatch):
    """The parser draws its box by what standard output can show."""
    monkeypatch.setattr(tyro._fmtlib, "_should_use_utf8_drawing_chars", lambda: unicode)
    assert main(["train", *arguments]) == 2
    assert capsys.readouterr().err == f"adabatch-jax: {line}\n"
