"""Run it: real data in, a trained model and a record of every decision out.

`train(TrainConfig(...))` is what `adabatch-jax train` calls; `run_steps` makes the same steps and
writes nothing. `resolve` makes a `RunPlan` of a configuration, once: everything below takes the plan.
`register_optimizer`, `register_criterion` and `register_schedule` add choices of one's own.

| room | question | holds |
|---|---|---|
| `data/` | Which examples does a step see? | data sets, order of the examples, ladder, streams |
| `models/` | What is trained? | models by name, losses of examples |
| `devices/` | Where is it computed? | devices, processes, signals |
| `step/` | What is done with a batch? | the compiled step, alone or in a loop on the device |
| `checkpoint/` | How does it outlive the process? | parameters and states of a run on disk |
| `record/` | What does a run say about itself? | metrics.csv, progress, TensorBoard |
| `plot/` | How does a run look? | run.png, AutoWU's decision |
| `spectrum/` | How sharp is what was trained? | `report_spectrum`, which is `adabatch-jax spectrum` |

For a loop of one's own: `load_dataset` and `load_text` find the data, and `ArrayStream`, `GrainStream`
and `IterableStream` hand out micro-batches of one shape for batches that change their size. The rooms
of the core know nothing of this one.
"""

from adabatch_jax.training._config import TrainConfig
from adabatch_jax.training._loop import ProcessLost, run_steps
from adabatch_jax.training._optimizer import build_criterion, build_optimizer
from adabatch_jax.training._plan import RunPlan, resolve
from adabatch_jax.training._registry import (
    register_criterion,
    register_optimizer,
    register_schedule,
)
from adabatch_jax.training._train import TrainResult, train
from adabatch_jax.training.checkpoint import load_params, save_params
from adabatch_jax.training.data import (
    ArrayStream,
    Dataset,
    Feed,
    GrainStream,
    IterableStream,
    Ladder,
    MicroBatches,
    Rung,
    Stream,
    load_dataset,
    load_text,
)
from adabatch_jax.training.devices import RunInterrupted
from adabatch_jax.training.models import build_model, masked_mean
from adabatch_jax.training.plot import plot_run, plot_warmup
from adabatch_jax.training.record import TrainingError, read_metrics
from adabatch_jax.training.spectrum import (
    SpectrumConfig,
    SpectrumResult,
    measure_spectrum,
    plot_spectrum,
    report_spectrum,
    show_spectrum,
)
from adabatch_jax.training.step import make_step

__all__ = [
    "ArrayStream",
    "Dataset",
    "Feed",
    "GrainStream",
    "IterableStream",
    "Ladder",
    "MicroBatches",
    "ProcessLost",
    "RunInterrupted",
    "RunPlan",
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
    "register_criterion",
    "register_optimizer",
    "register_schedule",
    "report_spectrum",
    "resolve",
    "run_steps",
    "save_params",
    "show_spectrum",
    "train",
]
