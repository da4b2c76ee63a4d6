"""Which examples does a step see? Data sets, the order of their examples, and the shape of a batch.

In the order of the data: `load_dataset` and `load_text` make a `Dataset`, and `check_dataset` refuses
one that cannot be learned. `Feed` fixes the order of its examples, by position and not by batch.
`Ladder` says in how many groups of which size a batch is cut, so that few shapes are compiled.

For a loop of one's own, `ArrayStream`, `GrainStream` and `IterableStream` hand out micro-batches of
one shape for batches that change their size.
"""

from adabatch_jax.training.data._datasets import (
    Dataset,
    DatasetName,
    ImagesName,
    load_dataset,
    to_float,
)
from adabatch_jax.training.data._feed import Feed
from adabatch_jax.training.data._ladder import Ladder, Rung
from adabatch_jax.training.data._stream import ArrayStream, MicroBatches, Stream
from adabatch_jax.training.data._stream_sources import GrainStream, IterableStream
from adabatch_jax.training.data._text import load_text
from adabatch_jax.training.data._validate_data import check_dataset

__all__ = [
    "ArrayStream",
    "Dataset",
    "DatasetName",
    "Feed",
    "GrainStream",
    "ImagesName",
    "IterableStream",
    "Ladder",
    "MicroBatches",
    "Rung",
    "Stream",
    "check_dataset",
    "load_dataset",
    "load_text",
    "to_float",
]
