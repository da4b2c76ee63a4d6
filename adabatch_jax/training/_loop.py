"""The training loop: feed, step, report, until the budget of examples is used up."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import adabatch_jax as adabatch
from adabatch_jax.training._checkpoint import save_params
from adabatch_jax.training._classifier import classifier
from adabatch_jax.training._config import FINDS_ITS_RATE, TrainConfig
from adabatch_jax.training._data import Dataset, load_dataset
from adabatch_jax.training._feed import Feed
from adabatch_jax.training._ladder import rung_for
from adabatch_jax.training._optimizer import build_optimizer, known
from adabatch_jax.training._plot import plot_run
from adabatch_jax.training._progress import Progress
from adabatch_jax.training._report import MetricsWriter, read_metrics, write_json
from adabatch_jax.training._step import CompiledSteps, make_evaluation, make_step

PyTree = Any
MAX_SKIPPED_IN_A_ROW = 10
CURVATURE_GROUPS = 16  # between which the noise of the Hessian shows
HINTS = {"autowu": "Try --schedule autowu-improved, which goes back when the loss explodes"}
EVIDENCE = ("noise_numerator", "noise_denominator", "required_batch_size")
COLUMNS = (
    "step",
    "examples",
    "loss",
    "batch_size",
    "noise_numerator",
    "noise_denominator",
    "degrees_of_freedom",
    "required_batch_size",
    "next_batch_size",
    "test_status",
    "noise_scale",
    "learning_rate",
    "phase",
    "minimum_probability",
    "minimum_location",
    "setbacks",
    "momentum",
    "curvature_largest",
    "transition_batch_size",
    "refreshes",
    "micro_batch_size",
    "skipped",
    "seconds",
)


class TrainingError(RuntimeError):
    """Training cannot go on: every recent step gave a loss or gradient that is not finite."""


class TrainResult(NamedTuple):
    """What a run returns: trained parameters, the rows of metrics.csv by column, the summary."""

    params: PyTree
    columns: dict[str, Any]
    summary: dict[str, Any]


class Steps(NamedTuple):
    """What `run_steps` leaves behind."""

    params: PyTree
    opt_state: PyTree
    apply: Callable[..., jax.Array]  # (params, inputs) -> logits
    compilations: int


class _Launched(NamedTuple):
    """A step that was handed to the device and not yet read back."""

    row: dict[str, Any]
    report: dict[str, Any]


def run_steps(
    config: TrainConfig,
    dataset: Dataset,
    on_row: Callable[[dict[str, Any]], None],
) -> Steps:
    """Trains on every example once per epoch, and calls `on_row` with each step's numbers.

    The batch size of a step is the one decided `config.lag + 1` steps before. The last batch ends
    exactly at the budget.

    Returns:
      What the steps left behind.
    """
    params, apply = classifier(config.model, dataset, config.seed)
    num_examples = len(dataset.train_labels)
    config = config.resolved(num_examples)
    budget = config.epochs * num_examples
    optimizer = build_optimizer(config, budget)
    opt_state = optimizer.init(params)
    step = CompiledSteps(
        make_step(
            apply,
            optimizer,
            coordinate_wise=config.criterion == "coordinate-norm",
            inner_products=config.criterion in ("inner-product", "augmented"),
            curvature=_curvature_batch(config, num_examples),
        )
    )
    data = jax.device_put((dataset.train_inputs, dataset.train_labels))
    feed = Feed(num_examples, config.seed)
    first, largest = known(config.initial_batch_size), known(config.max_batch_size)
    if config.criterion == "none":
        largest = first
    skipped_in_a_row = 0
    batch_size = first
    launched: deque[_Launched] = deque()
    start = time.perf_counter()

    def read_oldest() -> int:
        nonlocal skipped_in_a_row
        row, report = launched.popleft()
        report = jax.device_get(report)
        next_batch_size = int(report.pop("batch_size"))
        row.update({k: v for k, v in report.items() if k in COLUMNS})
        row.update(next_batch_size=next_batch_size, seconds=time.perf_counter() - start)
        row["skipped"] = int(row["skipped"])
        if row["skipped"]:  # the state is that of the step before, and so is its evidence
            row.update(dict.fromkeys(EVIDENCE, np.float32(np.nan)))
        if row["test_status"] == adabatch.BatchSizeStatus.AT_MAXIMUM:
            row["noise_scale"] = np.float32(np.nan)  # the last one measured, no longer this step's
        skipped_in_a_row = skipped_in_a_row + 1 if row["skipped"] else 0
        on_row(row)
        if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"step {row['step']}: {MAX_SKIPPED_IN_A_ROW} steps in a row gave a loss or gradient "
                f"that is not finite (last loss {float(row['loss'])}); nothing was learned from them. "
                f"{HINTS.get(config.schedule or '', 'Try a smaller learning rate')}"
            )
        return next_batch_size

    position, number = 0, 0
    while position < budget:
        if len(launched) > config.lag:
            batch_size = read_oldest()
        rung = rung_for(
            batch_size,
            initial_batch_size=first,
            max_batch_size=largest,
            max_micro_batch_size=config.max_micro_batch_size,
            noise_groups=config.noise_groups,
        )
        length = min(batch_size, budget - position)
        indices, sizes = feed.grouped(position, length, rung.micro_batch_size, rung.num_groups)
        count = np.int32(-(-length // rung.micro_batch_size))
        params, opt_state, report = step(rung, params, opt_state, data, indices, sizes, count)
        position += length
        number += 1
        row = {
            "step": number,
            "examples": position,
            "batch_size": batch_size,
            "micro_batch_size": rung.micro_batch_size,
        }
        launched.append(_Launched(row, report))
    while launched:
        read_oldest()
    return Steps(params, opt_state, apply, step.compilations)


def _curvature(shown: dict[str, Any]) -> dict[str, Any]:
    """What the last measurement of the curvature led to."""
    names = ("curvature_largest", "transition_batch_size", "momentum")
    counts = {k: int(shown[k]) for k in ("refreshes", "failed_refreshes")}
    return {**{k: float(shown[k]) for k in names if k in shown}, **counts}


def _curvature_batch(config: TrainConfig, num_examples: int) -> np.ndarray | None:
    """Examples drawn once, [groups, group size]: the size that was asked for, rounded down."""
    if not config.measures_curvature:
        return None
    wanted = min(known(config.curvature_examples), num_examples)
    groups = min(CURVATURE_GROUPS, wanted)
    drawn = np.random.default_rng(config.seed).permutation(num_examples)
    return drawn[: wanted // groups * groups].reshape(groups, -1).astype(np.int32)


def train(config: TrainConfig, *, console: Any = None) -> TrainResult:
    """Trains as configured, shows progress, and leaves metrics.csv, summary.json, run.png and checkpoint.

    Args:
      config: the run.
      console: a `rich` console for the progress display; None: standard output.

    Returns:
      Parameters, metrics by column and the summary: `test_accuracy` and `test_loss` (fraction, nats),
      `optimizer_steps`, `examples`, `initial_batch_size`, `final_batch_size`,
      `train_step_compilations`, `seconds` (training alone), `skipped_steps`, the configuration and,
      where AutoWU found the rate, `warmup`: why it `ended`, after how many `examples`, the
      `peak_learning_rate` at the first batch size, `tests` and `setbacks`; where the curvature was
      measured, `curvature`: what it was last, `refreshes` and `failed_refreshes`.

    Raises:
      ValueError: the data cannot be used.
      OSError: the output folder cannot be written.
      TrainingError: the loss stays not finite.

    Example:
      >>> import tempfile
      >>> from adabatch_jax.training import TrainConfig, train
      >>> with tempfile.TemporaryDirectory() as out:
      ...     result = train(TrainConfig(model="logistic", epochs=1, out=out))
      training on 1,437 examples...
      >>> result.summary["examples"]
      1437
    """
    dataset = load_dataset(config.dataset, config.data_dir)
    total = config.epochs * len(dataset.train_labels)
    config = config.resolved(len(dataset.train_labels))
    build_optimizer(config, total)  # what it refuses, it refuses before a line or a file is written
    out = prepare_output(config.output)
    final_batch_size = known(config.initial_batch_size)
    skipped = 0
    with (
        MetricsWriter(out / "metrics.csv", COLUMNS) as writer,
        Progress(total, console) as progress,
    ):

        def on_row(row: dict[str, Any]) -> None:
            nonlocal final_batch_size, skipped
            final_batch_size = row["next_batch_size"]
            skipped += row["skipped"]
            writer.write(row)
            progress.update(
                row["examples"],
                float(row["loss"]),
                row["batch_size"],
                float(row["learning_rate"]),
                float(row["noise_scale"]),
            )

        start = time.perf_counter()
        done = run_steps(config, dataset, on_row)
        seconds = time.perf_counter() - start

    columns = read_metrics(out / "metrics.csv")
    inputs, labels = jnp.asarray(dataset.test_inputs), jnp.asarray(dataset.test_labels)
    test_loss, test_accuracy = make_evaluation(done.apply)(done.params, inputs, labels)
    summary = {
        "test_accuracy": float(test_accuracy),
        "test_loss": float(test_loss),
        "optimizer_steps": len(columns["step"]),
        "examples": int(columns["examples"][-1]),
        "initial_batch_size": config.initial_batch_size,
        "final_batch_size": final_batch_size,
        "train_step_compilations": done.compilations,
        "skipped_steps": skipped,
        "seconds": seconds,
        "versions": {"adabatch_jax": adabatch.__version__, "jax": jax.__version__},
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "config": {**dataclasses.asdict(config), "out": str(out)},
    }
    title = f"{config.dataset} · {config.model} · {config.optimizer} · test accuracy {test_accuracy:.3f}"
    smoothed = None
    if config.auto or config.schedule in FINDS_ITS_RATE:
        smoothed = adabatch.smoothed_losses(done.opt_state)
        summary["warmup"] = _warmup(adabatch.metrics(done.opt_state), smoothed)
    if config.measures_curvature:
        summary["curvature"] = _curvature(adabatch.metrics(done.opt_state))
    save_params(out / "checkpoint", done.params)
    write_json(out / "summary.json", summary)
    plot_run(columns, title=title, smoothed=smoothed, path=out / "run.png")
    return TrainResult(done.params, columns, summary)


def _warmup(shown: dict[str, Any], smoothed: adabatch.SmoothedLosses) -> dict[str, Any]:
    """How AutoWU's warm-up went; numbers that are not known are null."""
    return {
        "ended": adabatch.WarmupEnd(int(shown["warmup_end"])).name,
        "examples": smoothed.end,
        "peak_learning_rate": float(shown["peak_learning_rate"]),
        "tests": int(shown["tests_made"]),
        "setbacks": int(shown["setbacks"]),
    }


def prepare_output(folder: Path) -> Path:
    """Makes the folder and shows that it can be written to, before any time is spent.

    Raises:
      OSError: naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out {folder} cannot be written: {error.strerror or error}") from None
    return folder
