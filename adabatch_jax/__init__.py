"""adabatch_jax: batch size and learning rate decided while a model trains, for JAX and Optax.

A training step answers questions, each in its own room: `noise` (how noisy is this gradient?),
`batch_size` (how many examples should the next step use?), `learning_rate` (how far should the step
go?). `optimizers` holds ready-made recipes and `training` a complete training run. Everything is a
pure Optax transformation.
"""

from importlib.metadata import PackageNotFoundError, version

from adabatch_jax.batch_size import (
    BatchSizeStatus,
    Criterion,
    Evidence,
    adapt_batch_size,
    adaptive_multi_steps,
    augmented_inner_product_test,
    coordinate_norm_test,
    get_batch_size,
    gradient_noise_scale,
    has_updated,
    inner_product_test,
    metrics,
    norm_test,
)
from adabatch_jax.learning_rate import (
    AutowuPhase,
    SmoothedLosses,
    WarmupEnd,
    linear_scaling,
    return_to_minimum,
    scale_by_autowu,
    scale_by_batch_size,
    scale_by_example_schedule,
    scale_by_improved_autowu,
    smoothed_losses,
    sqrt_scaling,
)
from adabatch_jax.noise import GradientNoise, merge_noise, split_groups, value_and_grad_noise
from adabatch_jax.optimizers import (
    adadagrad,
    adadagrad_norm,
    adamp,
    automatic,
    scale_by_adagrad_norm,
    scale_by_adamp,
)

try:
    __version__ = version("adabatch-jax")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0.0.0"

__all__ = [
    "AutowuPhase",
    "BatchSizeStatus",
    "Criterion",
    "Evidence",
    "GradientNoise",
    "SmoothedLosses",
    "WarmupEnd",
    "adadagrad",
    "adadagrad_norm",
    "adamp",
    "adapt_batch_size",
    "adaptive_multi_steps",
    "augmented_inner_product_test",
    "automatic",
    "coordinate_norm_test",
    "get_batch_size",
    "gradient_noise_scale",
    "has_updated",
    "inner_product_test",
    "linear_scaling",
    "merge_noise",
    "metrics",
    "norm_test",
    "return_to_minimum",
    "scale_by_adagrad_norm",
    "scale_by_adamp",
    "scale_by_autowu",
    "scale_by_batch_size",
    "scale_by_example_schedule",
    "scale_by_improved_autowu",
    "smoothed_losses",
    "split_groups",
    "sqrt_scaling",
    "value_and_grad_noise",
]
