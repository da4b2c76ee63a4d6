"""Run it: real data in, a trained model and a record of every decision out.

`train(TrainConfig(...))` is what `adabatch-jax train` calls. In the order of the data: `load_dataset`
finds and checks the data, `Feed` fixes the order of the examples, `rung_for` the compiled shape of a
batch, `make_step` the fused step, `build_optimizer` the chain, `plot_run` the picture of the run and
`plot_warmup` that of AutoWU's decision. `save_params` keeps what was trained.

Data of your own, in a loop of your own: `ArrayStream`, `GrainStream` and `IterableStream` hand out
micro-batches of one shape for batches that change their size. `load_text` makes a data set of a text file.

`report_spectrum(SpectrumConfig(...))` is what `adabatch-jax spectrum` calls: `measure_spectrum` compares
the curvature of batches with the formulas, `plot_spectrum` draws it. The rooms of the core know nothing
of this one.
"""

from adabatch_jax.training._checkpoint import load_params, save_params
from adabatch_jax.training._config import TrainConfig
from adabatch_jax.training._data import Dataset, load_dataset
from adabatch_jax.training._feed import Feed
from adabatch_jax.training._interrupt import RunInterrupted
from adabatch_jax.training._ladder import Rung, rung_for
from adabatch_jax.training._loop import ProcessLost, run_steps
from adabatch_jax.training._models import build_model
from adabatch_jax.training._optimizer import build_criterion, build_optimizer
from adabatch_jax.training._plot import plot_run
from adabatch_jax.training._plot_spectrum import plot_spectrum
from adabatch_jax.training._plot_warmup import plot_warmup
from adabatch_jax.training._report import read_metrics
from adabatch_jax.training._report_spectrum import report_spectrum, show_spectrum
from adabatch_jax.training._rows import TrainingError
from adabatch_jax.training._spectrum import SpectrumResult, measure_spectrum
from adabatch_jax.training._spectrum_config import SpectrumConfig
from adabatch_jax.training._step import make_step
from adabatch_jax.training._stream import ArrayStream, MicroBatches, Stream, masked_mean
from adabatch_jax.training._stream_sources import GrainStream, IterableStream
from adabatch_jax.training._text import load_text
from adabatch_jax.training._train import TrainResult, train

__all__ = [
    "ArrayStream",
    "Dataset",
    "Feed",
    "GrainStream",
    "IterableStream",
    "MicroBatches",
    "ProcessLost",
    "RunInterrupted",
    "Rung",
    "SpectrumConfig",
    "SpectrumResult",
    "Stream",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "build_criterion",
    "build_model",
    "build_optimizer",
    "load_dataset",
    "load_params",
    "load_text",
    "make_step",
    "masked_mean",
    "measure_spectrum",
    "plot_run",
    "plot_spectrum",
    "plot_warmup",
    "read_metrics",
    "report_spectrum",
    "run_steps",
    "rung_for",
    "save_params",
    "show_spectrum",
    "train",
]
