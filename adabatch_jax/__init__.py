"""adabatch_jax: batch size and learning rate decided while a model trains, for JAX and Optax.

A training step answers questions, each in its own room: `noise` (how noisy is this gradient?),
`batch_size` (how many examples should the next step use?), `curvature` (how sharp is the loss?),
`learning_rate` (how far should the step go?). `optimizers` holds ready-made recipes and `training` a
complete training run. Everything is a pure Optax transformation.

Here are the names that a user needs first. Each room offers more: `adabatch_jax.curvature.top_eigenvector`.
"""

from importlib.metadata import PackageNotFoundError, version

from adabatch_jax.batch_size import (
    BatchSizeStatus,
    adapt_batch_size,
    adaptive_multi_steps,
    augmented_inner_product_test,
    batch_size_schedule,
    cabs,
    coordinate_norm_test,
    get_batch_size,
    gradient_noise_scale,
    has_updated,
    inner_product_test,
    metrics,
    needs_noise,
    norm_test,
    track_noise_scale,
    trained_parameters,
    unless_skipped,
)

# Names of `adabatch_jax.curvature` that are found here, too, though not in `__all__`.
from adabatch_jax.curvature import (
    batch_gauss_newton_extremes as batch_gauss_newton_extremes,
    batch_hessian_extremes as batch_hessian_extremes,
    gauss_newton_noise as gauss_newton_noise,
    gauss_newton_vector_product as gauss_newton_vector_product,
    hessian_noise as hessian_noise,
    hessian_vector_product as hessian_vector_product,
    lanczos_spectrum as lanczos_spectrum,
    max_stable_learning_rate as max_stable_learning_rate,
)
from adabatch_jax.learning_rate import (
    AutowuPhase,
    WarmupEnd,
    by_examples,
    linear_scaling,
    random_matrix_scaling,
    return_to_minimum,
    scale_by_autowu,
    scale_by_batch_size,
    scale_by_example_schedule,
    scale_by_improved_autowu,
    scale_by_lanczos,
    scale_by_random_matrix,
    sqrt_scaling,
)
from adabatch_jax.noise import (
    GradientNoise,
    merge_noise,
    split_groups,
    value_and_grad_noise,
)
from adabatch_jax.optimizers import (
    adadagrad,
    adadagrad_norm,
    adamp,
    automatic,
    grow_batch_size,
    scale_by_adagrad_norm,
)

try:
    __version__ = version("adabatch-jax")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0.0.0"

__all__ = [
    "AutowuPhase",
    "BatchSizeStatus",
    "GradientNoise",
    "WarmupEnd",
    "adadagrad",
    "adadagrad_norm",
    "adamp",
    "adapt_batch_size",
    "adaptive_multi_steps",
    "augmented_inner_product_test",
    "automatic",
    "batch_size_schedule",
    "by_examples",
    "cabs",
    "coordinate_norm_test",
    "get_batch_size",
    "gradient_noise_scale",
    "grow_batch_size",
    "has_updated",
    "inner_product_test",
    "linear_scaling",
    "merge_noise",
    "metrics",
    "needs_noise",
    "norm_test",
    "random_matrix_scaling",
    "return_to_minimum",
    "scale_by_adagrad_norm",
    "scale_by_autowu",
    "scale_by_batch_size",
    "scale_by_example_schedule",
    "scale_by_improved_autowu",
    "scale_by_lanczos",
    "scale_by_random_matrix",
    "split_groups",
    "sqrt_scaling",
    "track_noise_scale",
    "trained_parameters",
    "unless_skipped",
    "value_and_grad_noise",
]
