"""How far should the step go?

* `scale_by_batch_size` lets the learning rate follow the batch size by a rule: `linear_scaling`,
  `sqrt_scaling`.
* `scale_by_example_schedule` applies a schedule over examples instead of steps.
"""

from adabatch_jax.learning_rate._scaling import linear_scaling, scale_by_batch_size, sqrt_scaling
from adabatch_jax.learning_rate._schedule import scale_by_example_schedule

__all__ = [
    "linear_scaling",
    "scale_by_batch_size",
    "scale_by_example_schedule",
    "sqrt_scaling",
]
