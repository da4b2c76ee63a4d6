"""Learning-rate schedules over examples: steps change size while the batch grows, examples do not."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._clock import advance, as_float, zero_clock
from adabatch_jax._tree import scale
from adabatch_jax._types import PyTree, Schedule
from adabatch_jax.learning_rate._examples import examples_behind
from adabatch_jax.noise import GradientNoise


class ScaleByExampleScheduleState(NamedTuple):
    """State of `scale_by_example_schedule`."""

    scheduled_learning_rate: jax.Array  # float32: the rate last applied
    schedule_clock: jax.Array  # uint32 [2]: examples used so far

    def after_dropped_step(
        self, after: ScaleByExampleScheduleState, used_up: bool
    ) -> ScaleByExampleScheduleState:
        """This state, with the clock of the one after a dropped step whose examples are used up."""
        return self._replace(schedule_clock=after.schedule_clock) if used_up else self

    def report_metrics(self) -> dict[str, Any]:
        """The numbers that `adabatch.metrics` shows."""
        return {"learning_rate": self.scheduled_learning_rate}


def scale_by_example_schedule(
    schedule: float | Schedule, *, flip_sign: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by −schedule(examples processed before this step).

    Any Optax schedule will do, with examples where it says steps:
    `optax.cosine_decay_schedule(0.01, decay_steps=num_epochs * dataset_size)`.

    Args:
      schedule: a function of the number of examples (float32 scalar; exact to 2²⁴, to 6e-8 relative
        beyond), or a constant learning rate.
      flip_sign: multiply by minus the learning rate, as `optax.scale_by_learning_rate` does.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` reads the examples of each step from
      `noise=` (`noise.num_examples`) or `num_examples=`. Under `optax.inject_hyperparams` a callable
      `schedule` belongs to static_args.

    Raises:
      ValueError: a constant that is negative or not finite; at trace time, neither `noise=` nor
        `num_examples=`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> link = scale_by_example_schedule(optax.linear_schedule(1.0, 0.0, 1000))
      >>> state = link.init(jnp.ones(1))
      >>> first, state = link.update(jnp.ones(1), state, num_examples=500)
      >>> second, state = link.update(jnp.ones(1), state, num_examples=500)
      >>> first.tolist(), second.tolist()
      ([-1.0], [-0.5])

    Source: Lau, Liu, Kolar (2024), arXiv 2402.11215, experiments: schedules and budgets in examples.
    """
    where = "scale_by_example_schedule"
    if not callable(schedule):
        _validate.between(where, 0.0, float("inf"), schedule=schedule)
    sign = -1.0 if flip_sign else 1.0

    def rate_at(clock: jax.Array) -> jax.Array:
        rate = schedule(as_float(clock)) if callable(schedule) else schedule
        return jnp.asarray(rate).astype(jnp.float32)

    def init(params: PyTree) -> ScaleByExampleScheduleState:
        del params
        clock = zero_clock()
        return ScaleByExampleScheduleState(rate_at(clock), clock)

    def update(
        updates: PyTree,
        state: ScaleByExampleScheduleState,
        params: PyTree | None = None,
        *,
        noise: GradientNoise | None = None,
        num_examples: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByExampleScheduleState]:
        del params, extra_args
        examples = examples_behind(f"{where} counts examples", noise, "num_examples", num_examples)
        rate = rate_at(state.schedule_clock)
        return scale(updates, sign * rate), ScaleByExampleScheduleState(
            rate, advance(state.schedule_clock, examples)
        )

    return optax.GradientTransformationExtraArgs(init, update)
