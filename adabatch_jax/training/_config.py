"""The configuration of a training run: its fields are the options of `adabatch-jax train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from adabatch_jax.optimizers import BATCH_SIZE_OPTIONS, ETA
from adabatch_jax.training._config_check import check_config
from adabatch_jax.training._registry import (
    CRITERIA,
    OPTIMIZERS,
    SCHEDULES,
    CriterionName,
    CurvatureOptimizer,
    OptimizerName,
    RateSearch,
    ScheduleName,
)
from adabatch_jax.training.data import DatasetName
from adabatch_jax.training.models import ModelName


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

    dataset: DatasetName = "digits"
    """Data set: digits is embedded, mnist and fashion-mnist are found in the usual places or downloaded,
    text is the bytes of --data-file."""
    model: ModelName = "mlp"
    """Model: mlp has 256 hidden units, resnet three blocks with group normalisation; for text, transformer
    has two blocks and windows of 64 bytes."""
    optimizer: OptimizerName = "adadagrad"
    """Optimizer: adadagrad-norm has one accumulator, lanczos-sgd sets learning rate and momentum by the
    curvature."""
    auto: bool = False
    """Find the learning rate, grow the batch and scale the rate with it: nothing else to choose."""
    criterion: CriterionName = "norm"
    """Test that grows the batch; none keeps it constant."""
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
    scaling: Literal["none", "linear", "sqrt", "random-matrix"] | None = None
    """How the learning rate follows the batch size, from the initial one. random-matrix: up to the batch
    size where curvature takes over from noise, which is measured (sqrt; with --auto by the kind of
    optimizer, with lanczos-sgd none)."""
    learning_rate: float | None = None
    """Learning rate at the initial batch size (by optimizer: adadagrad and momentum 0.02, adadagrad-norm 2,
    adam, adamw and adamp 0.004, sgd 0.2, lamb 0.01). AutoWU and lanczos-sgd find their own."""
    schedule: ScheduleName | None = None
    """Learning rate over examples; autowu is the paper's (cosine)."""
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
    resume: Literal["always", "auto", "never"] | None = None
    """Go on from the newest checkpoint: always, or --resume alone (an error if there is none), auto (start
    anew if there is none), never (start anew over an unfinished run, which is refused otherwise)."""
    devices: int | None = None
    """Devices that share every batch (all)."""
    distributed: Literal["auto"] | None = None
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
        by_curvature = isinstance(OPTIMIZERS[self.optimizer], CurvatureOptimizer)
        return by_curvature or self.scaling == "random-matrix"

    @property
    def searches_rate(self) -> bool:
        """Whether the schedule finds the learning rate. With `auto` there is none."""
        return self.schedule is not None and isinstance(SCHEDULES[self.schedule], RateSearch)

    @property
    def thresholds(self) -> dict[str, float]:
        """Those that the criterion reads, by name, given or by default."""
        test = CRITERIA[self.criterion]
        values = dict(test.thresholds) if test is not None else {}
        if self.auto and "eta" in values:
            values["eta"] *= ETA
        return {name: getattr(self, name) or value for name, value in values.items()}

    @property
    def averaging(self) -> tuple[float | None, bool]:
        """Decay of the average over tests, and whether the noise is taken out, given or by default."""
        ema_decay, debias, test = self.smoothing, self.debias, CRITERIA[self.criterion]
        if self.auto and ema_decay is None:
            ema_decay = BATCH_SIZE_OPTIONS["ema_decay"]
        if debias is None:
            debias = self.auto or (test is not None and test.debiased)
        return ema_decay, debias

    @property
    def output(self) -> Path:
        """The folder for results."""
        return Path("runs", self.dataset) if self.out is None else Path(self.out)
