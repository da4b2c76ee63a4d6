"""The command `spectrum`: progress while it measures, a table, spectrum.json and spectrum.png."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.progress
import rich.table

from adabatch_jax.training._files import prepare_output, write_json
from adabatch_jax.training.devices import between_steps
from adabatch_jax.training.plot import significant
from adabatch_jax.training.spectrum._config import SpectrumConfig
from adabatch_jax.training.spectrum._measure import SpectrumResult, load_subject, measure_subject
from adabatch_jax.training.spectrum._plot import plot_spectrum
from adabatch_jax.training.spectrum._theory import MOMENTUM

_SECONDS_BETWEEN_LINES = 10.0


def report_spectrum(config: SpectrumConfig) -> SpectrumResult:
    """Measures as configured, shows progress, and leaves spectrum.json and spectrum.png.

    Args:
      config: what to measure.

    Returns:
      What `measure_spectrum` returns.

    Raises:
      ValueError: the data, the run or its checkpoint cannot be used.
      OSError: the output folder cannot be written, or the data are not to be found.
    """
    subject = load_subject(config)
    out = prepare_output(config.output)  # shows that it can be written, before any time is spent
    with _Progress() as progress, between_steps(signal.SIGINT) as requested:

        def on_progress(what: str, share: float) -> None:
            if requested():
                raise KeyboardInterrupt
            progress.update(what, share)

        result = measure_subject(subject, on_progress)
    write_json(out / "spectrum.json", result.summary)
    trained = "fresh" if config.run is None else "trained"
    title = f"{subject.source.dataset} · {subject.source.model} · {trained}"
    plot_spectrum(result.summary, result.density, title=title, path=out / "spectrum.png")
    return result


def show_spectrum(summary: Mapping[str, Any], out: Path) -> None:
    """Prints the numbers of a spectrum and where they lie."""
    full, matrix = summary["full"], summary["matrix"]
    hessian = matrix == "hessian"
    origin = summary["checkpoint"] or f"fresh, seed {summary['config']['seed']}"
    print(
        f"{'Hessian' if hessian else 'Gauss-Newton matrix'} of {summary['model']} ({origin}), "
        f"{summary['num_parameters']:,} parameters, on {summary['examples']:,} of "
        f"{summary['training_examples']:,} training examples of {summary['dataset']}"
    )
    print(
        f"λ₁ = {significant(full['largest'])}, λ_P = {significant(full['smallest'])} "
        f"({'converged' if full['converged'] else 'not converged: more --steps'}), "
        f"trace {_value(full['trace'], full['trace_standard_error'])}"
    )
    noise = summary["noise"]
    if hessian:
        ritz = summary["noise_from"] == "ritz"
        bottom = f", {significant(summary['noise_smallest'])} at the lower end" if ritz else ""
        print(f"noise ν² = {significant(noise)} ({summary['noise_from']} probe{bottom}), ", end="")
    else:
        sizes = ", ".join(map(str, summary["noise_from"]))
        print(f"noise σ² = {significant(noise)} (fitted to batches of {sizes}), ", end="")
    print(f"transition batch size b* = {significant(summary['transition_batch_size'])}")
    rich.console.Console(highlight=False).print(_table(summary["batches"], hessian))
    print(
        "theory: from λ and the noise. rate <: beyond it SGD diverges. sharpness: along the gradient."
    )
    if not all(row["converged"] for row in summary["batches"]):
        print("some batch spectra had not converged: more --steps")
    print(f"{summary['seconds']:.1f} s; spectrum.json and spectrum.png are in {out}")


def _table(rows: list[dict[str, Any]], hessian: bool) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    ends = {"largest": "λ₁", "smallest": "λ_P"} if hessian else {"largest": "λ₁"}
    columns = ["batch\nsize"]
    for symbol in ends.values():
        columns += [f"{symbol}\nmeasured", "\ntheory"]
    columns += ["rate <\nSGD", f"\nβ={MOMENTUM}", "sharp-\nness"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{row['batch_size']:,}"]
        for name in ends:
            cells.append(_value(row[name], row[f"{name}_standard_error"]))
            cells.append(significant(row[f"predicted_{name}"]))
        cells += [significant(row[k]) for k in ("max_learning_rate", "max_learning_rate_momentum")]
        cells.append(significant(row["batch_sharpness"]))
        table.add_row(*cells)
    return table


def _value(value: float, error: float) -> str:
    return significant(value) + (f" ± {significant(error, 2)}" if math.isfinite(error) else "")


class _Progress:
    """A bar on a terminal, now and then a line anywhere else."""

    def __init__(self) -> None:
        self._bar: rich.progress.Progress | None = None
        self._next_line = 0.0
        if sys.stdout.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.percentage:>3.0f} %"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.description}", style="dim"),
                rich.progress.TimeRemainingColumn(),
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task("compiling", total=1.0)

    def update(self, what: str, share: float) -> None:
        """Says what is being done now."""
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=share)
        elif time.monotonic() >= self._next_line:
            print(f"{100 * share:3.0f} %  {what}", flush=True)
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
