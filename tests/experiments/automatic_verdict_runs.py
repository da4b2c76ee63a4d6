"""One run of `automatic_verdict.py`: a constant batch with a given rate, or `--auto`, on one of its tasks.

It is the loop of the command, given the same options, with its data cut into a part to train on and a part
to choose on. A constant batch looks at no noise, so it takes the fewest groups that the command allows.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adabatch_jax as adabatch
from adabatch_jax.training import Dataset, TrainConfig, TrainingError, load_dataset, resolve
from adabatch_jax.training._loop import Run
from adabatch_jax.training.data import load_text
from adabatch_jax.training.step import make_evaluation

MOMENTS = 20  # at which a run's batch size and rate are kept
FILES: dict[str, Path | None] = {"mnist": None, "text": None}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained; `sizes` are the constant batches, `first` the first batches of `--auto`.

    `seeds` are those of the sizes that are not the best one; the best and `--auto` have three.
    """

    name: str
    dataset: str
    model: str
    epochs: int
    optimizers: tuple[str, ...]
    sizes: tuple[int, ...] = (64, 256, 1024)
    first: tuple[int, ...] = (256,)
    seeds: int = 1
    text_bytes: int | None = None  # of the file; None: all

    @property
    def text(self) -> bool:
        return self.dataset == "text"

    def __str__(self) -> str:
        return f"{self.name} {self.epochs} epochs"


@functools.cache
def data(task: Task, whole: bool) -> Dataset:
    """With its test data, or the first five sixths of the training data with the rest to choose on."""
    file = FILES.get(task.dataset)
    if not task.text:
        found = load_dataset(task.dataset, file)
    else:
        assert file is not None
        with tempfile.NamedTemporaryFile() as prefix:
            prefix.write(file.read_bytes()[: task.text_bytes])
            prefix.flush()
            found = load_text(prefix.name)
    if whole:
        return found
    cut = len(found.train_labels) * 5 // 6
    x, y = found.train_inputs, found.train_labels
    return found._replace(
        train_inputs=x[:cut], train_labels=y[:cut], test_inputs=x[cut:], test_labels=y[cut:]
    )


def keep_compiled() -> None:
    """What one seed compiles serves the others, as long as this process lives."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    jax.config.update("jax_compilation_cache_dir", folder.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def constant(size: int, rate: float) -> dict[str, Any]:
    """Options of a constant batch."""
    return dict(
        criterion="none",
        initial_batch_size=size,
        max_batch_size=size,
        noise_groups=2,
        scaling="none",
        learning_rate=rate,
        schedule="cosine",
    )


def run(task: Task, whole: bool, seed: int, **options: Any) -> dict[str, Any]:
    """A run of the command's own loop, and what it leads to; the score of one that diverges is None."""
    dataset = data(task, whole)
    config = TrainConfig(
        dataset=task.dataset,
        model=task.model,
        epochs=task.epochs,
        seed=seed,
        steps_per_call=100,
        data_file=FILES["text"] if task.text else None,
        **options,
    )
    rows: list[dict[str, Any]] = []
    wall, processor = time.perf_counter(), time.process_time()
    made = Run(resolve(config, len(dataset.train_labels)), dataset)
    try:
        done = made(made.first, rows.append)
    except TrainingError:
        return {"score": None, "steps": len(rows), **_seconds(wall, processor)}
    spent = _seconds(wall, processor)
    inputs, labels = jnp.asarray(dataset.test_inputs), jnp.asarray(dataset.test_labels)
    loss, accuracy = map(float, make_evaluation(made.apply)(done.params, inputs, labels))
    score = loss / math.log(2) if task.text else accuracy
    return {
        "score": score if math.isfinite(loss) else None,
        "accuracy": accuracy,
        "loss": loss,
        "steps": len(rows),
        "examples": made.budget,
        "largest_batch": max(int(row["batch_size"]) for row in rows),
        "compilations": made.compilations,
        "seconds_waited": made.seconds_waited,
        **spent,
        **(_decided(rows, done.opt_state) if config.auto else {}),
    }


def _seconds(wall: float, processor: float) -> dict[str, float]:
    return {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - processor,
    }


def _decided(rows: list[dict[str, Any]], opt_state: Any) -> dict[str, Any]:
    """What `--auto` found: the warm-up, and batch size and rate on the way."""
    numbers = adabatch.metrics(opt_state)
    warmup = [row for row in rows if int(row["phase"]) == 0]
    examples = np.array([row["examples"] for row in rows])
    moments = np.searchsorted(examples, np.linspace(0, examples[-1], MOMENTS + 1)[1:])
    return {
        "peak": float(numbers["peak_learning_rate"]),
        "setbacks": int(numbers["setbacks"]),
        "warmup_end": adabatch.WarmupEnd(int(numbers["warmup_end"])).name,
        "warmup_steps": len(warmup),
        "warmup_share": int(warmup[-1]["examples"]) / int(examples[-1]),
        "batch_sizes": [int(rows[i]["batch_size"]) for i in moments],
        "rates": [float(rows[i]["learning_rate"]) for i in moments],
    }
