"""The training loop: feed, step, read back, until the budget of examples is used up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import adabatch_jax as adabatch
from adabatch_jax.training._classifier import classifier
from adabatch_jax.training._config import TrainConfig
from adabatch_jax.training._data import Dataset
from adabatch_jax.training._devices import Devices, as_before, on_host
from adabatch_jax.training._feed import Feed
from adabatch_jax.training._ladder import Rung, rung_after, rung_for
from adabatch_jax.training._optimizer import build_optimizer, known
from adabatch_jax.training._resume import RunState
from adabatch_jax.training._step import CompiledSteps, make_step

PyTree = Any
Row = dict[str, Any]
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


class ProcessLost(TrainingError):
    """Another process of the run does not answer."""


class Steps(NamedTuple):
    """What `run_steps` leaves behind."""

    params: PyTree
    opt_state: PyTree
    apply: Callable[..., jax.Array]  # (params, inputs) -> logits
    compilations: int


class _Launched(NamedTuple):
    """A step that was handed to the device and not yet read back."""

    row: Row
    report: dict[str, Any]


def run_steps(config: TrainConfig, dataset: Dataset, on_row: Callable[[Row], None]) -> Steps:
    """Trains on every example once per epoch, and calls `on_row` with each step's numbers.

    The batch size of a step is the one decided `config.lag + 1` steps before. The last batch ends
    exactly at the budget.

    Returns:
      What the steps left behind.
    """
    run = Run(config, dataset)
    done = run(run.first, on_row)
    return Steps(done.params, done.opt_state, run.apply, run.compilations)


class Run:
    """A run that can be begun, left between two steps and gone on with.

    Attributes:
      first: the state before the first step.
      apply: (params, inputs as stored) -> logits.
      budget: examples in the run.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        num_examples = len(dataset.train_labels)
        self._config = config = config.resolved(num_examples)
        self._devices = devices = Devices(config.devices)
        self.budget = config.epochs * num_examples
        params, self.apply = classifier(config.model, dataset, config.seed)
        optimizer = build_optimizer(config, self.budget)
        self.first = RunState(params, optimizer.init(params))
        step = make_step(
            self.apply,
            optimizer,
            coordinate_wise=config.criterion == "coordinate-norm",
            inner_products=config.criterion in ("inner-product", "augmented"),
            curvature=_curvature_batch(config, num_examples),
            axis_name=devices.axis_name,
        )
        self._step = CompiledSteps(devices.mapped(step))
        self._data = dataset.train_inputs, dataset.train_labels
        self._feed = Feed(num_examples, config.seed)

    @property
    def num_devices(self) -> int:
        """How many devices share a batch."""
        return self._devices.number

    @property
    def compilations(self) -> int:
        """How many times the step has been compiled."""
        return self._step.compilations

    @property
    def seconds_waited(self) -> float:
        """How long the loop has waited for compilations."""
        return self._step.seconds_waited

    def __call__(
        self,
        state: RunState,
        on_row: Callable[[Row], None],
        after_step: Callable[[int, Callable[[], RunState]], None] | None = None,
    ) -> RunState:
        """Makes the steps that are left.

        Args:
          state: where to begin.
          on_row: called with the numbers of each step, in order.
          after_step: called with the number of a step once it is launched, and a function that gives
            the state after it; that waits for the device and for the rows up to this step.

        Returns:
          The state after the last step, on this process's first device.

        Raises:
          TrainingError: `MAX_SKIPPED_IN_A_ROW` steps were skipped one after the other.
        """
        config, devices = self._config, self._devices
        first, largest = known(config.initial_batch_size), known(config.max_batch_size)
        if config.criterion == "none":
            largest = first
        ladder = dict(
            initial_batch_size=first,
            max_batch_size=largest,
            max_micro_batch_size=config.max_micro_batch_size,
            noise_groups=config.noise_groups,
        )
        params, opt_state = devices.replicate((state.params, state.opt_state))
        data = devices.replicate(self._data)
        skipped_in_a_row = state.skipped_in_a_row
        batch_size = state.batch_size or first
        position, number = state.position, state.step
        start = time.perf_counter() - state.seconds
        # The sizes that steps decided, oldest first; of the last ones perhaps not read back yet.
        decided: deque[int | _Launched] = deque(state.decided)

        def read(entry: int | _Launched) -> int:
            nonlocal skipped_in_a_row
            if isinstance(entry, int):
                return entry
            row, next_batch_size = _read_back(entry, time.perf_counter() - start)
            skipped_in_a_row = skipped_in_a_row + 1 if row["skipped"] else 0
            on_row(row)
            if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise TrainingError(
                    f"step {row['step']}: {MAX_SKIPPED_IN_A_ROW} steps in a row gave a loss or "
                    f"gradient that is not finite (last loss {float(row['loss'])}); nothing was "
                    "learned from them. "
                    f"{HINTS.get(config.schedule or '', 'Try a smaller learning rate')}"
                )
            return next_batch_size

        def now() -> RunState:
            for i, entry in enumerate(decided):
                decided[i] = read(entry)
            sizes = tuple(entry for entry in decided if isinstance(entry, int))
            seconds = time.perf_counter() - start
            return RunState(
                params, opt_state, position, number, batch_size, sizes, skipped_in_a_row, seconds
            )

        while position < self.budget:
            if len(decided) > config.lag:
                batch_size = read(decided.popleft())
            rung = rung_for(batch_size, **ladder)
            length = min(batch_size, self.budget - position)
            batch = self._batch(rung, position, length)
            params, opt_state, report = self._step(rung, params, opt_state, data, *batch)
            upper = rung_after(rung, **ladder)
            if upper is not None and upper not in self._step:  # compiled while training goes on
                self._step.prepare(upper, params, opt_state, data, *self._batch(upper, 0, 0))
            position += length
            number += 1
            row = {
                "step": number,
                "examples": position,
                "batch_size": batch_size,
                "micro_batch_size": rung.micro_batch_size,
            }
            decided.append(_Launched(row, report))
            if after_step is not None:
                after_step(number, now)
        done = now()
        self._step.close()
        trained = done.params, done.opt_state
        if devices.number > 1:
            trained = as_before(on_host(trained), trained)
        return done._replace(params=trained[0], opt_state=trained[1])

    def _batch(self, rung: Rung, position: int, length: int) -> tuple[Any, Any, Any]:
        """A stretch of the stream, on the devices: indices, sizes of the groups, loops to make."""
        indices, sizes = self._feed.grouped(
            position, length, rung.micro_batch_size, self._devices.groups(rung.num_groups)
        )
        loops = self._devices.loops(-(-length // rung.micro_batch_size))
        return self._devices.spread(indices), self._devices.spread(sizes), loops


def _read_back(launched: _Launched, seconds: float) -> tuple[Row, int]:
    """Waits for a step: its numbers, and the batch size that it decided."""
    row, report = launched.row, jax.device_get(launched.report)
    next_batch_size = int(report.pop("batch_size"))
    row.update({k: v for k, v in report.items() if k in COLUMNS})
    row.update(next_batch_size=next_batch_size, seconds=seconds, skipped=int(row["skipped"]))
    if row["skipped"]:  # the state is that of the step before, and so is its evidence
        row.update(dict.fromkeys(EVIDENCE, np.float32(np.nan)))
    if row["test_status"] == adabatch.BatchSizeStatus.AT_MAXIMUM:
        row["noise_scale"] = np.float32(np.nan)  # the last one measured, no longer this step's
    return row, next_batch_size


def _curvature_batch(config: TrainConfig, num_examples: int) -> np.ndarray | None:
    """Examples drawn once, [groups, group size]: the size that was asked for, rounded down."""
    if not config.measures_curvature:
        return None
    wanted = min(known(config.curvature_examples), num_examples)
    groups = min(CURVATURE_GROUPS, wanted)
    drawn = np.random.default_rng(config.seed).permutation(num_examples)
    return drawn[: wanted // groups * groups].reshape(groups, -1).astype(np.int32)
