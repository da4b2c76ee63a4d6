"""The configuration of a training run: its fields are the options of `adabatch-jax train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from adabatch_jax import _validate

DATASETS = ("digits", "mnist", "fashion-mnist")
MODELS = ("logistic", "mlp", "cnn")
OPTIMIZERS = ("adadagrad", "adadagrad-norm", "adamw", "adam", "sgd", "momentum", "lamb")
CRITERIA = ("norm", "coordinate-norm", "inner-product", "augmented", "noise-scale", "none")
SCALINGS = ("none", "linear", "sqrt")
SCHEDULES = ("constant", "cosine")


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
    """Data set: digits (embedded), mnist or fashion-mnist (found in the usual places, else downloaded)."""
    model: str = "mlp"
    """Model: logistic, mlp (256 hidden units) or cnn."""
    optimizer: str = "adadagrad"
    """Optimizer: adadagrad, adadagrad-norm (one accumulator), adamw, adam, sgd, momentum (0.9) or lamb."""
    criterion: str = "norm"
    """Test that grows the batch: norm, coordinate-norm, inner-product, augmented, noise-scale, or none."""
    eta: float = 1.0
    """Threshold η of norm and coordinate-norm: smaller asks for larger batches."""
    theta: float = 0.9
    """Threshold ϑ of inner-product and augmented."""
    nu: float = 5.84
    """Threshold ν of augmented, across the gradient."""
    debias: bool = False
    """Take the noise out of the squared gradient norm that the test compares with."""
    smoothing: float | None = None
    """Decay of the average over tests of numerator and denominator, in [0, 1); use with --debias."""
    growth_limit: float | None = None
    """Largest factor by which one test may enlarge the batch."""
    noise_groups: int = 8
    """Least number of groups per step from which the noise is measured."""
    initial_batch_size: int = 16
    """Examples of the first step."""
    max_batch_size: int = 512
    """Largest batch size."""
    max_micro_batch_size: int = 1024
    """Most examples whose gradient is computed at once: bounds the memory."""
    scaling: str = "sqrt"
    """How the learning rate follows the batch size, from the initial one: none, linear or sqrt."""
    learning_rate: float = 0.02
    """Learning rate at the initial batch size."""
    schedule: str = "cosine"
    """Learning rate over examples: constant or cosine."""
    epochs: int = 20
    """Passes over the training data; steps change size, this budget does not."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the examples."""
    lag: int = 0
    """Steps by which the loop runs ahead of the batch size it reads (hides the latency of accelerators)."""
    out: Path | None = None
    """Folder for metrics.csv, summary.json and run.png (default: runs/DATASET)."""
    data_dir: Path | None = None
    """Folder that holds the IDX files of mnist or fashion-mnist."""

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
        ):
            _validate.one_of(where, choices, **_flag(name, getattr(self, name)))
        for name in ("eta", "theta", "nu", "learning_rate"):
            _validate.positive(where, **_flag(name, getattr(self, name)))
        for name in (
            "noise_groups",
            "initial_batch_size",
            "max_batch_size",
            "max_micro_batch_size",
            "epochs",
        ):
            _validate.positive_int(where, **_flag(name, getattr(self, name)))
        for name in ("seed", "lag"):
            _validate.between(where, 0, 2**32, **_flag(name, getattr(self, name)))
        if self.noise_groups < 2:
            raise ValueError(f"train: --noise-groups must be at least 2, got {self.noise_groups}")
        if self.initial_batch_size > self.max_batch_size:
            raise ValueError(
                f"train: --initial-batch-size {self.initial_batch_size} exceeds "
                f"--max-batch-size {self.max_batch_size}"
            )
        if self.initial_batch_size < 2 and self.criterion != "none":
            raise ValueError(
                "train: --initial-batch-size must be at least 2 for the noise of a gradient to be "
                f"seen, got {self.initial_batch_size}"
            )
        if self.smoothing is not None:
            _validate.between(where, 0.0, 1.0, **_flag("smoothing", self.smoothing))
        if self.growth_limit is not None and not self.growth_limit > 1:
            raise ValueError(f"train: --growth-limit must exceed 1, got {self.growth_limit}")
        if self.dataset == "digits" and self.data_dir is not None:
            raise ValueError("train: --data-dir has no meaning for --dataset digits (embedded)")

    @property
    def output(self) -> Path:
        """The folder for results."""
        return Path("runs", self.dataset) if self.out is None else Path(self.out)


def _flag(name: str, value: Any) -> dict[str, Any]:
    """The field as the command spells it."""
    return {"--" + name.replace("_", "-"): value}
