"""Models by their name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from flax import linen as nn

from adabatch_jax.training.models._images import CNN, MLP, Logistic, PreActResNet
from adabatch_jax.training.models._transformer import Transformer

ImageModelName: TypeAlias = Literal["logistic", "mlp", "cnn", "resnet"]
ModelName: TypeAlias = Literal[ImageModelName, "transformer"]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "logistic": Logistic,
    "mlp": MLP,
    "cnn": CNN,
    "resnet": PreActResNet,
    "transformer": Transformer,
}


def build_model(name: str, num_classes: int) -> nn.Module:
    """Builds a classifier of images, or a model of text, by its name.

    Args:
      name: of images: "logistic", "mlp" (256 hidden units), "cnn" (two convolutions) or "resnet" (three
        residual blocks, group normalisation); of text: "transformer" (two blocks of 64 channels).
      num_classes: number of logits, at least 1.

    Returns:
      A Flax linen module from float [B, H, W] to logits [B, num_classes] in the same dtype
      (float32 for float32); the transformer from integers [B, L], L ≤ 128, to [B, L, num_classes],
      float32. It has parameters only: no dropout, no running statistics.

    Raises:
      ValueError: if the name is unknown or `num_classes` is not positive; when applied, if the
        inputs are not floats of rank 3 (the transformer: integers of rank 2).

    Example:
      >>> import jax
      >>> model = build_model("cnn", num_classes=10)
      >>> images = jax.numpy.zeros((2, 8, 8))
      >>> logits, parameters = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
      >>> logits.shape
      (2, 10)
    """
    if name not in _MODELS:
        choices = ", ".join(map(repr, _MODELS))
        raise ValueError(f"build_model: name must be one of {choices}, got {name!r}")
    if num_classes < 1:
        raise ValueError(f"build_model: num_classes must be at least 1, got {num_classes}")
    return _MODELS[name](num_classes=num_classes)
