"""A model and the data it sees: initial parameters, and a function from raw inputs to logits."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax._types import PyTree
from adabatch_jax.training.data import Dataset, to_float
from adabatch_jax.training.models._build import build_model
from adabatch_jax.training.models._losses import Apply
from adabatch_jax.training.models._transformer import Transformer


class Classifier(NamedTuple):
    """Initial parameters, and `apply(params, inputs as stored [B, …]) -> logits [B, …, classes]`."""

    params: PyTree
    apply: Apply


def classifier(model_name: str, dataset: Dataset, seed: int) -> Classifier:
    """Builds the model for a data set, with its normalisation inside.

    Args:
      model_name: as for `build_model`.
      dataset: images, whose pixels are standardised by the mean and deviation of the training images;
        or text, whose bytes are taken as they are and whose windows fix the model's length.
      seed: of the initial parameters.

    Returns:
      A `Classifier`; the same arguments give the same one, so a trained model can be rebuilt.

    Raises:
      ValueError: a model of text and a data set of images, or the other way round.
    """
    model = build_model(model_name, dataset.num_classes)
    key = jax.random.key(seed)
    text = dataset.train_labels.ndim == 2  # a label for every byte
    if isinstance(model, Transformer) != text:
        reads, holds = ("images", "text") if text else ("text", "images")
        raise ValueError(
            f"classifier: model_name {model_name!r} is a model of {reads}, "
            f"but dataset {dataset.name!r} holds {holds}"
        )
    if isinstance(model, Transformer):
        model = model.clone(max_length=dataset.train_inputs.shape[1])
        bytes_ = jnp.asarray(dataset.train_inputs[:1])
        return Classifier(
            jax.jit(model.init)(key, bytes_)["params"],  # one compilation; without jit it is dozens
            lambda params, inputs: jnp.asarray(model.apply({"params": params}, inputs)),
        )
    some = to_float(jnp.asarray(dataset.train_inputs[:1]))
    params = model.init(key, some)["params"]
    mean, deviation = _mean_and_deviation(dataset.train_inputs)

    def apply(params: PyTree, inputs: jax.Array) -> jax.Array:
        return jnp.asarray(model.apply({"params": params}, (to_float(inputs) - mean) / deviation))

    return Classifier(params, apply)


def _mean_and_deviation(inputs: np.ndarray) -> tuple[float, float]:
    """Over all pixels of the training data, on the scale of `to_float`."""
    unit = 255.0 if inputs.dtype == np.uint8 else 1.0
    return float(inputs.mean()) / unit, float(inputs.std()) / unit
