"""Which ready-made recipe?

* `grow_batch_size` is the one to begin with: any optimizer of Optax, with the rate, the schedules and
  the loop that you have, and a batch that grows.
* `automatic` is the whole system around any direction: it finds the learning rate, grows the batch
  and scales the rate with it.
* `adadagrad` and `adadagrad_norm` are AdAdaGrad: AdaGrad, per coordinate or with one scalar
  accumulator (`scale_by_adagrad_norm`), with a batch size that a test on the noise lets grow.
* `adamp` (its direction: `scale_by_adamp`) is Adam without the radial part of the step where a
  parameter's length means nothing.
* `scale_by_batch_adam` is Adam whose averages remember examples: they follow the batch size.

For other rooms: `adagrad_direction`, the direction of `adadagrad`, and the numbers of `automatic`: `ETA`,
`BATCH_SIZE_OPTIONS`, `WARMUP`, `LEAST_STEPS`.
"""

from adabatch_jax.optimizers._adadagrad import adadagrad, adadagrad_norm
from adabatch_jax.optimizers._adagrad_norm import scale_by_adagrad_norm
from adabatch_jax.optimizers._adamp import adamp, scale_by_adamp
from adabatch_jax.optimizers._automatic import automatic
from adabatch_jax.optimizers._batch_adam import scale_by_batch_adam
from adabatch_jax.optimizers._grow_batch_size import grow_batch_size

__all__ = [
    "adadagrad",
    "adadagrad_norm",
    "adamp",
    "automatic",
    "grow_batch_size",
    "scale_by_adagrad_norm",
    "scale_by_adamp",
    "scale_by_batch_adam",
]

# For other rooms: no part of the public interface.
from adabatch_jax.optimizers._adadagrad import adagrad_direction as adagrad_direction
from adabatch_jax.optimizers._automatic import (
    BATCH_SIZE_OPTIONS as BATCH_SIZE_OPTIONS,
    ETA as ETA,
    LEAST_STEPS as LEAST_STEPS,
    WARMUP as WARMUP,
)
