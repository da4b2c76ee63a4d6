"""How far should the step go?

* `scale_by_batch_size` lets the learning rate follow the batch size by a rule: `linear_scaling`,
  `sqrt_scaling`, `random_matrix_scaling`. `scale_by_random_matrix` does so by the last of them, and
  measures the batch size that it needs.
* `follow_batch_size` lets any other hyperparameter follow it: by `scaled_beta`, `scaled_eps` and
  `scaled_weight_decay`. `scaled_average` does it for an average of the parameters.
* `scale_by_example_schedule` applies a schedule over examples instead of steps; `by_examples` makes any
  optimizer of Optax read its own schedules so.
* `scale_by_autowu` finds the learning rate by itself: it warms up until the loss has passed its
  minimum, goes back to the rate there, and decays. `scale_by_improved_autowu` is the form to start
  with, and `return_to_minimum` around the optimizer takes the parameters back as well.
  `smoothed_losses` shows what it saw.
* `scale_by_lanczos` measures the curvature now and then, and sets learning rate and momentum by it.

AutoWU smooths the losses with a Gaussian process, in one of two ways. `rbf_smoother` is the paper's: a
very smooth kernel of fixed length, fitted to 100 and conditioned on 500 random losses, five times.
`quasisep_smoother` has a Matérn-5/2 kernel that learns its length, is conditioned on all losses in linear
time, and leaves nothing to chance. `Smoother` says what both are asked, `_rbf.py` and `_quasisep.py`
how they answer, `_autowu_step.py` what is done with the answer, and `Peak` which rate follows.

For other rooms: `probe_direction` tells the traits of a direction (`DirectionTraits`), or that it
cannot be tried (`UntriedError`); `batch_sizes` reads a batch size from what `update` is told,
`share_of_new` is 1 − β for a batch, `LEAST_WARMUP_STEPS` the shortest warm-up; `Hyperparameters` and
`scheduled_by_examples` are what `by_examples` is made of.
"""

from adabatch_jax.learning_rate._autowu import scale_by_autowu
from adabatch_jax.learning_rate._autowu_preset import scale_by_improved_autowu
from adabatch_jax.learning_rate._autowu_state import AutowuPhase, WarmupEnd
from adabatch_jax.learning_rate._by_examples import by_examples
from adabatch_jax.learning_rate._hyperparameter_rules import (
    follow_batch_size,
    scaled_average,
    scaled_beta,
    scaled_eps,
    scaled_weight_decay,
)
from adabatch_jax.learning_rate._lanczos import scale_by_lanczos
from adabatch_jax.learning_rate._peak import Peak
from adabatch_jax.learning_rate._posterior_test import Smoother
from adabatch_jax.learning_rate._quasisep import quasisep_smoother
from adabatch_jax.learning_rate._random_matrix import scale_by_random_matrix
from adabatch_jax.learning_rate._rbf import rbf_smoother
from adabatch_jax.learning_rate._return_to_minimum import return_to_minimum
from adabatch_jax.learning_rate._scaling import (
    linear_scaling,
    random_matrix_scaling,
    scale_by_batch_size,
    sqrt_scaling,
)
from adabatch_jax.learning_rate._schedule import scale_by_example_schedule
from adabatch_jax.learning_rate._smoothed import SmoothedLosses, smoothed_losses

__all__ = [
    "AutowuPhase",
    "Peak",
    "SmoothedLosses",
    "Smoother",
    "WarmupEnd",
    "by_examples",
    "follow_batch_size",
    "linear_scaling",
    "quasisep_smoother",
    "random_matrix_scaling",
    "rbf_smoother",
    "return_to_minimum",
    "scale_by_autowu",
    "scale_by_batch_size",
    "scale_by_example_schedule",
    "scale_by_improved_autowu",
    "scale_by_lanczos",
    "scale_by_random_matrix",
    "scaled_average",
    "scaled_beta",
    "scaled_eps",
    "scaled_weight_decay",
    "smoothed_losses",
    "sqrt_scaling",
]

# For other rooms: no part of the public interface.
from adabatch_jax.learning_rate._autowu_plan import LEAST_WARMUP_STEPS as LEAST_WARMUP_STEPS
from adabatch_jax.learning_rate._examples import batch_sizes as batch_sizes
from adabatch_jax.learning_rate._hyperparameter_rules import share_of_new as share_of_new
from adabatch_jax.learning_rate._probe_direction import (
    DirectionTraits as DirectionTraits,
    UntriedError as UntriedError,
    probe_direction as probe_direction,
)
from adabatch_jax.learning_rate._scheduled import (
    Hyperparameters as Hyperparameters,
    scheduled_by_examples as scheduled_by_examples,
)
