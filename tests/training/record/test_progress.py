"""The progress display: it suits where it goes, and costs nothing per step."""

import io
import math

import jax.numpy as jnp
import pytest
import rich.console

from adabatch_jax.training.record import Progress, _progress


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(_progress.time, "monotonic", lambda: self.now)


class Untouchable:
    """A device value that must not be waited for."""

    def __float__(self):
        raise AssertionError("read without need")

    __int__ = __float__


def console(terminal):
    return rich.console.Console(
        file=io.StringIO(), force_terminal=terminal, width=100, legacy_windows=False
    )


def test_plain_lines_about_every_tenth(monkeypatch):
    clock = Clock(monkeypatch)
    out = console(terminal=False)
    with Progress(1000, out) as progress:
        for examples in range(8, 1001, 8):
            clock.now += 1
            progress.update(examples, 2.0, 8, 0.01, math.nan if examples < 300 else 400.2)
    lines = out.file.getvalue().splitlines()
    assert lines[0] == "training on 1,000 examples"
    percents = [int(line.split("%")[0]) for line in lines[1:]]
    assert percents == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert all(ord(" ") <= ord(char) < 127 for line in lines for char in line)
    assert "504 examples" in lines[5]
    assert "loss 2 " in lines[5]
    assert "batch size 8 " in lines[5]
    assert "learning rate 0.01 " in lines[5]
    assert "noise scale 400 " in lines[5]
    assert "noise" not in lines[1]
    # One second per 8 examples: 496 examples are left.
    assert lines[5].endswith("0:01:02 left")
    assert "left" not in lines[-1]


def test_plain_lines_of_large_steps():
    out = console(terminal=False)
    with Progress(100, out) as progress:
        for examples in (35, 95, 130):
            progress.update(examples, 1.0, 35, 0.1, 1.0)
    percents = [line.split("%")[0].strip() for line in out.file.getvalue().splitlines()[1:]]
    assert percents == ["35", "95", "100"]


def test_a_run_that_ends_early_or_late():
    out = console(terminal=False)
    with Progress(100, out) as progress:
        progress.update(20, 1.0, 20, 0.1, 1.0)
        progress.update(25, 1.0, 5, 0.1, 1.0)
    assert [line[:5] for line in out.file.getvalue().splitlines()[1:]] == [" 20 %", " 25 %"]
    out = console(terminal=False)
    with Progress(100, out) as progress:
        for examples in (100, 110, 120):
            progress.update(examples, 1.0, 10, 0.1, 1.0)
    assert len(out.file.getvalue().splitlines()) == 3
    out = console(terminal=False)
    with Progress(100, out):
        pass
    assert out.file.getvalue() == "training on 100 examples\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_values_are_only_read_when_shown(monkeypatch, terminal):
    clock = Clock(monkeypatch)
    out = console(terminal)
    with Progress(10_000, out) as progress:
        progress.update(10, 1.0, 10, 0.1, 1.0)
        for examples in range(20, 900, 10):
            progress.update(examples, *[Untouchable()] * 4)
        clock.now += 60
        progress.update(2000, jnp.float32(0.25), jnp.int32(128), jnp.float32(0.1), jnp.inf)
    assert "loss 0.25" in out.file.getvalue()


def test_a_skipped_step_has_no_learning_rate():
    out = console(terminal=False)
    with Progress(10, out) as progress:
        progress.update(10, math.nan, 10, math.nan, math.nan)
    assert out.file.getvalue().splitlines()[-1] == "100 %  10 examples  loss nan     batch size 10"


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_is_not_hidden(terminal):
    out = console(terminal)

    def failing_run():
        with Progress(1000, out) as progress:
            progress.update(10, 1.0, 10, 0.1, 1.0)
            progress._last = (20, *[Untouchable()] * 4)
            raise RuntimeError("the step failed")

    with pytest.raises(RuntimeError, match="the step failed"):
        failing_run()
    if terminal:
        assert out.file.getvalue().endswith("\x1b[?25h"), "the cursor is back"


def test_a_bar_on_a_terminal(monkeypatch):
    clock = Clock(monkeypatch)
    out = console(terminal=True)
    with Progress(60_000, out) as progress:
        for examples in (0, 6_000, 24_000):
            clock.now += 10
            progress.update(examples, 0.5321, 128, 0.0123, 512.0)
        screen = console(terminal=True)
        screen.print(progress._bar.get_renderable())
        progress.update(60_000, 0.25, 256, 0.0123, 512.0)
    bar, status = rich_text(screen.file.getvalue()).splitlines()
    assert bar.startswith(" 40 %")
    assert bar.rstrip().endswith("24,000 of 60,000 examples 0:00:30 left")
    assert "━" in bar
    words = " ".join(status.split())
    assert words == "loss 0.5321 batch size 128 learning rate 0.0123 noise scale 512"
    assert "60,000 of 60,000 examples" in rich_text(out.file.getvalue()), "the end is shown"
    assert "loss 0.25" in rich_text(out.file.getvalue())


def rich_text(text):
    return rich.text.Text.from_ansi(text).plain


def test_a_pipe_stays_plain_whatever_the_environment_says(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(10) as progress:
        progress.update(10, 1.0, 10, 0.1, 1.0)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2
    assert "\x1b" not in out


def test_a_run_needs_examples():
    with pytest.raises(ValueError, match="total_examples must be at least 1, got 0"):
        Progress(0)
