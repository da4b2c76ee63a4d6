"""`by_examples`: any optimizer of Optax, with its schedules read by examples instead of steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import optax

from adabatch_jax import _validate
from adabatch_jax._types import ArrayLike, ScalingRule
from adabatch_jax.learning_rate._scheduled import Hyperparameters, scheduled_by_examples


def by_examples(
    optimizer_factory: Callable[..., optax.GradientTransformation],
    *,
    base_batch_size: ArrayLike,
    scaling: ScalingRule | None = None,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The same optimizer, with every schedule read at (examples so far) / `base_batch_size`.

    A schedule of Optax counts optimizer steps. While the batch grows fewer steps are made of the same
    examples, and such a schedule never comes to its end. Read by examples a schedule that was written for
    steps of `base_batch_size` examples ends with the data, however many steps were made; with a batch
    that stays at `base_batch_size` nothing changes.

        optimizer = optax.adamw(schedule, weight_decay=0.1)                                    # before
        optimizer = by_examples(optax.adamw, base_batch_size=64)(schedule, weight_decay=0.1)   # after

    With `scaling` the rate of a step is schedule(n / b₀) · scaling(b, b₀): n examples before the step, b in
    it, b₀ = `base_batch_size`.

    What counts as a schedule: an argument that is called with a number of steps and gives one
    floating-point number. Other callables, such as a mask, are handed on as they are, and a schedule with a
    state of its own (`adabatch.learning_rate.follow_batch_size`) goes its own way. The number of steps is a
    float32, and an int32, rounded down, for a schedule that takes nothing else (an indexed table).

    Args:
      optimizer_factory: `optax.adamw`, `optax.contrib.muon`, …, or any function that makes an optimizer of
        its arguments, such as `lambda learning_rate: optax.chain(optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate, mask=mask))`. Scheduled hyperparameters, and with `scaling` the learning
        rate, reach it as arrays, as from `optax.inject_hyperparams`.
      base_batch_size: examples of the steps that the schedules were written for, > 0.
      scaling: how the learning rate follows the batch: `sqrt_scaling()`, `linear_scaling()`, …; None: it
        does not. Only the argument `learning_rate` is scaled.

    Returns:
      A function of the factory's arguments. It returns a `GradientTransformationExtraArgs` whose `update`
      reads the examples of each step from `noise=` (as `adaptive_multi_steps` passes it) or
      `num_examples=`. Its state is that of `optax.inject_hyperparams`, so that
      `opt_state.hyperparams["learning_rate"]` is the rate last applied.

    Raises:
      ValueError: `base_batch_size` is not positive; a function is not callable; `scaling` without a
        `learning_rate` to scale; a `learning_rate` that is callable and no schedule; at trace time, neither
        `noise=` nor `num_examples=`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> schedule = optax.linear_schedule(1.0, 0.0, transition_steps=10)  # ten steps of 64
      >>> optimizer = by_examples(optax.sgd, base_batch_size=64)(schedule)
      >>> state = optimizer.init(jnp.ones(1))
      >>> rates = []
      >>> for examples in (64, 256, 320):
      ...     _, state = optimizer.update(jnp.ones(1), state, num_examples=examples)
      ...     rates.append(round(float(state.hyperparams["learning_rate"]), 2))
      >>> rates
      [1.0, 0.9, 0.5]

    Source: Lau, Liu, Kolar (2024), arXiv 2402.11215, experiments: schedules and budgets in examples.
    """
    where = "by_examples"
    _validate.positive(where, base_batch_size=base_batch_size)
    _validate.function(where, optimizer_factory=optimizer_factory)
    if scaling is not None:
        _validate.function(where, scaling=scaling)

    @functools.wraps(optimizer_factory)
    def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        hyperparameters = Hyperparameters(where, optimizer_factory, args, kwargs)
        if scaling is not None:
            hyperparameters.check_learning_rate()
        return scheduled_by_examples(hyperparameters, base_batch_size, lambda _: scaling)

    return make
