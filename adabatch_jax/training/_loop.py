"""The training loop: feed, step, read back, until the budget of examples is used up."""

from __future__ import annotations

import functools
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from adabatch_jax._types import PyTree
from adabatch_jax.training._config import TrainConfig
from adabatch_jax.training._optimizer import build_optimizer, told_already
from adabatch_jax.training._plan import RunPlan, resolve
from adabatch_jax.training._run_state import RunState
from adabatch_jax.training.data import (
    Dataset,
    Feed,
    Rung,
    check_dataset,
)
from adabatch_jax.training.devices import Devices, as_before, on_host
from adabatch_jax.training.models import classifier
from adabatch_jax.training.record import Row, RowReader, TrainingError
from adabatch_jax.training.step import (
    CompiledSteps,
    loop_place,
    make_device_loop,
    make_gradient,
    make_step,
    make_update,
)

AfterStep = Callable[[int, Callable[[], RunState]], None]
CURVATURE_GROUPS = 16  # between which the noise of the Hessian shows


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

    Args:
      config: the run; what concerns files is ignored.
      dataset: the data.
      on_row: called with a dict for each step, in order: the columns of metrics.csv.

    Returns:
      What the steps left behind.

    Raises:
      ValueError: data that cannot be learned, such as labels out of range.
      TrainingError: the loss stays not finite.
    """
    check_dataset(dataset)
    plan = resolve(config, len(dataset.train_labels))
    if (lack := plan.lack_of_steps) is not None:
        told = f"--auto: {lack}; it is taken from the length of the parameters instead"
        warnings.warn(told, stacklevel=2)
    run = Run(plan, dataset, devices=config.devices)
    done = run(run.first, on_row)
    return Steps(done.params, done.opt_state, run.apply, run.compilations)


class Run:
    """A run that can be begun, left between two steps and gone on with.

    Args:
      plan: of the run.
      dataset: the data.
      devices: use only the first so many; None: all.
      checkpoint_every: with many steps in a call, a call ends where so many are made; None: it does not.

    Attributes:
      first: the state before the first step.
      apply: (params, inputs as stored) -> logits.
      budget: examples in the run.

    Raises:
      ValueError: the model does not read the data, the run is too short for AutoWU, or there are fewer
        devices.
    """

    def __init__(
        self,
        plan: RunPlan,
        dataset: Dataset,
        *,
        devices: int | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        self._plan, self._checkpoint_every = plan, checkpoint_every
        with told_already():
            optimizer = build_optimizer(plan)
        self._devices = Devices(devices)
        self.budget = plan.total_examples
        params, self.apply = classifier(plan.model, dataset, plan.seed)
        self.first = RunState(params, optimizer.init(params))
        self._data = dataset.train_inputs, dataset.train_labels
        self._feed = Feed(plan.num_examples, plan.seed)
        self._ladder = plan.ladder
        self._step = self._compiled_steps(optimizer)

    def _compiled_steps(self, optimizer: optax.GradientTransformationExtraArgs) -> CompiledSteps:
        """The step, or many in one call, for every rung of the ladder."""
        plan, devices, ladder, test = self._plan, self._devices, self._ladder, self._plan.criterion
        measured: dict[str, Any] = dict(
            coordinate_wise=test is not None and test.coordinate_wise,
            inner_products=test is not None and test.inner_products,
            axis_name=devices.axis_name,
            constant=test is None,
        )
        curvature = _curvature_batch(plan)

        @functools.cache
        def after_warmup() -> optax.GradientTransformationExtraArgs:
            with told_already():
                return build_optimizer(plan, warmup_over=True)

        def device_loop_of(rung: Rung) -> Callable[..., Any]:
            """Many whole steps; those after the warm-up, which holds the batch, without its test."""
            sizes = ladder.batch_sizes(rung)
            over = plan.auto and sizes[0] > plan.initial_batch_size
            mine = after_warmup() if over else optimizer
            step = devices.mapped(make_step(self.apply, mine, curvature=curvature, **measured))
            return make_device_loop(
                step, devices, rung, sizes, plan.num_examples, plan.steps_per_call
            )

        if plan.steps_per_call > 1:
            return CompiledSteps(device_loop_of)
        gradient = devices.mapped(make_gradient(self.apply, **measured))
        update = devices.repeated(make_update(self.apply, optimizer, curvature=curvature))
        return CompiledSteps(lambda rung: gradient, update)

    @property
    def num_devices(self) -> int:
        """How many devices share a batch."""
        return self._devices.number

    @property
    def compilations(self) -> int:
        """How many programs have been compiled for the steps."""
        return self._step.compilations

    @property
    def seconds_waited(self) -> float:
        """How long the loop has waited for compilations."""
        return self._step.seconds_waited

    def __call__(
        self,
        state: RunState,
        on_row: Callable[[Row], None],
        after_step: AfterStep | None = None,
    ) -> RunState:
        """Makes the steps that are left.

        Args:
          state: where to begin.
          on_row: called with the numbers of each step, in order.
          after_step: called with the number of a step once it is launched (with `steps_per_call`, of the
            last of a call), and a function that gives the state after it; that waits for the device and
            for the rows up to this step.

        Returns:
          The state after the last step, on this process's first device.

        Raises:
          TrainingError: `MAX_SKIPPED_IN_A_ROW` steps were skipped one after the other.
        """
        reader = RowReader(on_row, state.skipped_in_a_row, self._plan.hint)
        loop = self._by_steps if self._plan.steps_per_call == 1 else self._by_device_loops
        done = loop(state, reader, after_step or (lambda number, now: None))
        self._step.close()
        trained = done.params, done.opt_state
        if self._devices.number > 1:
            trained = as_before(on_host(trained), trained)
        return done._replace(params=trained[0], opt_state=trained[1])

    def _by_steps(self, state: RunState, reader: RowReader, after_step: AfterStep) -> RunState:
        """One call for each step; the host runs ahead of the device as far as `lag` allows."""
        lag, devices, ladder = self._plan.lag, self._devices, self._ladder
        params, opt_state = devices.replicate((state.params, state.opt_state))
        data = devices.replicate(self._data)
        batch_size = state.batch_size or self._plan.initial_batch_size
        position, number = state.position, state.step
        start = time.perf_counter() - state.seconds
        # The sizes that steps decided, oldest first; of the last ones perhaps not read back yet.
        decided: deque[int | _Launched] = deque(state.decided)

        def read(entry: int | _Launched) -> int:
            if isinstance(entry, int):
                return entry
            report = jax.device_get(entry.report)  # waits for the step
            return reader(entry.row, report, time.perf_counter() - start)

        def now() -> RunState:
            for i, entry in enumerate(decided):
                decided[i] = read(entry)
            sizes = tuple(entry for entry in decided if isinstance(entry, int))
            seconds, skipped = time.perf_counter() - start, reader.skipped_in_a_row
            return RunState(
                params, opt_state, position, number, batch_size, sizes, skipped, seconds
            )

        while position < self.budget:
            if len(decided) > lag:
                batch_size = read(decided.popleft())
            rung = ladder.rung(batch_size)
            length = min(batch_size, self.budget - position)
            given = data, *self._batch(rung, position, length)
            upper = ladder.after(rung)
            if upper is not None and upper not in self._step:  # compiled while training goes on
                self._step.prepare(rung, params, opt_state, *given)  # first what is needed first
                self._step.prepare(upper, params, opt_state, data, *self._batch(upper, 0, 0))
            params, opt_state, report = self._step(rung, params, opt_state, *given)
            position += length
            number += 1
            decided.append(_Launched(_row(number, position, length, rung), report))
            after_step(number, now)
        return now()

    def _by_device_loops(
        self, state: RunState, reader: RowReader, after_step: AfterStep
    ) -> RunState:
        """One call for many steps, whose numbers are read back together. The same decisions."""
        plan, devices, ladder = self._plan, self._devices, self._ladder
        data, epoch_size = devices.replicate(self._data), len(self._data[1])
        window = 1 + -(-ladder.max_batch_size // epoch_size)  # epochs that a batch may touch
        started = time.perf_counter() - state.seconds
        batch_size = state.batch_size or plan.initial_batch_size
        missing = plan.lag + 1 - len(state.decided)
        decided = (batch_size,) * missing + state.decided
        params, opt_state = devices.replicate((state.params, state.opt_state))
        state = state._replace(params=params, opt_state=opt_state, decided=decided)
        epoch, order = -1, None
        while state.position < self.budget:
            if state.position // epoch_size != epoch:
                epoch = state.position // epoch_size
                examples = self._feed.indices(epoch * epoch_size, window * epoch_size)
                order = devices.replicate(examples)
            steps, every = plan.steps_per_call, self._checkpoint_every
            if every:  # a call ends where a checkpoint is due
                steps = min(steps, every - state.step % every)
            bounds = dict(window=epoch * epoch_size, budget=self.budget, steps=steps)
            place = devices.replicate(loop_place(state.position, state.decided, **bounds))
            rung = ladder.rung(state.decided[0])
            given = data, order, place
            upper = ladder.after(rung)
            if upper is not None and upper not in self._step:
                self._step.prepare(rung, state.params, state.opt_state, *given)
                self._step.prepare(upper, state.params, state.opt_state, *given)
            after = self._step(rung, state.params, state.opt_state, *given)
            made, rows, sizes = jax.device_get((after.made, after.rows, after.place.decided))
            seconds, position = time.perf_counter() - started, state.position
            for i in range(int(made)):
                report = {name: values[i] for name, values in rows.items()}
                batch_size, length = int(report.pop("asked")), int(report.pop("length"))
                position += length
                reader(_row(state.step + i + 1, position, length, rung), report, seconds)
            state = RunState(
                params=after.params,
                opt_state=after.opt_state,
                position=position,
                step=state.step + int(made),
                batch_size=batch_size,
                decided=tuple(sizes.tolist()),
                skipped_in_a_row=reader.skipped_in_a_row,
                seconds=seconds,
            )
            after_step(state.step, functools.partial(_itself, state))
        return state

    def _batch(self, rung: Rung, position: int, length: int) -> tuple[Any, Any, Any]:
        """A stretch of the stream, on the devices: indices, sizes of the groups, loops to make."""
        indices, sizes = self._feed.grouped(
            position, length, rung.micro_batch_size, self._devices.groups(rung.num_groups)
        )
        loops = self._devices.loops(-(-length // rung.micro_batch_size))
        return self._devices.spread(indices), self._devices.spread(sizes), loops


def _row(step: int, examples: int, batch_size: int, rung: Rung) -> Row:
    """What is known of a step before it is made."""
    return {
        "step": step,
        "examples": examples,
        "batch_size": batch_size,
        "micro_batch_size": rung.micro_batch_size,
    }


def _itself(state: RunState) -> RunState:
    return state


def _curvature_batch(plan: RunPlan) -> np.ndarray | None:
    """Examples drawn once, [groups, group size]: the size that was asked for, rounded down."""
    wanted = plan.curvature_examples
    if not wanted:
        return None
    groups = min(CURVATURE_GROUPS, wanted)
    drawn = np.random.default_rng(plan.seed).permutation(plan.num_examples)
    return drawn[: wanted // groups * groups].reshape(groups, -1).astype(np.int32)
