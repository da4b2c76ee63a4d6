"""`grow_batch_size`: an optimizer of Optax in its own loop, with a batch that grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from adabatch_jax import _validate
from adabatch_jax._tree import of_structure
from adabatch_jax._types import AxisName, PyTree, ScalingRule
from adabatch_jax.batch_size import Criterion, adapt_batch_size, adaptive_multi_steps, norm_test
from adabatch_jax.learning_rate import Hyperparameters, probe_direction, scheduled_by_examples

_WHERE = "grow_batch_size"
# Of the norm test: the smallest of 1, 1.5, 2, 3 at which two of the three scripts of
# tests/experiments/adoptions.py stay within a standard deviation (of seeds) of their constant batch.
ETA = 2.0
_REMEDY = (
    "say by scaling=adabatch.sqrt_scaling() or linear_scaling() how the rate follows the batch"
)


def grow_batch_size(
    optimizer_factory: Callable[..., optax.GradientTransformation],
    *,
    base_batch_size: int,
    max_batch_size: int,
    micro_batch_size: int | None,
    criterion: Criterion | Callable[..., Any] | None = None,
    scaling: ScalingRule | None = None,
    axis_name: AxisName = None,
    **hyperparameters: Any,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of Optax, in an unchanged loop, with a batch that grows by the noise of the gradient.

        optimizer = optax.adamw(schedule, weight_decay=0.1)             # before, with batches of 64
        optimizer = grow_batch_size(                                    # after: hand in batches of 16
            optax.adamw, learning_rate=schedule, weight_decay=0.1,
            base_batch_size=64, max_batch_size=4096, micro_batch_size=16)

    Every `update` call is one micro-batch, as with `optax.MultiSteps`. What is put together:

    1. `adaptive_multi_steps` gathers calls until the batch is complete, and measures the noise between
       them.
    2. `adapt_batch_size` lets the batch grow from `base_batch_size` by the norm test, de-biased and
       smoothed, by a tenth per step at most.
    3. `by_examples` reads every schedule at (examples so far) / `base_batch_size`: warm-up and decay come
       to their end with the data, in fewer steps.
    4. The learning rate follows the batch b by the kind of the optimizer, found by trying it: × √(b / b₀)
       where the length of a step does not follow that of the gradient (Adam, AdaGrad, LAMB, Lion, Muon),
       × b / b₀ where it does (SGD, momentum).

    Everything else is left as `optimizer_factory` makes it: masks, clipping inside, frozen parts. Weight
    decay that goes with the rate (`optax.adamw`) is per step: over the whole run it falls by the factor
    by which steps become fewer, times that by which the rate rises. To keep it per example, give
    `weight_decay=adabatch.learning_rate.follow_batch_size(scaled_weight_decay(0.1, sqrt_scaling()),
    base_batch_size=64)`.

    Args:
      optimizer_factory: `optax.adamw`, `optax.lamb`, `optax.contrib.muon`, …, or a function of your own:
        `lambda learning_rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate))`.
      base_batch_size: examples of the first step: the batch for which the learning rate and the schedules
        were chosen.
      max_batch_size: largest batch size.
      micro_batch_size: examples per device behind each gradient, a half of `base_batch_size` at most. None:
        every call tells `num_examples=`, as `adaptive_multi_steps` has it.
      criterion: what lets the batch grow; None: `norm_test(2.0)`.
      scaling: how the learning rate follows the batch; None: by the kind of the optimizer. `lambda b, b0:
        1.0` leaves the rate alone.
      axis_name: device axis, or axes, under `pmap` or `shard_map`; see `adaptive_multi_steps`.
      **hyperparameters: of `optimizer_factory`, `learning_rate` among them; those that are schedules are
        read by examples (see `by_examples`).

    Returns:
      A `GradientTransformationExtraArgs`, to be used as `adaptive_multi_steps` says: `update(grads, state,
      params, value=loss)`. `metrics` shows the learning rate. Under `optax.inject_hyperparams` every
      argument belongs to static_args.

    Raises:
      ValueError: an argument out of range; no `learning_rate`; an optimizer that cannot be tried, without
        `scaling`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import adabatch_jax as adabatch
      >>> schedule = optax.cosine_decay_schedule(0.1, decay_steps=50)  # steps of 64 examples
      >>> optimizer = grow_batch_size(optax.adamw, learning_rate=schedule,
      ...                             base_batch_size=64, max_batch_size=1024, micro_batch_size=16)
      >>> @jax.jit
      ... def step(params, state, key):
      ...     grads = params - 1.0 + jax.random.normal(key, (2,))
      ...     updates, state = optimizer.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> params = jnp.zeros(2)
      >>> state = optimizer.init(params)
      >>> for key in jax.random.split(jax.random.key(0), 200):  # 3,200 examples
      ...     params, state = step(params, state, key)
      >>> shown = adabatch.metrics(state)
      >>> shown["num_examples"] <= 3200, bool(shown["optimizer_steps"] < 50)
      (True, True)

    Source: the parts are AdAdaGrad (arXiv 2402.11215) and the scaling rules of Granziol et al. (arXiv
    2006.09092); how they are coupled is ours.
    """
    _validate.function(_WHERE, optimizer_factory=optimizer_factory)
    hyperparameters = _validate.keywords("hyperparameters", hyperparameters)
    given = Hyperparameters(_WHERE, optimizer_factory, (), hyperparameters)
    given.check_learning_rate()
    if scaling is not None:
        _validate.function(_WHERE, scaling=scaling)
    test = norm_test(ETA) if criterion is None else criterion
    controller = adapt_batch_size(
        test,
        initial_batch_size=base_batch_size,
        max_batch_size=max_batch_size,
        ema_decay=0.9,
        debias=isinstance(test, Criterion),  # a plain function has nothing to take noise out of
        growth_limit=1.1,
    )

    @of_structure
    def scaling_for(params: PyTree) -> ScalingRule:
        if scaling is not None:
            return scaling
        direction = optax.chain(given.optimizer_at_first(1.0), optax.scale(-1.0))
        return probe_direction(direction, _WHERE, _REMEDY, params).scaling

    optimizer = scheduled_by_examples(given, base_batch_size, scaling_for)
    return adaptive_multi_steps(
        optax.chain(controller, optimizer),
        micro_batch_size=micro_batch_size,
        axis_name=axis_name,
        coordinate_wise=getattr(test, "coordinate_wise", False),
    )
