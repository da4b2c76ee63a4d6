"""The command `adabatch-jax`: thin, since everything it does can be imported."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import adabatch_jax

USAGE_ERROR = 2  # exit status for anything wrong with the arguments or the data they name
RUN_ERROR = 1  # exit status for a run that started and could not finish


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Args:
      arguments: the command line without the program's name; None: that of the process.

    Returns:
      0; 1 if training failed; 2 if the arguments or the data are unusable; 130 after Ctrl-C, 143 after
      SIGTERM. All but 0 come with one line that says why.
    """
    arguments = _spelled_out(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"adabatch-jax {adabatch_jax.__version__}")
        return 0
    try:
        import tyro

        from adabatch_jax import training
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("adabatch_jax"):
            raise
        return _fail(
            f"{error.name} is missing: pip install 'adabatch-jax[train]' installs what it needs",
            USAGE_ERROR,
        )
    said = io.StringIO()
    commands: dict[str, Callable[..., Any]] = {
        "train": training.TrainConfig,
        "spectrum": training.SpectrumConfig,
    }
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="adabatch-jax",
                description="Train while the batch size follows the noise of the gradient, "
                "and measure the curvature of what was trained.",
                args=arguments,
            )
    except SystemExit as stop:
        if not stop.code:
            return 0
        command = commands.get("".join(arguments[:1]), dict)
        return _fail(_unboxed(said.getvalue(), command), USAGE_ERROR)
    except BrokenPipeError:
        # --help | head: what is left has no reader, and the flush at exit must not find that out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as error:
        return _fail(str(error), USAGE_ERROR)
    try:
        if isinstance(config, training.SpectrumConfig):
            measured = training.report_spectrum(config)
            training.show_spectrum(measured.summary, config.output)
        else:
            with _one_line_warnings():
                result = training.train(config)
            if result.summary:  # of several processes, the first has it
                _show(result)
    except (ValueError, OSError) as error:
        return _fail(str(error), USAGE_ERROR)
    except training.ProcessLost as error:
        _fail(str(error), RUN_ERROR)
        os._exit(RUN_ERROR)  # the usual end would wait for processes that are not there
    except training.TrainingError as error:
        return _fail(str(error), RUN_ERROR)
    except training.RunInterrupted as stop:
        return _fail(str(stop), 128 + stop.number)
    except KeyboardInterrupt:
        spectrum = isinstance(config, training.SpectrumConfig)
        left = "nothing was written" if spectrum else "metrics.csv holds the steps that were made"
        return _fail(f"interrupted: {left}", 130)
    return 0


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--resume` alone as `--resume always`, and `--debias`, `--no-debias` alike.

    The parser cannot: left out, they are neither yes nor no.
    """
    alone = {"--resume": ["--resume", "always"], "--debias": ["--debias", "True"]}
    alone["--no-debias"] = ["--debias", "False"]
    spelled: list[str] = []
    for number, argument in enumerate(arguments):
        is_alone = all(a.startswith("--") for a in arguments[number + 1 :][:1])
        spelled += alone.get(argument, [argument]) if is_alone else [argument]
    return spelled


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Python's warnings as lines of their own, each once, without the place in the code."""
    told: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        line = " ".join(str(message).split())
        if line not in told:
            print(f"warning: {line}", file=sys.stderr, flush=True)
        told.add(line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _show(result: Any) -> None:
    from adabatch_jax.training.record import tell_warmup

    s = result.summary
    bits = f" ({s['bits_per_byte']:.3f} bits per byte)" if "bits_per_byte" in s else ""
    print(
        f"test accuracy {s['test_accuracy']:.4f}, loss {s['test_loss']:.4f}{bits} after "
        f"{s['optimizer_steps']} steps on {s['examples']} examples; batch size "
        f"{s['initial_batch_size']} → {s['final_batch_size']}; {s['train_step_compilations']} "
        f"compilations, {s['seconds']:.1f} s ({s['seconds_waited_for_compilations']:.1f} s waiting for "
        "them)"
    )
    if "warmup" in s:
        print(tell_warmup(s["warmup"]))
    if "curvature" in s:
        c = s["curvature"]
        found = f"largest curvature {c['curvature_largest']:.3g}"
        if "momentum" in c:
            found += f", momentum {c['momentum']:.3g}"
        if "transition_batch_size" in c:
            found += (
                f", noise bounds the rate below a batch size of {c['transition_batch_size']:.0f}"
            )
        failed = f", {c['failed_refreshes']} more failed" if c["failed_refreshes"] else ""
        print(f"{found} ({c['refreshes']} measurements{failed})")
    if s["skipped_steps"]:
        print(f"{s['skipped_steps']} steps were skipped: loss or gradient not finite")
    print(f"metrics.csv, summary.json, run.png and checkpoint are in {s['config']['out']}")


_KINDS = {"INT": "an integer", "FLOAT": "a number", "{[INT [INT ...]]}": "integers"}
# Python's words for a number that is none, the parser's for several types and for a value missing.
_NO_NUMBER = (
    r"Error parsing (--\S+): (?:invalid literal for (int)|could not convert .* to (float)).*: (.*)"
)
_NO_TYPE = (
    r"Error parsing (--\S+): no type matching {None}\|(.+?) could be instantiated from \[(.*?)\]"
)
_NO_CHOICE = r"invalid choice (.*) for argument '(--\S+)'\. Expected one of \((.*)\)\."
_NO_VALUE = r"Missing value for argument .*?(--[\w-]+)"


def _unboxed(text: str, command: Callable[..., Any]) -> str:
    """One line out of the box that the argument parser draws around its message.

    A wrong choice is said in the words of the configuration that `command` makes.
    The box holds a title, the message wrapped over some lines, a rule, and a pointer to --help. Where
    the output has no Unicode, it is drawn with minus signs, and the title has a rule below it.
    """
    title, *body = text.strip().splitlines() or [""]
    meant = dict.fromkeys(re.findall(r"^[│| ]+(--\w[\w-]*)", text, flags=re.MULTILINE))
    message: list[str] = []
    for line in (line.strip("│╰╯ ") for line in body):
        if not re.fullmatch("[─-]+", line):
            message.append(line)
        elif message:
            break
    title, said = title.strip("╭╮─ "), " ".join(message)
    if found := re.fullmatch(_NO_NUMBER, said):
        option, kind, value = found[1], _KINDS[(found[2] or found[3]).upper()], found[4]
        return f"{option} must be {kind}, got {value}"
    if found := re.match(_NO_TYPE, said):
        return f"{found[1]} must be {_KINDS.get(found[2], found[2])}, got {found[3]}"
    if found := re.match(_NO_CHOICE, said):
        field = {found[2].removeprefix("--").replace("-", "_"): found[1].strip("'")}
        try:
            command(**field)
        except ValueError as error:
            return str(error)
        # The parser holds them in a set, whose order differs from run to run.
        choices = sorted(c for c in re.findall(r"'(.*?)'", found[3]) if c != "None")
        return f"{found[2]} must be {' or '.join(choices)}, got {found[1]}"
    if found := re.match(_NO_VALUE, said):
        return f"{found[1]} needs a value"
    said = re.sub(r"^Error parsing (Train|Spectrum)Config: ", "", said)
    if meant and said.startswith("Unrecognized"):
        said += f" (did you mean {' or '.join(meant)}?)"
    return said if title == "Value error" or said.startswith(title) else f"{title}: {said}"


def _fail(message: str, status: int) -> int:
    print("adabatch-jax: " + " ".join(message.split()), file=sys.stderr)
    return status
