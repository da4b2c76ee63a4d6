"""What is trained? Models by name, and the losses of single examples.

`build_model` makes a Flax module by its name: classifiers of images, a `Transformer` for text.
`classifier` puts one together with a data set: initial parameters, and `apply` from inputs as they are
stored to logits. `losses_and_logits` are those of single examples; `masked_mean` averages the losses of
a group of which only the first examples are real.
"""

from adabatch_jax.training.models._build import ImageModelName, ModelName, build_model
from adabatch_jax.training.models._classifier import Classifier, classifier
from adabatch_jax.training.models._images import CNN, MLP, Logistic, PreActResNet
from adabatch_jax.training.models._losses import (
    Apply,
    losses_and_logits,
    masked_mean,
    mean_per_example,
)
from adabatch_jax.training.models._transformer import Transformer

__all__ = [
    "CNN",
    "MLP",
    "Apply",
    "Classifier",
    "ImageModelName",
    "Logistic",
    "ModelName",
    "PreActResNet",
    "Transformer",
    "build_model",
    "classifier",
    "losses_and_logits",
    "masked_mean",
    "mean_per_example",
]
