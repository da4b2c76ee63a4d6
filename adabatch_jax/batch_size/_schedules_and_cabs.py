"""Other policies for the batch size: coupled to the learning rate, or fixed in advance."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._types import Schedule
from adabatch_jax.batch_size._criterion import Criterion, Evidence
from adabatch_jax.noise import GradientNoise


def cabs(learning_rate: float | Schedule, *, lowest_loss: float = 0.0) -> Criterion:
    """CABS: the batch size follows the learning rate, b = α · tr Σ / (L − L*).

    A step of SGD gains most per example at this size, if 1/α is the curvature and the gradient's square
    about (L − L*)/α; neither is measured. The size falls with a learning rate that falls and rises
    as the loss goes down. It is meant for plain SGD: behind another direction α is not the length
    of the step, so give a rate that is, or take a criterion without one.

    `update` must be given `value=`, the mean loss L. The source averages tr Σ and L and lets the batch
    shrink: `adapt_batch_size(cabs(0.1), ..., ema_decay=0.95, monotone=False)`. A rate that warms up from 0
    asks for no examples at first: the batch then falls to `min_batch_size`, or to two groups, and rises
    with the rate.

    Args:
      learning_rate: α > 0, or a schedule over **examples processed**, as the optimizer has it.
      lowest_loss: L*, a bound below which the loss cannot fall; in the units of `value`.

    Returns:
      A criterion: `GradientNoise` and `value` → required batch size in examples, float32 scalar; +inf
      where the loss does not exceed `lowest_loss`.

    Raises:
      ValueError: `learning_rate` is neither a positive number nor callable, or `lowest_loss` is not a
        number; at trace time, an update without `value=`.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import GradientNoise
      >>> noise = GradientNoise(jnp.array([3.0, 4.0]), scatter=jnp.array(7000.0),
      ...                       num_examples=jnp.array(16), num_groups=jnp.array(8))
      >>> float(cabs(0.125)(noise, value=2.0))  # 0.125 · 1000 / 2
      62.5

    Source: Balles, Romero, Hennig (2017), arXiv 1612.05086, sections 3 and 4; the bound L* is ours,
    theirs is 0.
    """
    where = "cabs"
    if not callable(learning_rate):
        _validate.positive(where, learning_rate=learning_rate)
    _validate.between(where, -float("inf"), float("inf"), lowest_loss=lowest_loss)

    def evidence(noise: GradientNoise, value: Any, examples_seen: Any = None) -> Evidence:
        rate = learning_rate(examples_seen) if callable(learning_rate) else learning_rate
        left = jnp.asarray(value).astype(jnp.float32) - lowest_loss
        return Evidence(rate * noise.trace, left, jnp.zeros((), jnp.float32))  # L is not biased

    reads = ("value", "examples_seen") if callable(learning_rate) else ("value",)
    return Criterion(where, evidence, reads=reads)


def batch_size_schedule(schedule: Schedule) -> Criterion:
    """A batch size fixed in advance: b = schedule(examples processed).

    A ramp is `optax.linear_schedule(64, 4096, 100_000)`, stairs are
    `optax.piecewise_constant_schedule(64, {60_000: 4, 120_000: 4})`, with `initial_batch_size=64`. Other
    options of `adapt_batch_size` hold: sizes are rounded up to `multiple_of`, and one that falls needs
    `monotone=False`. Leave `ema_decay` out, which would delay it. The noise is not looked at:
    `needs_noise` says False, and one group, a zero or a NaN gradient do not stop the ramp.

    Args:
      schedule: examples processed before the next step (float32 scalar) → its batch size in examples.

    Returns:
      A criterion for `adapt_batch_size`; called by itself, `criterion(noise, examples_seen=…)`.

    Raises:
      ValueError: `schedule` is not callable.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from adabatch_jax import GradientNoise, adapt_batch_size, get_batch_size
      >>> ramp = batch_size_schedule(optax.linear_schedule(16, 64, 32))
      >>> link = adapt_batch_size(ramp, initial_batch_size=16, max_batch_size=64)
      >>> grad = jnp.ones(2)
      >>> noise = GradientNoise(grad, jnp.array(jnp.nan), jnp.array(16), jnp.array(1))
      >>> _, state = link.update(grad, link.init(grad), noise=noise)
      >>> int(get_batch_size(state))  # half-way from 16 to 64
      40

    Source: the ramps of Megatron-LM (linear) and Levanter (stairs), over examples; the form is ours.
    """
    where = "batch_size_schedule"
    _validate.function(where, schedule=schedule)

    def evidence(noise: GradientNoise, examples_seen: Any) -> Evidence:
        del noise
        size = jnp.asarray(schedule(examples_seen)).astype(jnp.float32)
        return Evidence(size, jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32))

    return Criterion(where, evidence, reads=("examples_seen",), uses_noise=False)
