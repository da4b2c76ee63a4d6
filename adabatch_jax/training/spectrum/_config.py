"""What to measure of a curvature matrix: the fields are the options of `adabatch-jax spectrum`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal, NamedTuple

from adabatch_jax import _validate
from adabatch_jax.training._options import choices, flag
from adabatch_jax.training.data import ImagesName
from adabatch_jax.training.models import ImageModelName

_DEFAULT_EXAMPLES = 8192
_SMALLEST_BATCH_SIZE = 16


class Source(NamedTuple):
    """A model and its data."""

    dataset: str
    model: str
    data_dir: Path | None
    checkpoint: Path | None  # None: a fresh model


@dataclasses.dataclass(frozen=True)
class SpectrumConfig:
    """A measurement. The defaults measure the Hessian of a fresh MLP on the digits.

    Raises:
      ValueError: an option out of range, or two that contradict each other; the message names them as
        the command does.

    Example:
      >>> SpectrumConfig(matrix="gauss-newton").output
      PosixPath('runs/digits')
    """

    run: Path | None = None
    """Folder of a run of `adabatch-jax train`: measure its trained model on its data."""
    dataset: ImagesName | None = None
    """Data set of a fresh model (digits)."""
    model: ImageModelName | None = None
    """A fresh model (mlp)."""
    matrix: Literal["hessian", "gauss-newton"] = "hessian"
    """Curvature matrix."""
    examples: int | None = None
    """Training examples that make the full matrix (8192, or all if there are fewer)."""
    steps: int = 30
    """Lanczos steps: products with the matrix for one probe."""
    probes: int = 4
    """Random vectors for the density and the trace of the full matrix."""
    batch_sizes: tuple[int, ...] | None = None
    """Sizes of the batches to measure (powers of two from 16 to a quarter of the examples)."""
    subsamples: int = 5
    """Batches of each size, drawn without replacement from the examples of the full matrix."""
    noise_probe: Literal["ritz", "random"] = "ritz"
    """Direction in which the noise of the Hessian is measured: ritz is its top one."""
    max_micro_batch_size: int = 128
    """Most examples that are differentiated at once: bounds the memory."""
    seed: int = 0
    """Seed of the probes, of what is drawn and of the parameters of a fresh model."""
    out: Path | None = None
    """Folder for spectrum.json and spectrum.png (default: that of --run, else runs/DATASET)."""
    data_dir: Path | None = None
    """Folder that holds the IDX files of mnist or fashion-mnist."""

    def __post_init__(self) -> None:
        """Checks every field, before anything is loaded or written."""
        where = "spectrum"
        for name, values in choices(SpectrumConfig).items():
            if getattr(self, name) is not None:
                _validate.one_of(where, values, **flag(name, getattr(self, name)))
            if self.run is not None and name in ("dataset", "model") and getattr(self, name):
                raise ValueError(
                    f"spectrum: --run has a {name} of its own, leave out --{name} {getattr(self, name)}"
                )
        for name in ("examples", "steps", "probes", "subsamples", "max_micro_batch_size"):
            if getattr(self, name) is not None:
                _validate.positive_int(where, **flag(name, getattr(self, name)))
        _validate.between(where, 0, 2**32, **flag("seed", self.seed))
        if self.examples is not None and self.examples < 2:
            raise ValueError("spectrum: --examples must be at least 2 for noise to be seen, got 1")
        if self.batch_sizes is not None:
            if not self.batch_sizes:
                raise ValueError("spectrum: --batch-sizes needs at least one size")
            for size in self.batch_sizes:
                _validate.positive_int(where, **flag("batch_sizes", size))
            if len(set(self.batch_sizes)) < len(self.batch_sizes):
                raise ValueError(
                    f"spectrum: --batch-sizes {' '.join(map(str, self.batch_sizes))} holds one twice"
                )
        if self.data_dir is not None and self.run is None and self.dataset in (None, "digits"):
            raise ValueError("spectrum: --data-dir has no meaning for --dataset digits (embedded)")
        if self.matrix != "hessian" and self.noise_probe != "ritz":
            raise ValueError(
                f"spectrum: --matrix {self.matrix} has its noise from its batches, leave out "
                f"--noise-probe {self.noise_probe}"
            )

    @property
    def output(self) -> Path:
        """The folder for results."""
        if self.out is not None:
            return Path(self.out)
        return Path("runs", self.dataset or "digits") if self.run is None else Path(self.run)

    def source(self) -> Source:
        """What to measure: the run's, or a fresh model.

        Raises:
          ValueError: the folder of the run has no summary that could be used.
        """
        if self.run is None:
            return Source(self.dataset or "digits", self.model or "mlp", self.data_dir, None)
        path = Path(self.run, "summary.json")
        try:
            trained = json.loads(path.read_text(encoding="utf-8"))["config"]
            dataset, model, data_dir = (trained[k] for k in ("dataset", "model", "data_dir"))
            folder = self.data_dir or (None if data_dir is None else Path(data_dir))
        except OSError as error:
            raise ValueError(
                f"spectrum: --run {self.run} is not the folder of a finished run "
                f"({path}: {error.strerror})"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"spectrum: --run {self.run}: {path} is damaged") from None
        values = choices(SpectrumConfig)
        _validate.one_of(f"spectrum: {path}", values["dataset"], dataset=dataset)
        _validate.one_of(f"spectrum: {path}", values["model"], model=model)
        if self.data_dir is not None and dataset == "digits":
            raise ValueError(
                f"spectrum: --data-dir has no meaning for --run {self.run}, a run on digits (embedded)"
            )
        return Source(dataset, model, folder, Path(self.run, "checkpoint"))

    def resolved(self, num_examples: int) -> SpectrumConfig:
        """Sizes filled in that depend on the data.

        Args:
          num_examples: in the training data.

        Raises:
          ValueError: more examples are asked for than there are.
        """
        examples = self.examples or min(_DEFAULT_EXAMPLES, num_examples)
        if examples > num_examples:
            raise ValueError(
                f"spectrum: --examples {examples} exceeds the {num_examples} training examples"
            )
        sizes = self.batch_sizes
        if sizes is None:
            largest = max(examples // 4, 1)
            first = min(_SMALLEST_BATCH_SIZE, 2 ** (largest.bit_length() - 1))
            sizes = tuple(first * 2**k for k in range((largest // first).bit_length()))
        if max(sizes) > examples:
            raise ValueError(
                f"spectrum: --batch-sizes {max(sizes)} exceeds the {examples} examples of the full "
                "matrix"
            )
        return dataclasses.replace(self, examples=examples, batch_sizes=tuple(sorted(sizes)))
