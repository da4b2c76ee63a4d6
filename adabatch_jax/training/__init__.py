"""Run it: real data in, a trained model and a record of every decision out.

`train(TrainConfig(...))` is what `adabatch-jax train` calls. In the order of the data: `load_dataset`
finds and checks the data, `Feed` fixes the order of the examples, `rung_for` the compiled shape of a
batch, `make_step` the fused step, `build_optimizer` the chain, `plot_run` the picture of the run and
`plot_warmup` that of AutoWU's decision. The rooms of the core know nothing of this one.
"""

from adabatch_jax.training._config import TrainConfig
from adabatch_jax.training._data import Dataset, load_dataset
from adabatch_jax.training._feed import Feed
from adabatch_jax.training._ladder import Rung, rung_for
from adabatch_jax.training._loop import TrainingError, TrainResult, run_steps, train
from adabatch_jax.training._models import build_model
from adabatch_jax.training._optimizer import build_criterion, build_optimizer
from adabatch_jax.training._plot import plot_run
from adabatch_jax.training._plot_warmup import plot_warmup
from adabatch_jax.training._report import read_metrics
from adabatch_jax.training._step import make_step

__all__ = [
    "Dataset",
    "Feed",
    "Rung",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "build_criterion",
    "build_model",
    "build_optimizer",
    "load_dataset",
    "make_step",
    "plot_run",
    "plot_warmup",
    "read_metrics",
    "run_steps",
    "rung_for",
    "train",
]
