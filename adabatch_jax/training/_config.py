"""The configuration of a training run: its fields are the options of `adabatch-jax train`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from adabatch_jax.optimizers import BATCH_SIZE_OPTIONS, ETA
from adabatch_jax.training._config_check import check_config, check_order
from adabatch_jax.training._options import (
    CRITERIA_WITH,
    ETAS,
    FINDS_ITS_RATE,
    FIRST_BATCH_SIZE,
    LARGEST_BATCH_SIZE,
    NU,
    RATES,
    THETA,
    WARMUPS,
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults train an MLP on the digits that ship with scikit-learn.

    Raises:
      ValueError: an option out of range, or two that contradict each other; the message names them as
        the command does.

    Example:
      >>> TrainConfig(epochs=2).epochs
      2
    """

    dataset: str = "digits"
    """Data set: digits (embedded), mnist or fashion-mnist (found in the usual places, else downloaded), or
    text: the bytes of --data-file."""
    model: str = "mlp"
    """Model: logistic, mlp (256 hidden units), cnn, resnet (three blocks, group normalisation), or for text
    transformer (two blocks, windows of 64 bytes)."""
    optimizer: str = "adadagrad"
    """Optimizer: adadagrad, adadagrad-norm (one accumulator), adamw, adam, adamp, sgd, momentum, lamb, or
    lanczos-sgd, which sets learning rate and momentum by the curvature."""
    auto: bool = False
    """Find the learning rate, grow the batch and scale the rate with it: nothing else to choose."""
    criterion: str = "norm"
    """Test that grows the batch: norm, coordinate-norm, inner-product, augmented, noise-scale, or none."""
    eta: float | None = None
    """Threshold η of norm and coordinate-norm: smaller asks for larger batches (1, coordinate-norm 3; with
    --auto half as much again)."""
    theta: float | None = None
    """Threshold ϑ of inner-product and augmented (0.9)."""
    nu: float | None = None
    """Threshold ν of augmented, across the gradient (5.84)."""
    debias: bool | None = None
    """Take the noise out of the squared gradient norm that the test compares with: --debias, or --no-debias
    (no; with --auto yes)."""
    smoothing: float | None = None
    """Decay of the average over tests of numerator and denominator, in [0, 1). It needs --debias, unless
    the thresholds are below 1 (none; with --auto 0.9)."""
    growth_limit: float | None = None
    """Largest factor by which one test may enlarge the batch (no limit; with --auto 1.1)."""
    noise_groups: int = 8
    """Least number of groups per step: the noise is measured between them, and the devices share them."""
    initial_batch_size: int | None = None
    """Examples of the first step (16; with --auto 1/256 of the data, between 16 and 256, or less where the
    run has too few steps of that size to find its rate)."""
    max_batch_size: int | None = None
    """Largest batch size (512; with --auto a quarter of the data, at most 8192)."""
    max_micro_batch_size: int = 1024
    """Most examples whose gradient is computed at once: bounds the memory."""
    scaling: str | None = None
    """How the learning rate follows the batch size, from the initial one: none, linear, sqrt, or
    random-matrix: up to the batch size where curvature takes over from noise, which is measured
    (sqrt; with --auto by the kind of optimizer, with lanczos-sgd none)."""
    learning_rate: float | None = None
    """Learning rate at the initial batch size (by optimizer: adadagrad and momentum 0.02, adadagrad-norm 2,
    adam, adamw and adamp 0.004, sgd 0.2, lamb 0.01). AutoWU and lanczos-sgd find their own."""
    schedule: str | None = None
    """Learning rate over examples: constant, cosine, autowu (the paper's) or autowu-improved (cosine)."""
    curvature_examples: int | None = None
    """Examples on which lanczos-sgd and random-matrix measure the curvature (256)."""
    refresh_every: int | None = None
    """Examples between two such measurements (400 for each of those examples, so that measuring costs
    about 5 % of the run; at most a third of the run)."""
    epochs: int = 20
    """Passes over the training data; steps change size, this budget does not."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the examples."""
    lag: int = 0
    """Steps by which the loop runs ahead of the batch size it reads (hides the latency of accelerators)."""
    steps_per_call: int = 1
    """Most optimizer steps made in one call on the device, where the batch grows without the host; their
    numbers are read together. Faster where steps take less than some milliseconds."""
    out: Path | None = None
    """Folder for metrics.csv, summary.json, run.png and checkpoint (default: runs/DATASET)."""
    tensorboard: bool = False
    """Write the columns of metrics.csv for TensorBoard as well, over steps, in OUT/tensorboard; needs
    pip install 'adabatch-jax[tensorboard]'."""
    data_dir: Path | None = None
    """Folder that holds the IDX files of mnist or fashion-mnist."""
    data_file: Path | None = None
    """The file for --dataset text; its last tenth is the test set."""

    checkpoint_every: int | None = None
    """Steps between two checkpoints of the whole state, in OUT/state (none; SIGTERM saves one anyway)."""
    keep: int = 3
    """Checkpoints that are kept, the newest."""
    resume: str | None = None
    """Go on from the newest checkpoint: always, or --resume alone (an error if there is none), auto (start
    anew if there is none), never (start anew over an unfinished run, which is refused otherwise)."""
    devices: int | None = None
    """Devices that share every batch (all)."""
    distributed: str | None = None
    """Several processes make one run: auto finds the others as Cloud TPU, Slurm and the like know them."""
    coordinator: str | None = None
    """The same by hand: HOST:PORT, where the first process listens."""
    num_processes: int | None = None
    """Processes in the run, with --coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0, with --coordinator."""
    patience: int | None = None
    """Seconds without a sign of life after which a process counts as dead, and the others stop (60)."""

    def __post_init__(self) -> None:
        """Checks every field, before anything is loaded or written."""
        check_config(self)

    @property
    def measures_curvature(self) -> bool:
        """Whether something in the chain needs the loss on a curvature batch."""
        return self.optimizer == "lanczos-sgd" or self.scaling == "random-matrix"

    @property
    def thresholds(self) -> dict[str, float | None]:
        """Those of the criterion, given or by default; None for those that it does not have."""
        eta = ETAS.get(self.criterion, 0.0) * (ETA if self.auto else 1.0)
        values = {"eta": eta, "theta": THETA, "nu": NU}
        return {
            name: (getattr(self, name) or values[name]) if self.criterion in criteria else None
            for name, criteria in CRITERIA_WITH.items()
        }

    @property
    def averaging(self) -> tuple[float | None, bool]:
        """Decay of the average over tests, and whether the noise is taken out, given or by default."""
        smoothing, debias = self.smoothing, self.debias
        if self.auto and smoothing is None:
            smoothing = BATCH_SIZE_OPTIONS["smoothing"]
        return smoothing, self.auto if debias is None else debias

    def resolved(self, num_examples: int) -> TrainConfig:
        """Every option that was left out, filled in: some defaults depend on others and on the data.

        Args:
          num_examples: in the training data.

        Returns:
          A configuration whose numbers are those of the run. With `auto`, learning_rate, schedule and
          scaling stay None: they are found.

        Raises:
          ValueError: the sizes contradict each other; the run is too short for its `schedule`.
        """
        values: dict[str, Any] = dict(
            **self.thresholds,
            debias=self.criterion == "noise-scale",
            initial_batch_size=FIRST_BATCH_SIZE,
            max_batch_size=LARGEST_BATCH_SIZE,
            scaling="sqrt",
            schedule="cosine",
            learning_rate=None if self.schedule in FINDS_ITS_RATE else RATES.get(self.optimizer),
        )
        if self.optimizer == "lanczos-sgd":
            values.update(scaling="none", learning_rate=None)
        if self.criterion == "none":
            values.update(max_batch_size=self.initial_batch_size or FIRST_BATCH_SIZE)
        if self.auto:
            values = {**self.thresholds, **self._automatic_sizes(num_examples)}
            values.update(BATCH_SIZE_OPTIONS)
        if self.measures_curvature:
            measured = min(self.curvature_examples or 256, num_examples)
            values["curvature_examples"] = measured
            values["refresh_every"] = max(min(400 * measured, self.epochs * num_examples // 3), 1)
        left_out = {k: v for k, v in values.items() if getattr(self, k) is None}
        found = dataclasses.replace(self, **left_out)
        if not self.auto and (lack := found.lacks_steps(num_examples)) is not None:
            raise ValueError(f"train: --schedule {found.schedule}: {lack}")
        return found

    def lacks_steps(self, num_examples: int) -> str | None:
        """Says in words that there are too few steps to find a rate in; None if there are enough."""
        found = self.resolved(num_examples) if self.initial_batch_size is None else self
        first, way = found.initial_batch_size, "auto" if self.auto else self.schedule or ""
        if first is None or way not in WARMUPS:
            return None
        share, least = WARMUPS[way]
        steps = int(share * self.epochs * num_examples) // first
        if steps >= least:
            return None
        return (
            f"the run is too short to find a learning rate: the part of it that is for that has {steps} "
            f"steps of --initial-batch-size {first}, and it takes {least}; more --epochs or a smaller "
            "first batch would do"
        )

    def _automatic_sizes(self, num_examples: int) -> dict[str, Any]:
        """What --auto takes for the sizes that are left out.

        Raises:
          ValueError: one that is given does not go with them.
        """

        def power_of_two(number: float) -> int:
            return 2 ** round(math.log2(max(number, 1.0)))

        share, least = WARMUPS["auto"]
        fitting = max(int(share * self.epochs * num_examples) // least, 1)
        first = min(power_of_two(num_examples / 256), 2 ** (fitting.bit_length() - 1), 256)
        given = self.initial_batch_size, self.max_batch_size
        first = given[0] or max(first, FIRST_BATCH_SIZE)
        largest = max(min(power_of_two(num_examples / 4), 8192), first)
        check_order(first, given[1] or largest, given, " with --auto")
        return {"initial_batch_size": first, "max_batch_size": largest}

    @property
    def output(self) -> Path:
        """The folder for results."""
        return Path("runs", self.dataset) if self.out is None else Path(self.out)
