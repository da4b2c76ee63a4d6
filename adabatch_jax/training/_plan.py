"""From what was asked to what is done: `resolve` fills in what a configuration leaves open, once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from adabatch_jax.optimizers import BATCH_SIZE_OPTIONS, LEAST_STEPS, WARMUP
from adabatch_jax.training._config import TrainConfig
from adabatch_jax.training._config_check import check_order
from adabatch_jax.training._options import FIRST_BATCH_SIZE, LARGEST_BATCH_SIZE
from adabatch_jax.training._registry import (
    CRITERIA,
    HINT,
    OPTIMIZERS,
    SCHEDULES,
    BatchSizeTest,
    CurvatureOptimizer,
    Direction,
    Rate,
    RateSearch,
)
from adabatch_jax.training.data import Ladder

_SCHEDULE = "cosine"
_CURVATURE_EXAMPLES = 256
# What may change between two parts of one run.
_OUTSIDE_THE_RUN = {
    *("out", "data_dir", "data_file", "checkpoint_every", "keep", "resume", "tensorboard"),
    *("devices", "distributed", "coordinator", "num_processes", "process_id", "patience"),
}


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A training run in which nothing is left open. `resolve` makes it.

    Args:
      options: every option as the run uses it, for records: summary.json and checkpoints hold it. With
        `auto`, learning_rate, schedule and scaling are None: they are found.
      num_examples: in the training data.
      total_examples: the budget of the run.
      model: name of the model.
      seed: of the initial parameters and of the order of the examples.
      optimizer: the entry of the registry.
      criterion: the entry of the registry; None: the batch stays constant.
      thresholds: of the criterion, by name.
      rate: the learning rate over examples, at the first batch size. Where the run finds its rate, the
        share of it: a schedule with lanczos-sgd, 1 with AutoWU.
      search: the schedule by which AutoWU finds the rate; None: there is none, or `auto`.
      auto: `adabatch_jax.automatic` finds the rate, grows the batch and scales the rate with it.
      scaling: how the rate follows the batch size; with `auto` it has no part in the run.
      initial_batch_size: of the first step.
      max_batch_size: the largest.
      ema_decay: decay of the average over tests; None: no average.
      debias: whether the noise is taken out of the squared gradient norm.
      growth_limit: largest factor by which a test may enlarge the batch; None: no limit.
      curvature_examples: on which the curvature is measured; 0: it is not.
      refresh_every: examples between two measurements of the curvature; 0: there are none.
      max_micro_batch_size: most examples whose gradient is computed at once.
      noise_groups: least number of groups in a step.
      epochs: passes over the data.
      lag: steps by which the loop runs ahead of the batch size that it reads.
      steps_per_call: most steps in one call on the device.
    """

    options: TrainConfig
    num_examples: int
    total_examples: int
    model: str
    seed: int
    optimizer: Direction | CurvatureOptimizer
    criterion: BatchSizeTest | None
    thresholds: Mapping[str, float]
    rate: Rate
    search: RateSearch | None
    auto: bool
    scaling: str
    initial_batch_size: int
    max_batch_size: int
    ema_decay: float | None
    debias: bool
    growth_limit: float | None
    curvature_examples: int
    refresh_every: int
    max_micro_batch_size: int
    noise_groups: int
    epochs: int
    lag: int
    steps_per_call: int

    @property
    def ladder(self) -> Ladder:
        """The shapes of its batches. No step is larger than the budget, whatever is asked for."""
        return Ladder(
            initial_batch_size=self.initial_batch_size,
            max_batch_size=min(self.max_batch_size, self.total_examples),
            max_micro_batch_size=self.max_micro_batch_size,
            noise_groups=self.noise_groups,
        )

    @property
    def searches_rate(self) -> bool:
        """Whether AutoWU finds the learning rate."""
        return self.auto or self.search is not None

    @property
    def hint(self) -> str:
        """What to try where the loss stays not finite."""
        return HINT if self.search is None else self.search.hint

    @property
    def identity(self) -> dict[str, Any]:
        """The options that make two runs the same run."""
        fields = dataclasses.asdict(self.options)
        return {k: v for k, v in fields.items() if k not in _OUTSIDE_THE_RUN}

    @property
    def lack_of_steps(self) -> str | None:
        """Says in words that there are too few steps to find a rate in; None if there are enough."""
        if self.auto:
            part, least = WARMUP, LEAST_STEPS
        elif self.search is not None:
            part, least = self.search.part, self.search.least_steps
        else:
            return None
        first = self.initial_batch_size
        steps = int(part * self.epochs * self.num_examples) // first
        if steps >= least:
            return None
        return (
            f"the run is too short to find a learning rate: the part of it that is for that has {steps} "
            f"steps of --initial-batch-size {first}, and it takes {least}; more --epochs or a smaller "
            "first batch would do"
        )


def resolve(config: TrainConfig, num_examples: int) -> RunPlan:
    """Fills in every option that was left out: some defaults depend on others and on the data.

    Args:
      config: what was asked.
      num_examples: in the training data.

    Returns:
      The plan of the run.

    Raises:
      ValueError: the sizes contradict each other; the run is too short for its schedule.

    Example:
      >>> from adabatch_jax.training import TrainConfig, resolve
      >>> plan = resolve(TrainConfig(epochs=2), num_examples=1437)
      >>> plan.total_examples, plan.initial_batch_size, plan.options.learning_rate
      (2874, 16, 0.02)
    """
    total_examples = config.epochs * num_examples
    learning_rate, rate, search = _learning_rate(config, total_examples)
    sizes = _automatic_sizes if config.auto else _sizes
    first, largest = sizes(config, num_examples)
    ema_decay, debias = config.averaging
    growth_limit = config.growth_limit
    if config.auto and growth_limit is None:
        growth_limit = BATCH_SIZE_OPTIONS["growth_limit"]
    by_curvature = isinstance(OPTIMIZERS[config.optimizer], CurvatureOptimizer)
    scaling = config.scaling or ("none" if by_curvature else "sqrt")
    schedule = config.schedule or _SCHEDULE
    measured, refresh_every = _curvature(config, num_examples)
    filled: dict[str, Any] = dict(
        **config.thresholds,
        debias=debias,
        smoothing=ema_decay,
        growth_limit=growth_limit,
        initial_batch_size=first,
        max_batch_size=largest,
    )
    if not config.auto:
        filled.update(scaling=scaling, schedule=schedule, learning_rate=learning_rate)
    if config.measures_curvature:
        filled.update(
            curvature_examples=config.curvature_examples or measured, refresh_every=refresh_every
        )
    plan = RunPlan(
        options=dataclasses.replace(config, **filled),
        num_examples=num_examples,
        total_examples=total_examples,
        model=config.model,
        seed=config.seed,
        optimizer=OPTIMIZERS[config.optimizer],
        criterion=CRITERIA[config.criterion],
        thresholds=config.thresholds,
        rate=rate,
        search=search,
        auto=config.auto,
        scaling=scaling,
        initial_batch_size=first,
        max_batch_size=largest,
        ema_decay=ema_decay,
        debias=debias,
        growth_limit=growth_limit,
        curvature_examples=measured,
        refresh_every=refresh_every,
        max_micro_batch_size=config.max_micro_batch_size,
        noise_groups=config.noise_groups,
        epochs=config.epochs,
        lag=config.lag,
        steps_per_call=config.steps_per_call,
    )
    if not config.auto and (lack := plan.lack_of_steps) is not None:
        raise ValueError(f"train: --schedule {schedule}: {lack}")
    return plan


def _learning_rate(
    config: TrainConfig, total_examples: int
) -> tuple[float | None, Rate, RateSearch | None]:
    """The rate at the first batch size, None if it is found; `rate` and `search` of the plan."""
    optimizer, schedule = OPTIMIZERS[config.optimizer], SCHEDULES[config.schedule or _SCHEDULE]
    if isinstance(schedule, RateSearch):
        return None, 1.0, schedule
    if config.auto:
        return None, 1.0, None
    if isinstance(optimizer, CurvatureOptimizer):
        return None, schedule(1.0, total_examples), None
    learning_rate = config.learning_rate or optimizer.learning_rate
    return learning_rate, schedule(learning_rate, total_examples), None


def _sizes(config: TrainConfig, num_examples: int) -> tuple[int, int]:
    """The first batch size and the largest, without --auto."""
    first = config.initial_batch_size or FIRST_BATCH_SIZE
    constant = CRITERIA[config.criterion] is None
    return first, config.max_batch_size or (first if constant else LARGEST_BATCH_SIZE)


def _automatic_sizes(config: TrainConfig, num_examples: int) -> tuple[int, int]:
    """The same with --auto, by the data and the length of the run.

    Raises:
      ValueError: one that is given does not go with them.
    """

    def power_of_two(number: float) -> int:
        return 2 ** round(math.log2(max(number, 1.0)))

    fitting = max(int(WARMUP * config.epochs * num_examples) // LEAST_STEPS, 1)
    first = min(power_of_two(num_examples / 256), 2 ** (fitting.bit_length() - 1), 256)
    given = config.initial_batch_size, config.max_batch_size
    first = given[0] or max(first, FIRST_BATCH_SIZE)
    largest = given[1] or max(min(power_of_two(num_examples / 4), 8192), first)
    check_order(first, largest, given, " with --auto")
    return first, largest


def _curvature(config: TrainConfig, num_examples: int) -> tuple[int, int]:
    """Examples on which the curvature is measured, and examples between two measurements."""
    if not config.measures_curvature:
        return 0, 0
    measured = min(config.curvature_examples or _CURVATURE_EXAMPLES, num_examples)
    # Measuring then costs about 5 % of the run, and happens three times at least.
    every = max(min(400 * measured, config.epochs * num_examples // 3), 1)
    return measured, config.refresh_every or every
