"""The configuration of a training run: its fields are the options of `adabatch-jax train`."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from adabatch_jax import _validate
from adabatch_jax.optimizers._automatic import BATCH_SIZE_OPTIONS, ETA

IMAGES = ("digits", "mnist", "fashion-mnist")
DATASETS = (*IMAGES, "text")
IMAGE_MODELS = ("logistic", "mlp", "cnn", "resnet")
MODELS = (*IMAGE_MODELS, "transformer")
DIRECTIONS = ("adadagrad", "adadagrad-norm", "adamw", "adam", "adamp", "sgd", "momentum", "lamb")
OPTIMIZERS = (*DIRECTIONS, "lanczos-sgd")
CRITERIA = ("norm", "coordinate-norm", "inner-product", "augmented", "noise-scale", "none")
SCALINGS = ("none", "linear", "sqrt", "random-matrix")
SCHEDULES = ("constant", "cosine", "autowu", "autowu-improved")
FINDS_ITS_RATE = ("autowu", "autowu-improved")
RESUMES = ("always", "auto", "never")
# What may change between two parts of one run.
OUTSIDE_THE_RUN = (
    *("out", "data_dir", "data_file", "checkpoint_every", "keep", "resume", "tensorboard"),
    *("devices", "distributed", "coordinator", "num_processes", "process_id", "patience"),
)

_FIRST_BATCH_SIZE, _LARGEST_BATCH_SIZE = 16, 512


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
    """Threshold η of norm and coordinate-norm: smaller asks for larger batches (1; with --auto 1.5)."""
    theta: float = 0.9
    """Threshold ϑ of inner-product and augmented."""
    nu: float = 5.84
    """Threshold ν of augmented, across the gradient."""
    debias: bool = False
    """Take the noise out of the squared gradient norm that the test compares with."""
    smoothing: float | None = None
    """Decay of the average over tests of numerator and denominator, in [0, 1); use with --debias.
    (--auto: 0.9, de-biased.)"""
    growth_limit: float | None = None
    """Largest factor by which one test may enlarge the batch (no limit; with --auto 1.1)."""
    noise_groups: int = 8
    """Least number of groups per step from which the noise is measured."""
    initial_batch_size: int | None = None
    """Examples of the first step (16; with --auto 1/256 of the data, between 16 and 256)."""
    max_batch_size: int | None = None
    """Largest batch size (512; with --auto a quarter of the data, at most 8192)."""
    max_micro_batch_size: int = 1024
    """Most examples whose gradient is computed at once: bounds the memory."""
    scaling: str | None = None
    """How the learning rate follows the batch size, from the initial one: none, linear, sqrt, or
    random-matrix: up to the batch size where curvature takes over from noise, which is measured
    (sqrt; with --auto by the kind of optimizer, with lanczos-sgd none)."""
    learning_rate: float | None = None
    """Learning rate at the initial batch size (0.02). AutoWU and lanczos-sgd find their own."""
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
    patience: int = 60
    """Seconds without a sign of life after which a process counts as dead, and the others stop."""

    def __post_init__(self) -> None:
        """Checks every field, before anything is loaded or written."""
        where = "train"
        for name, choices in (
            ("dataset", DATASETS),
            ("model", MODELS),
            ("optimizer", OPTIMIZERS),
            ("criterion", CRITERIA),
            ("scaling", SCALINGS),
            ("schedule", SCHEDULES),
            ("resume", RESUMES),
            ("distributed", ("auto",)),
        ):
            if getattr(self, name) is not None:
                _validate.one_of(where, choices, **flag(name, getattr(self, name)))
        for name in ("eta", "theta", "nu", "learning_rate"):
            if getattr(self, name) is not None:
                _validate.positive(where, **flag(name, getattr(self, name)))
        for name in (
            "noise_groups",
            "initial_batch_size",
            "max_batch_size",
            "max_micro_batch_size",
            "curvature_examples",
            "refresh_every",
            "epochs",
            "steps_per_call",
            "checkpoint_every",
            "keep",
            "devices",
            "num_processes",
            "patience",
        ):
            if getattr(self, name) is not None:
                _validate.positive_int(where, **flag(name, getattr(self, name)))
        self._check_rate()
        for name in ("seed", "lag"):
            _validate.between(where, 0, 2**32, **flag(name, getattr(self, name)))
        if self.noise_groups < 2:
            raise ValueError(f"train: --noise-groups must be at least 2, got {self.noise_groups}")
        first, largest = self.initial_batch_size, self.max_batch_size
        if not self.auto:  # with --auto the sizes left out depend on the data
            first, largest = first or _FIRST_BATCH_SIZE, largest or _LARGEST_BATCH_SIZE
        if largest and largest > 2**30:
            raise ValueError(f"train: --max-batch-size must be at most 2**30, got {largest}")
        if first and largest and first > largest:
            raise ValueError(
                f"train: --initial-batch-size {first} exceeds --max-batch-size {largest}"
            )
        if first and first < 2 and self.criterion != "none":
            raise ValueError(
                "train: --initial-batch-size must be at least 2 for the noise of a gradient to be "
                f"seen, got {first}"
            )
        if self.smoothing is not None:
            _validate.between(where, 0.0, 1.0, **flag("smoothing", self.smoothing))
        if self.growth_limit is not None and not self.growth_limit > 1:
            raise ValueError(f"train: --growth-limit must exceed 1, got {self.growth_limit}")
        self._check_processes()
        self._check_data()

    def _check_rate(self) -> None:
        """No learning rate, or rule for it, beside one that is found."""

        def refuse(reason: str, *names: str) -> None:
            for name in names:
                if getattr(self, name) is not None:
                    given = f"{_spelled(name)} {getattr(self, name)}"
                    raise ValueError(f"train: {reason}, leave out {given}")

        if self.auto:
            refuse("--auto decides by itself", "learning_rate", "schedule", "scaling")
            if self.criterion == "none":
                refuse("--auto decides by itself", "criterion")
        if self.schedule in FINDS_ITS_RATE:
            refuse(f"--schedule {self.schedule} finds the learning rate", "learning_rate")
        if self.optimizer == "lanczos-sgd":
            found = "--optimizer lanczos-sgd finds the learning rate"
            refuse(found, "learning_rate", *(["scaling"] if self.scaling != "none" else []))
            if self.auto:
                raise ValueError(f"train: {found}, leave out --auto")
            if self.schedule in FINDS_ITS_RATE:
                refuse(found, "schedule")
        if not self.measures_curvature:
            needs = "only --optimizer lanczos-sgd and --scaling random-matrix measure the curvature"
            refuse(needs, "curvature_examples", "refresh_every")

    def _check_data(self) -> None:
        """Where the data are, and a model that can read them."""
        text = self.dataset == "text"
        if text and self.data_file is None:
            raise ValueError("train: --dataset text needs --data-file")
        if not text and self.data_file is not None:
            raise ValueError(f"train: --data-file has no meaning for --dataset {self.dataset}")
        if self.data_dir is not None and self.dataset in ("digits", "text"):
            raise ValueError(f"train: --data-dir has no meaning for --dataset {self.dataset}")
        if text != (self.model == "transformer"):
            raise ValueError(
                f"train: --model {self.model} does not read --dataset {self.dataset}: text goes with "
                "transformer, images with the others"
            )

    def _check_processes(self) -> None:
        """All of --coordinator, --num-processes and --process-id, or none."""
        by_hand = ("coordinator", "num_processes", "process_id")
        given = [name for name in by_hand if getattr(self, name) is not None]
        if self.distributed is not None and given:
            name = _spelled(given[0])
            raise ValueError(f"train: --distributed auto finds it by itself, leave out {name}")
        if given and len(given) < len(by_hand):
            missing = ", ".join(_spelled(name) for name in by_hand if name not in given)
            raise ValueError(f"train: {_spelled(given[0])} needs {missing}, too")
        if self.process_id is not None:
            number = self.num_processes or 1
            _validate.between("train", 0, number, **flag("process_id", self.process_id))
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"train: --coordinator must be HOST:PORT, got {self.coordinator!r}")

    @property
    def measures_curvature(self) -> bool:
        """Whether something in the chain needs the loss on a curvature batch."""
        return self.optimizer == "lanczos-sgd" or self.scaling == "random-matrix"

    def resolved(self, num_examples: int) -> TrainConfig:
        """Every option that was left out, filled in: some defaults depend on others and on the data.

        Args:
          num_examples: in the training data.

        Returns:
          A configuration whose numbers are those of the run. With `auto`, learning_rate, schedule and
          scaling stay None: they are found.

        Raises:
          ValueError: the sizes contradict each other.
        """

        def power_of_two(number: float) -> int:
            return 2 ** round(math.log2(max(number, 1.0)))

        values: dict[str, Any] = dict(
            eta=1.0,
            initial_batch_size=_FIRST_BATCH_SIZE,
            max_batch_size=_LARGEST_BATCH_SIZE,
            scaling="sqrt",
            schedule="cosine",
            learning_rate=None if self.schedule in FINDS_ITS_RATE else 0.02,
        )
        if self.optimizer == "lanczos-sgd":
            values.update(scaling="none", learning_rate=None)
        if self.auto:
            first = min(max(power_of_two(num_examples / 256), 16), 256)
            first = self.initial_batch_size or first
            largest = min(max(power_of_two(num_examples / 4), first), 8192)
            values = dict(
                eta=ETA,
                initial_batch_size=first,
                max_batch_size=max(largest, first),
                **BATCH_SIZE_OPTIONS,
            )
        if self.measures_curvature:
            measured = min(self.curvature_examples or 256, num_examples)
            values["curvature_examples"] = measured
            values["refresh_every"] = max(min(400 * measured, self.epochs * num_examples // 3), 1)
        left_out = {k: v for k, v in values.items() if getattr(self, k) in (None, False)}
        return dataclasses.replace(self, **left_out)

    @property
    def output(self) -> Path:
        """The folder for results."""
        return Path("runs", self.dataset) if self.out is None else Path(self.out)


def _spelled(name: str) -> str:
    """The field as the command spells it."""
    return "--" + name.replace("_", "-")


def flag(name: str, value: Any) -> dict[str, Any]:
    """The field for `_validate`, as the command spells it."""
    return {_spelled(name): value}
