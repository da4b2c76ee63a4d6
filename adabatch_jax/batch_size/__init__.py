"""How many examples should the next step use?

A criterion turns the noise of a gradient into a required batch size; `adapt_batch_size` keeps the next
batch size in the optimizer state; `adaptive_multi_steps` gathers micro-batches until it is reached.

* Criteria: `norm_test`, `coordinate_norm_test`, `inner_product_test`,
  `augmented_inner_product_test`, `gradient_noise_scale`; `cabs`, which reads the loss, too;
  `batch_size_schedule`, which measures nothing; `Criterion` and `Evidence` to write one.
* `get_batch_size`, `has_updated`, `needs_noise` and `metrics` read any optimizer state that holds a
  controller; `unless_skipped` keeps what the loop carries beside its parameters.
* `track_noise_scale` measures the noise in any loop, and decides nothing.
* `trained_parameters` tells which parameters an optimizer moves.

For other rooms: `returns_made` tells how often `return_to_minimum` has gone back.
"""

from adabatch_jax.batch_size._adapt import adapt_batch_size
from adabatch_jax.batch_size._criteria import (
    augmented_inner_product_test,
    coordinate_norm_test,
    gradient_noise_scale,
    inner_product_test,
    norm_test,
)
from adabatch_jax.batch_size._criterion import Criterion, Evidence
from adabatch_jax.batch_size._multi_steps import adaptive_multi_steps
from adabatch_jax.batch_size._read_state import get_batch_size, has_updated, metrics, needs_noise
from adabatch_jax.batch_size._schedules_and_cabs import batch_size_schedule, cabs
from adabatch_jax.batch_size._skipped import unless_skipped
from adabatch_jax.batch_size._state import BatchSizeStatus
from adabatch_jax.batch_size._track import track_noise_scale
from adabatch_jax.batch_size._trained import trained_parameters

__all__ = [
    "BatchSizeStatus",
    "Criterion",
    "Evidence",
    "adapt_batch_size",
    "adaptive_multi_steps",
    "augmented_inner_product_test",
    "batch_size_schedule",
    "cabs",
    "coordinate_norm_test",
    "get_batch_size",
    "gradient_noise_scale",
    "has_updated",
    "inner_product_test",
    "metrics",
    "needs_noise",
    "norm_test",
    "track_noise_scale",
    "trained_parameters",
    "unless_skipped",
]

# For other rooms: no part of the public interface.
from adabatch_jax.batch_size._read_state import returns_made as returns_made
