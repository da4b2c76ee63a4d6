"""A whole run: output folder, progress, checkpoints, the steps, and what they lead to."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import rich.console
from jax.experimental import multihost_utils

import adabatch_jax as adabatch
from adabatch_jax._types import PyTree
from adabatch_jax.training._config import TrainConfig
from adabatch_jax.training._files import prepare_output, write_json
from adabatch_jax.training._loop import ProcessLost, Run
from adabatch_jax.training._plan import RunPlan, resolve
from adabatch_jax.training._run_state import RunState
from adabatch_jax.training.checkpoint import Checkpoints, data_checksum, save_params
from adabatch_jax.training.data import Dataset, check_dataset, load_dataset, load_text
from adabatch_jax.training.devices import RunInterrupted, between_steps, connect
from adabatch_jax.training.plot import plot_run
from adabatch_jax.training.record import (
    COLUMNS,
    EventWriter,
    MetricsWriter,
    Progress,
    Row,
    check_tensorboard,
    describe_warmup,
    note_warmup,
    read_metrics,
    was_searched,
)
from adabatch_jax.training.step import make_evaluation


class TrainResult(NamedTuple):
    """What a run returns: trained parameters, the rows of metrics.csv by column, the summary.

    In a run of several processes the first has them all; the others have parameters only.
    """

    params: PyTree
    columns: dict[str, Any]
    summary: dict[str, Any]


def train(config: TrainConfig, *, console: rich.console.Console | None = None) -> TrainResult:
    """Trains as configured, shows progress, and leaves metrics.csv, summary.json, run.png and checkpoint.

    With `tensorboard` the columns of metrics.csv are event files as well, in OUT/tensorboard.
    With `checkpoint_every` the state of the run is saved while it goes on, in OUT/state, and `resume`
    goes on with the newest; SIGTERM saves it in any case. The same bits come out as if nothing had
    happened, on the same machine. Several processes (`coordinator`, `distributed`) make one run: the
    first reads and writes the files.

    Args:
      config: the run.
      console: a `rich` console for the progress display; None: standard output.

    Returns:
      Parameters, metrics by column and the summary: `test_accuracy` and `test_loss` (fraction, nats),
      `optimizer_steps`, `examples`, `initial_batch_size`, `final_batch_size` (the largest that a step
      used: the very last takes what is left of the budget), `train_step_compilations` (programs: a
      gradient for each size of micro-batch, and the update), `seconds` (training alone),
      `seconds_waited_for_compilations` (of those; the next size is compiled while training goes on),
      `skipped_steps`, `resumed_after` (the step of the checkpoint that the run went on from, or None),
      `bits_per_byte` of a text, the configuration and, where a rate was to be found, `warmup`: why it
      `ended`, whether a `minimum_found` of the loss decided, after how many `examples`, the
      `peak_learning_rate` at the first batch size, `tests` and `setbacks`; where the curvature was
      measured, `curvature`: what it was last, `refreshes` and `failed_refreshes`.

    Raises:
      ValueError: the data cannot be used; `tensorboard` without tensorboardX.
      OSError: the output folder cannot be written.
      TrainingError: the loss stays not finite.
      ProcessLost: another process of the run does not answer.
      RunInterrupted: Ctrl-C or SIGTERM ended the run between two steps.

    Example:
      >>> import tempfile
      >>> from adabatch_jax.training import TrainConfig, train
      >>> with tempfile.TemporaryDirectory() as out:
      ...     result = train(TrainConfig(model="logistic", epochs=1, out=out))
      training on 1,437 examples...
      >>> result.summary["examples"]
      1437
    """
    if config.tensorboard:
        check_tensorboard()
    if config.distributed is not None or config.coordinator is not None:
        others = config.coordinator, config.num_processes, config.process_id
        connect(*others, patience=config.patience)
    dataset = _load(config)
    plan = resolve(config, len(dataset.train_labels))
    # What the run refuses, it refuses before a line or a file is written.
    every = config.checkpoint_every
    run = Run(plan, dataset, devices=config.devices, checkpoint_every=every)
    main = jax.process_index() == 0
    out = prepare_output(config.output) if main else config.output

    def warn(line: str) -> None:
        to = console or rich.console.Console(stderr=True)
        to.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)

    if main and (lack := plan.lack_of_steps) is not None:
        warn(f"--auto: {lack}; it is taken from the length of the parameters instead")
    checkpoints = Checkpoints(
        out / "state",
        {**plan.identity, "checksum of the data": _checksum(dataset)},
        budget=run.budget,
        lag=plan.lag,
        keep=config.keep,
        warn=warn,
    )
    begin = _beginning(config, checkpoints, run.first)
    done, seconds = _make_steps(config, run, begin, checkpoints, out, console)
    if not main:
        return TrainResult(done.params, {}, {})
    return _leave_results(plan, dataset, run, done, out, seconds, begin.step)


def _make_steps(
    config: TrainConfig,
    run: Run,
    begin: RunState,
    checkpoints: Checkpoints,
    out: Path,
    console: rich.console.Console | None,
) -> tuple[RunState, float]:
    """Makes the steps, with progress, metrics.csv and checkpoints on the way.

    Returns:
      The state after the last step, and the seconds that all steps took, those before `begin` included.

    Raises:
      TrainingError, ProcessLost, RunInterrupted: as for `train`.
    """
    several = jax.process_count() > 1
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        main = jax.process_index() == 0
        record = _recorder(config, out, run, begin, console, stack) if main else _silence()
        on_row, flush = record
        numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
        requested = stack.enter_context(between_steps(*numbers))

        calls = itertools.count()

        def after_step(number: int, now: Callable[[], RunState]) -> None:
            stopped = requested()
            call = next(calls)  # not the step: the processes agree on one of the next calls
            if several and multihost_utils.reached_preemption_sync_point(call):
                stopped = signal.SIGTERM  # one of the processes got it, and all are at this step
            every = config.checkpoint_every
            if stopped == signal.SIGTERM or (every and (stopped or number % every == 0)):
                state = now()
                flush()  # the rows up to this step are on the disk before the checkpoint is
                checkpoints.save(state)
            if stopped:
                checkpoints.close()
                raise RunInterrupted(stopped, number, saved=bool(checkpoints.last_saved == number))

        start = time.perf_counter()
        try:
            done = run(begin, on_row, after_step)
        except jax.errors.JaxRuntimeError as error:
            if not several:
                raise
            raise ProcessLost(
                f"another process does not answer ({str(error).splitlines()[0][:200]}); start all "
                "again with --resume auto"
            ) from None
        seconds = begin.seconds + time.perf_counter() - start
        if config.checkpoint_every:
            flush()
            checkpoints.save(done)
    return done, seconds


def _leave_results(
    plan: RunPlan,
    dataset: Dataset,
    run: Run,
    done: RunState,
    out: Path,
    seconds: float,
    resumed_after: int,
) -> TrainResult:
    """Judges what was trained, and writes summary.json, run.png and the checkpoint."""
    columns, options = read_metrics(out / "metrics.csv"), plan.options
    inputs, labels = jnp.asarray(dataset.test_inputs), jnp.asarray(dataset.test_labels)
    test_loss, test_accuracy = make_evaluation(run.apply)(done.params, inputs, labels)
    summary = {
        "test_accuracy": float(test_accuracy),
        "test_loss": float(test_loss),
        "optimizer_steps": len(columns["step"]),
        "examples": int(columns["examples"][-1]),
        "initial_batch_size": plan.initial_batch_size,
        "final_batch_size": int(columns["batch_size"].max()),
        "train_step_compilations": run.compilations,
        "seconds_waited_for_compilations": run.seconds_waited,
        "skipped_steps": int(columns["skipped"].sum()),
        "seconds": seconds,
        "resumed_after": resumed_after or None,
        "versions": {"adabatch_jax": adabatch.__version__, "jax": jax.__version__},
        "device": f"{run.num_devices} {jax.devices()[0].device_kind}",
        "config": {**dataclasses.asdict(options), "out": str(out)},
    }
    reached = f"test accuracy {test_accuracy:.3f}"
    if options.dataset == "text":
        summary["bits_per_byte"] = float(test_loss) / math.log(2)
        reached = f"{summary['bits_per_byte']:.3f} bits per byte"
    title = f"{options.dataset} · {options.model} · {options.optimizer} · {reached}"
    smoothed, warmup = None, None
    if plan.searches_rate:
        seen = adabatch.learning_rate.smoothed_losses(done.opt_state)
        warmup = describe_warmup(adabatch.metrics(done.opt_state), seen)
        smoothed = seen if was_searched(warmup) else None
        summary["warmup"] = warmup
    if plan.curvature_examples:
        summary["curvature"] = _curvature(adabatch.metrics(done.opt_state))
    save_params(out / "checkpoint", done.params)
    write_json(out / "summary.json", summary)
    note = note_warmup(warmup)
    plot_run(columns, title=title, smoothed=smoothed, note=note, path=out / "run.png")
    return TrainResult(done.params, columns, summary)


def _load(config: TrainConfig) -> Dataset:
    if config.data_file is not None:
        if not config.data_file.is_file():
            raise ValueError(f"train: --data-file {config.data_file}: there is no such file")
        dataset = load_text(config.data_file)
    else:
        dataset = load_dataset(config.dataset, config.data_dir)
    check_dataset(dataset)
    return dataset


def _checksum(dataset: Dataset) -> str:
    return data_checksum(dataset.train_inputs, dataset.train_labels)


def _beginning(config: TrainConfig, checkpoints: Checkpoints, first: RunState) -> RunState:
    """Where the run begins: anew, or at the newest checkpoint."""
    if config.resume in ("always", "auto"):
        found = checkpoints.restore(first)
        if found is None and config.resume == "always":
            raise ValueError(f"train: --resume: no checkpoint in {checkpoints.folder}")
        return first if found is None else found
    if jax.process_index() == 0:
        unfinished = checkpoints.unfinished()
        if config.resume is None and unfinished is not None:
            raise ValueError(
                f"train: {checkpoints.folder} holds an unfinished run, at step {unfinished}: "
                "--resume goes on with it, --resume never starts anew"
            )
        checkpoints.clear()
    return first


def _recorder(
    config: TrainConfig,
    out: Path,
    run: Run,
    begin: RunState,
    console: rich.console.Console | None,
    stack: contextlib.ExitStack,
) -> tuple[Callable[[Row], None], Callable[[], None]]:
    """What is done with every row of numbers, and a function that makes them outlive the process."""
    writer = stack.enter_context(MetricsWriter(out / "metrics.csv", COLUMNS, keep_rows=begin.step))
    events = None
    if config.tensorboard:
        given = out / "metrics.csv", begin.step, begin.seconds
        events = stack.enter_context(EventWriter(out / "tensorboard", *given))
    progress = stack.enter_context(Progress(run.budget, console, start=begin.position))

    def on_row(row: Row) -> None:
        writer.write(row)
        if events is not None:
            events.write(row)
        progress.update(
            row["examples"],
            float(row["loss"]),
            row["batch_size"],
            float(row["learning_rate"]),
            float(row["noise_scale"]),
        )

    return on_row, writer.flush


def _silence() -> tuple[Callable[[Row], None], Callable[[], None]]:
    return lambda row: None, lambda: None


def _curvature(shown: dict[str, Any]) -> dict[str, Any]:
    """What the last measurement of the curvature led to."""
    names = ("curvature_largest", "transition_batch_size", "momentum")
    counts = {k: int(shown[k]) for k in ("refreshes", "failed_refreshes")}
    return {**{k: float(shown[k]) for k in names if k in shown}, **counts}
