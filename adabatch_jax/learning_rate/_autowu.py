"""`scale_by_autowu`: warm up until the loss has passed its minimum, go back to the rate there, decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._axes import axis_tuple, checked_axes, to_varying
from adabatch_jax._loss import loss_of_call
from adabatch_jax._tree import scale
from adabatch_jax._types import AxisName, PyTree
from adabatch_jax.learning_rate._autowu_plan import Plan, read_clock
from adabatch_jax.learning_rate._autowu_state import ScaleByAutowuState, first_state
from adabatch_jax.learning_rate._autowu_step import (
    moment_of,
    with_direction,
    with_end,
    with_loss,
    with_rate,
    with_test,
    with_time,
)
from adabatch_jax.learning_rate._examples import examples_behind
from adabatch_jax.learning_rate._peak import Peak, PeakLike
from adabatch_jax.learning_rate._posterior_test import Smoother
from adabatch_jax.learning_rate._quasisep import quasisep_smoother
from adabatch_jax.learning_rate._rbf import rbf_smoother
from adabatch_jax.noise import GradientNoise

SMOOTHERS: dict[str, Callable[[], Smoother]] = {"rbf": rbf_smoother, "quasisep": quasisep_smoother}


def scale_by_autowu(
    *,
    total_steps: int | None = None,
    steps_per_test: int | None = None,
    total_examples: int | None = None,
    examples_per_test: int | None = None,
    min_learning_rate: Any = 1e-5,
    max_learning_rate: Any = 1.0,
    max_warmup_fraction: float = 0.5,
    patience: int = 3,
    confidence: Any = 0.95,
    warmup: str = "exponential",
    warmup_unit: str = "step",
    decay: str = "cosine",
    cooldown_fraction: float | None = None,
    max_losses: int = 4096,
    smoother: str | Smoother = "rbf",
    peak: PeakLike = None,
    watch_divergence: bool = False,
    initial_batch_size: int | None = None,
    axis_name: AxisName = None,
    flip_sign: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """AutoWU: multiplies updates by −(a learning rate that finds its own peak).

    1. Warm-up: α(t) = α_min (α_max/α_min)^(t/W), W = ⌊max_warmup_fraction · total⌋.
    2. Test, once every `steps_per_test`: a Gaussian process smooths all losses so far; with X its
       posterior on a grid and X_k the present, p = max_{i<k} P(Xᵢ < X_k). A draw votes yes if p >
       `confidence`; `patience` tests in a row with a majority of yes end the warm-up.
    3. Switch: α* = mean over the draws of α_min (α/α_min)^x*, with x* ∈ [0, 1] where the smoothed loss
       is lowest and α the last rate. Without a switch the rate reached at W is kept.
    4. Decay: α* · ½ (1 + cos πs) over what is left of the run; see `decay`, `cooldown_fraction`.

    The defaults are the paper's. `scale_by_improved_autowu` has what we found to work better.

    `update` reads `value=` (or `loss=`), the loss of this step's batch: the rate of step t depends on
    the losses of the steps before it alone. With the examples clock it also reads the examples of the
    step from `noise=` (`noise.num_examples`) or `num_examples=`. `emit=False` (`adaptive_multi_steps`
    passes it) keeps the test, the only expensive part, out of a call whose result will be dropped. Losses
    that are not finite are left out and counted. Losses are followed in float32. When the total is used
    up the rate is 0, and stays 0 however long training goes on.

    `metrics` shows:

    * `learning_rate`, `phase` (`AutowuPhase`), `warmup_end` (`WarmupEnd`: why the warm-up ended).
    * `peak_learning_rate`, 0 before it is known; `minimum_found`: it is the rate of a minimum. False while
      the warm-up runs, and where it ended at its limit.
    * `minimum_probability` and `minimum_location`, means over the draws of the last test, 0 before the
      first; the location in [0, 1] of the losses so far. `tests_made`, `failed_draws`.
    * `nonfinite_losses`; `exploded_losses` and `setbacks`, see `watch_divergence`.

    `smoothed_losses` shows the curve.

    Args:
      total_steps: optimizer steps of the run.
      steps_per_test: steps from test to test; the paper's is one epoch.
      total_examples: examples of the run, for the examples clock: use it where the batch grows. Then
        W is rounded down to a multiple of the first batch, and with a constant batch both clocks
        give the same schedule. Exactly one of the two pairs must be given.
      examples_per_test: examples from test to test.
      min_learning_rate: α_min > 0, the rate of the first step.
      max_learning_rate: α_max > α_min; never quite reached.
      max_warmup_fraction: of the run, in [0, 1]; 0: no warm-up, start from α_max.
      patience: yes in a row until the switch.
      confidence: in (0, 1).
      warmup: "exponential", or "linear": α_min + (α_max − α_min) t/W.
      warmup_unit: "step", or "epoch": the rate moves once per test interval, and W counts those.
      decay: "cosine", or "half_cosine", ½ + ½ cos(½π (1 + s)), which drops to one half at once.
      cooldown_fraction: None: decay at once. f in [0, 1]: hold the rate until the last f of the run;
        a warm-up that lasts until there ends there.
      max_losses: size of the buffer with the examples clock. When it is full, neighbours are averaged
        in pairs. The steps clock keeps every loss of the warm-up.
      smoother: "rbf", the paper's, on random subsets of the losses; "quasisep", on all of them; or a
        `Smoother`, such as `rbf_smoother(seed=1)`.
      peak: `Peak`, which rate to turn back to and how to go on from it; or a dict of those of its
        fields that differ from the default.
      watch_divergence: watch for losses that are not finite, or far above the others.

        * One such loss is left out, and `exploded_losses` counts it if it is finite.
        * The second in a row ends the warm-up at once, at the rate of the minimum. So does an average loss
          that rises further above its start than it had fallen below it.
        * After the warm-up, the rate is halved whenever the average gives back a quarter of what the
          loss has won since, six times at most. `setbacks` counts; at 6 a lower rate did not help.

        The average has a decay of 0.7. Every bound has a margin of 4 standard deviations of a loss, as
        they are now.
      initial_batch_size: examples of the first step. With it, the examples clock refuses a run whose
        warm-up has fewer than ten steps, as the steps clock does.
      axis_name: device axis, or axes, over which to average `value`. Not needed where the loss is
        that of all devices already, as from `value_and_grad_noise`.
      flip_sign: multiply by minus the rate, as `optax.scale_by_learning_rate` does.

    Returns:
      A `GradientTransformationExtraArgs`. Under `optax.inject_hyperparams`, min_learning_rate,
      max_learning_rate and confidence may be injected; every other argument belongs to static_args. The
      example of `Peak` shows how to inject a number of it.

    Raises:
      ValueError: an argument out of range; not exactly one clock; a run too short for one test, or with
        fewer than ten steps of warm-up; at trace time, a missing `value=`, or one that is no scalar, a
        missing number of examples, or missing `params`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(optax.scale_by_adam(),
      ...                         scale_by_autowu(total_steps=100, steps_per_test=10))
      >>> params = jnp.array([1.0])
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params, value=jnp.array(0.5))
      >>> round(float(updates[0]), 7)
      -1e-05

    Source: Kim, Kim, Kim, Lee, Kim (2021), arXiv 2107.05855; the examples clock, "quasisep" and the
    watch for divergence are ours.
    """
    plan = Plan(
        *read_clock(total_steps, steps_per_test, total_examples, examples_per_test),
        min_learning_rate=min_learning_rate,
        max_learning_rate=max_learning_rate,
        max_warmup_fraction=max_warmup_fraction,
        patience=patience,
        confidence=confidence,
        warmup=warmup,
        warmup_unit=warmup_unit,
        decay=decay,
        cooldown_fraction=cooldown_fraction,
        max_losses=max_losses,
        smoother=_smoother(smoother),
        peak=Peak().changed("scale_by_autowu", peak),
        watch_divergence=watch_divergence,
    )
    plan.check(initial_batch_size)
    axes, sign = axis_tuple(axis_name), -1.0 if flip_sign else 1.0

    def init(params: PyTree) -> ScaleByAutowuState:
        del params
        return first_state(plan)

    def update(
        updates: PyTree,
        state: ScaleByAutowuState,
        params: PyTree | None = None,
        *,
        value: Any = None,
        noise: GradientNoise | None = None,
        num_examples: Any = None,
        emit: Any = True,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByAutowuState]:
        loss = _loss(loss_of_call(value, extra_args))
        if plan.peak.max_relative_step is not None and params is None:
            raise ValueError(
                "scale_by_autowu with max_relative_step compares steps with parameters: call "
                "optimizer.update(gradient, state, params, value=loss)"
            )
        if axes:
            loss = jax.lax.pmean(to_varying(loss, checked_axes(axes)), axes)
        moment = moment_of(plan, state, _increment(plan, noise, num_examples))
        state = with_direction(plan, state, moment, updates, params)
        state = with_rate(plan, state, moment)
        state, diverged = with_loss(state, moment, loss)
        state, interval_over = with_time(plan, state, moment)
        complete = jnp.asarray(emit).astype(bool)
        state = with_test(plan, state, moment, interval_over, diverged, complete)
        state = with_end(plan, state, moment)
        return scale(updates, sign * state.autowu_learning_rate), state

    return optax.GradientTransformationExtraArgs(init, update)


def _smoother(smoother: str | Smoother) -> Smoother:
    if isinstance(smoother, Smoother):
        return smoother
    _validate.one_of("scale_by_autowu", tuple(SMOOTHERS), smoother=smoother)
    return SMOOTHERS[smoother]()


def _loss(value: Any) -> jax.Array:
    if value is None:
        raise ValueError(
            "scale_by_autowu needs the loss: call optimizer.update(gradient, state, params, value=loss)"
        )
    loss = jnp.asarray(value).astype(jnp.float32)
    if loss.ndim:
        raise ValueError(
            f"scale_by_autowu: value= must be one loss, a scalar, got shape {loss.shape}"
        )
    return loss


def _increment(plan: Plan, noise: GradientNoise | None, num_examples: Any) -> jax.Array:
    if plan.by_steps:
        return jnp.ones((), jnp.int32)
    what = "scale_by_autowu counts examples"
    examples = examples_behind(what, noise, "num_examples", num_examples)
    return jnp.asarray(examples).astype(jnp.int32)
