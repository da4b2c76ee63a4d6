"""`scale_by_autowu`: warm up until the loss has passed its minimum, go back to the rate there, decay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._axes import axis_tuple, checked_axes, to_varying
from adabatch_jax._clock import zero_clock
from adabatch_jax._loss import loss_of_call
from adabatch_jax._tree import scale
from adabatch_jax._types import AxisName, PyTree
from adabatch_jax.learning_rate._autowu_plan import Plan, read_clock
from adabatch_jax.learning_rate._autowu_state import (
    AutowuPhase,
    ScaleByAutowuState,
    WarmupEnd,
    WarmupMemory,
    WarmupRecord,
)
from adabatch_jax.learning_rate._autowu_step import (
    Statics,
    moment_of,
    with_direction,
    with_end,
    with_loss,
    with_rate,
    with_test,
    with_time,
)
from adabatch_jax.learning_rate._divergence import no_level
from adabatch_jax.learning_rate._examples import examples_behind
from adabatch_jax.learning_rate._loss_history import empty_history
from adabatch_jax.learning_rate._quasisep import quasisep_smoother
from adabatch_jax.learning_rate._rbf import rbf_smoother
from adabatch_jax.learning_rate._step_length import no_length
from adabatch_jax.noise import GradientNoise

SMOOTHERS = {"rbf": rbf_smoother, "quasisep": quasisep_smoother}


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
    hold_factor: Any = 1.0,
    max_losses: int = 4096,
    smoother: str = "rbf",
    peak_at: str = "minimum",
    peak_factor: Any = 1.0,
    max_relative_step: Any = None,
    ramp_fraction: float = 0.0,
    at_limit: str = "last",
    watch_divergence: bool = False,
    warmup_over: bool = False,
    seed: int = 0,
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

    `metrics` shows `learning_rate`, `phase` (`AutowuPhase`), `warmup_end` (`WarmupEnd`: why),
    `minimum_found` (bool: the peak is the rate of a minimum; false while the warm-up runs, and where it
    ended at its limit), `peak_learning_rate` (0 before it is known), of the last test
    `minimum_probability` and `minimum_location` (means over its draws; location in [0, 1] of the losses
    so far; 0 before the first), `tests_made`, `failed_draws`, `nonfinite_losses`, `exploded_losses` (left
    out by `watch_divergence`) and `setbacks`; `smoothed_losses` shows the curve.

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
      hold_factor: factor on the rate per test interval while it is held; in (0, 1].
      max_losses: size of the buffer with the examples clock. When it is full, neighbours are averaged
        in pairs. The steps clock keeps every loss of the warm-up.
      smoother: "rbf", the paper's (random subsets of the losses), or "quasisep" (all of them; see
        the guide of `adabatch_jax.learning_rate`). "rbf" has the paper's absolute constants, for losses of
        order one: multiply by a constant what is much smaller or larger. "quasisep" decides alike in all
        units.
      peak_at: the rate to turn back to: that of the "minimum"; or the "earliest" whose smoothed loss is
        within two posterior standard deviations of the minimum, since in a flat valley the lowest point
        is a matter of chance, its brink is not; or "confirmed", the lower of those that the last two
        tests found.
      peak_factor: > 0; on that rate when the warm-up turns back to it, up to the last rate of the
        warm-up.
      max_relative_step: bound on the peak, so that a step as long as those at the beginning would change
        the parameters by at most this part of their length: α* ≤ max_relative_step / max ‖d‖/‖w‖, over
        the first 24 directions d and the parameters w with at least two axes, taken as no shorter than
        half of √(outputs); None, or parameters that begin at zero: no bound. A deep network may bear a
        rate for long without a rise of its loss, and learn little with it. Without a warm-up each of
        these arrays is a bound by itself, and the rate rises over those 24 steps: a rate without search.
        `update` then needs `params`.
      ramp_fraction: ≥ 0; after the warm-up the rate rises linearly from a third of the peak to all of
        it, over this fraction of the time that the warm-up took; 0: it starts from the peak.
      at_limit: what to do at W without a switch: keep the "last" rate, or go back to the rate at the
        "minimum" of the smoothed losses even so.
      watch_divergence: leave out one loss that is not finite or far above the others. At the second in
        a row, or when the average loss rises further above its start than it had fallen below, end the
        warm-up at once, at the rate of the minimum. After the warm-up, halve the rate whenever the average
        gives back a quarter of what the loss has won since, six times at most: `setbacks` says how
        often, and at 6 that a lower rate did not help. (Average: decay 0.7; both with a margin of 4
        standard deviations of a loss, as they are now.)
      warmup_over: leave the test out of the program, which then compiles in a quarter of the time. For
        a program that only sees states whose warm-up has ended: state and numbers are the same. A
        warm-up that still runs would go on to W untested.
      seed: of the random subsets; the key is kept in the state.
      initial_batch_size: examples of the first step, if the examples clock is to refuse a run whose
        warm-up has fewer than ten steps, as the steps clock does.
      axis_name: device axis, or axes, over which to average `value`. Not needed where the loss is
        that of all devices already, as from `value_and_grad_noise`.
      flip_sign: multiply by minus the rate, as `optax.scale_by_learning_rate` does.

    Returns:
      A `GradientTransformationExtraArgs`. Under `optax.inject_hyperparams`, min_learning_rate,
      max_learning_rate, confidence, hold_factor, peak_factor and max_relative_step may be injected; every
      other argument belongs to static_args.

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
        hold_factor=hold_factor,
        peak_at=peak_at,
        peak_factor=peak_factor,
        max_relative_step=max_relative_step,
        ramp_fraction=ramp_fraction,
        at_limit=at_limit,
    )
    plan.check(max_losses, initial_batch_size)
    _validate.one_of("scale_by_autowu", tuple(SMOOTHERS), smoother=smoother)
    statics = Statics(plan, SMOOTHERS[smoother](), warmup_over)
    axes, sign = axis_tuple(axis_name), -1.0 if flip_sign else 1.0

    def init(params: PyTree) -> ScaleByAutowuState:
        del params
        starts = max_warmup_fraction > 0
        end = WarmupEnd.RUNNING if starts else WarmupEnd.NO_WARMUP

        def number(value: Any) -> jax.Array:
            return jnp.array(value).astype(jnp.float32)

        def count(value: int = 0) -> jax.Array:
            return jnp.array(value, jnp.int32)

        return ScaleByAutowuState(
            autowu_learning_rate=number(min_learning_rate if starts else max_learning_rate),
            autowu_phase=count(int(AutowuPhase.WARMUP)),
            warmup_end=count(int(end)),
            peak_learning_rate=number(0.0 if starts else max_learning_rate),
            peak_position=number(0.0),
            autowu_clock=zero_clock(),
            first_increment=count(),
            since_test=jnp.zeros((), jnp.uint32),
            loss_history=empty_history(plan.limit + 1 if plan.by_steps else max_losses),
            loss_level=no_level() if watch_divergence else (),
            step_length=() if max_relative_step is None else no_length(),
            warmup_memory=WarmupMemory(
                smoother_state=statics.smoother.init(),
                draw_key=jax.random.PRNGKey(seed),
                yes_in_a_row=count(),
            ),
            last_warmup_test=WarmupRecord(
                minimum_probability=number(0.0),
                minimum_location=number(0.0),
                tests_made=count(),
                failed_draws=count(),
            ),
            nonfinite_losses=count(),
            exploded_losses=count(),
            setbacks=count(),
        )

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
        value = loss_of_call(value, extra_args)
        if value is None:
            raise ValueError(
                "scale_by_autowu needs the loss: call optimizer.update(gradient, state, params, "
                "value=loss)"
            )
        if max_relative_step is not None and params is None:
            raise ValueError(
                "scale_by_autowu with max_relative_step compares steps with parameters: call "
                "optimizer.update(gradient, state, params, value=loss)"
            )
        loss = jnp.asarray(value).astype(jnp.float32)
        if loss.ndim:
            raise ValueError(
                f"scale_by_autowu: value= must be one loss, a scalar, got shape {loss.shape}"
            )
        if axes:
            loss = jax.lax.pmean(to_varying(loss, checked_axes(axes)), axes)
        moment = moment_of(plan, state, _increment(plan, noise, num_examples))
        state = with_direction(statics, state, moment, updates, params)
        state = with_rate(statics, state, moment)
        state, diverged = with_loss(state, moment, loss)
        state, interval_over = with_time(plan, state, moment)
        complete = jnp.asarray(emit).astype(bool)
        state = with_test(statics, state, moment, interval_over, diverged, complete)
        state = with_end(plan, state, moment)
        return scale(updates, sign * state.autowu_learning_rate), state

    return optax.GradientTransformationExtraArgs(init, update)


def _increment(plan: Plan, noise: GradientNoise | None, num_examples: Any) -> jax.Array:
    if plan.by_steps:
        return jnp.ones((), jnp.int32)
    what = "scale_by_autowu counts examples"
    examples = examples_behind(what, noise, "num_examples", num_examples)
    return jnp.asarray(examples).astype(jnp.int32)
