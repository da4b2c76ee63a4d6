"""What does a run say about itself? The numbers of its steps: in files, on the terminal, in words.

`RowReader` makes a row of the numbers of a step, in the columns `COLUMNS`, and stops a run that learns
nothing (`TrainingError`). `MetricsWriter` writes the rows to metrics.csv, `read_metrics` reads them
back, `EventWriter` writes them for TensorBoard, and `Progress` shows how far the run is.
`describe_warmup`, `tell_warmup` and `note_warmup` say how the search for a learning rate went.
"""

from adabatch_jax.training.record._metrics_file import MetricsWriter, read_metrics
from adabatch_jax.training.record._progress import Progress
from adabatch_jax.training.record._rows import (
    COLUMNS,
    Row,
    RowReader,
    TrainingError,
)
from adabatch_jax.training.record._tensorboard import EventWriter, check_tensorboard
from adabatch_jax.training.record._warmup_words import (
    describe_warmup,
    note_warmup,
    tell_warmup,
    was_searched,
)

__all__ = [
    "COLUMNS",
    "EventWriter",
    "MetricsWriter",
    "Progress",
    "Row",
    "RowReader",
    "TrainingError",
    "check_tensorboard",
    "describe_warmup",
    "note_warmup",
    "read_metrics",
    "tell_warmup",
    "was_searched",
]
