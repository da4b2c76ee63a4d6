"""`scale_by_autowu`: warm up until the loss has passed its minimum, go back to the rate there, decay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adabatch_jax import _validate
from adabatch_jax.learning_rate._autowu_state import AutowuPhase, ScaleByAutowuState, WarmupEnd
from adabatch_jax.learning_rate._divergence import LossLevel, follow, no_level
from adabatch_jax.learning_rate._loss_history import empty_history, record
from adabatch_jax.learning_rate._minimum import Smoother
from adabatch_jax.learning_rate._quasisep import quasisep_smoother
from adabatch_jax.learning_rate._rate_curve import DECAYS, WARMUPS, Decay, interpolate
from adabatch_jax.learning_rate._rbf import rbf_smoother
from adabatch_jax.noise import GradientNoise
from adabatch_jax.noise._axes import AxisName, axis_tuple, checked_axes, to_varying
from adabatch_jax.noise._clock import advance, as_float, zero_clock

PyTree = Any
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
    divergence_factor: Any = None,
    seed: int = 0,
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

    `update` reads `value=`, the loss of this step's batch: the rate of step t depends on the losses
    of the steps before it alone. With the examples clock it also reads the examples of the step from
    `noise=` (`noise.num_examples`) or `num_examples=`. `emit=False` (`adaptive_multi_steps` passes
    it) keeps the test, the only expensive part, out of a call whose result will be dropped. Losses
    that are not finite are left out and counted. The test costs about 20 ms on two CPU cores.

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
        the guide of `adabatch_jax.learning_rate`).
      divergence_factor: None: do not watch for divergence. Otherwise a loss that is not finite, or
        whose average rises above first + factor · (first − lowest) + 4 standard deviations, ends the
        warm-up at once at the rate of the minimum.
      seed: of the random subsets; the key is kept in the state.
      axis_name: device axis, or axes, over which to average `value`. Not needed where the loss is
        that of all devices already, as from `value_and_grad_noise`.
      flip_sign: multiply by minus the rate, as `optax.scale_by_learning_rate` does.

    Returns:
      A `GradientTransformationExtraArgs`. Under `optax.inject_hyperparams`, min_learning_rate,
      max_learning_rate, confidence, hold_factor and divergence_factor may be injected; every other
      argument belongs to static_args.

    Raises:
      ValueError: an argument out of range; not exactly one clock; a run too short for one test; at
        trace time, a missing `value=`, or a missing number of examples.

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
    where = "scale_by_autowu"
    by_steps, total, interval = _clock(
        total_steps, steps_per_test, total_examples, examples_per_test
    )
    _validate.positive(
        where, min_learning_rate=min_learning_rate, max_learning_rate=max_learning_rate
    )
    _check_order(min_learning_rate, max_learning_rate)
    fractions = dict(max_warmup_fraction=max_warmup_fraction)
    if cooldown_fraction is not None:
        fractions["cooldown_fraction"] = cooldown_fraction
    _validate.between(where, 0.0, 1.0, closed=True, **fractions)
    _validate.positive_int(where, patience=patience, max_losses=max_losses)
    if max_losses < 16:
        raise ValueError(f"{where}: max_losses must be at least 16, got {max_losses!r}")
    _validate.positive(where, confidence=confidence, hold_factor=hold_factor)
    _validate.between(where, 0.0, 1.0, confidence=confidence)
    _validate.between(where, 0.0, 1.0, closed=True, hold_factor=hold_factor)
    _validate.one_of(where, WARMUPS, warmup=warmup)
    _validate.one_of(where, ("step", "epoch"), warmup_unit=warmup_unit)
    _validate.one_of(where, DECAYS, decay=decay)
    _validate.one_of(where, tuple(SMOOTHERS), smoother=smoother)
    if divergence_factor is not None:
        _validate.between(where, 0.0, float("inf"), divergence_factor=divergence_factor)
    limit = int(max_warmup_fraction * total)
    if warmup_unit == "epoch":
        limit = int(max_warmup_fraction * (total / interval)) * interval
    if max_warmup_fraction > 0 and limit <= interval:
        unit = "steps" if by_steps else "examples"
        raise ValueError(
            f"{where}: total_{unit}={total} with max_warmup_fraction={max_warmup_fraction} leaves a "
            f"warm-up of {limit} {unit}, too short for one test after {unit}_per_test={interval}"
        )
    gp: Smoother = SMOOTHERS[smoother]()
    curve = Decay(decay, float(total), cooldown_fraction, hold_factor, float(interval))
    axes, sign = axis_tuple(axis_name), -1.0 if flip_sign else 1.0
    watched = divergence_factor is not None

    def warmup_limit(first_increment: jax.Array) -> jax.Array:
        """W, in units of the clock; with the examples clock a whole number of first batches."""
        if by_steps or warmup_unit == "epoch":
            return jnp.float32(limit)
        unit = first_increment.astype(jnp.float32)
        return jnp.floor(jnp.float32(max_warmup_fraction * total) / unit) * unit

    def rising(position: jax.Array, top: jax.Array) -> jax.Array:
        if warmup_unit == "epoch":
            position = jnp.floor(position / interval) * interval
        part = position / jnp.maximum(top, 1.0)
        return interpolate(warmup, min_learning_rate, max_learning_rate, part)

    def init(params: PyTree) -> ScaleByAutowuState:
        del params
        started = max_warmup_fraction > 0
        end = WarmupEnd.RUNNING if started else WarmupEnd.NO_WARMUP
        first = min_learning_rate if started else max_learning_rate

        def scalar(value: Any, dtype: Any) -> jax.Array:
            return jnp.array(value).astype(dtype)  # a buffer of its own: states are donated

        return ScaleByAutowuState(
            autowu_learning_rate=scalar(first, jnp.float32),
            autowu_phase=jnp.array(int(AutowuPhase.WARMUP), jnp.int32),
            warmup_end=jnp.array(int(end), jnp.int32),
            peak_learning_rate=scalar(0.0 if started else max_learning_rate, jnp.float32),
            peak_position=jnp.zeros((), jnp.float32),
            autowu_clock=zero_clock(),
            first_increment=jnp.zeros((), jnp.int32),
            since_test=jnp.zeros((), jnp.uint32),
            loss_history=empty_history(limit + 1 if by_steps else max_losses),
            loss_level=no_level() if watched else (),
            smoother_state=gp.init(),
            draw_key=jax.random.PRNGKey(seed),
            yes_in_a_row=jnp.zeros((), jnp.int32),
            minimum_probability=jnp.zeros((), jnp.float32),
            minimum_location=jnp.zeros((), jnp.float32),
            tests_made=jnp.zeros((), jnp.int32),
            failed_draws=jnp.zeros((), jnp.int32),
            nonfinite_losses=jnp.zeros((), jnp.int32),
        )

    def test(state: ScaleByAutowuState, end: jax.Array, diverged: jax.Array) -> dict[str, Any]:
        """Smooth, vote, and the rate at the minimum: the branch that costs."""
        history, rate = state.loss_history, state.autowu_learning_rate
        key, draw_key = jax.random.split(state.draw_key)
        # Optax and tinygp mix dtypes and ranks freely; what a user demands of his code is his affair.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            x = (history.positions / end).astype(jnp.float32)
            fitted, draws = gp.test(
                state.smoother_state, x, history.losses, history.entries, draw_key
            )
        fitted = jax.tree.map(lambda a, b: a.astype(b.dtype), fitted, state.smoother_state)
        ok = jnp.isfinite(draws.probability) & jnp.isfinite(draws.location)
        good = jnp.sum(ok.astype(jnp.float32))

        def mean(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(ok, values, 0.0)) / jnp.maximum(good, 1.0)

        votes = jnp.sum((ok & (draws.probability > confidence)).astype(jnp.int32))
        yes = 2 * votes > ok.shape[0]
        streak = jnp.where(yes, state.yes_in_a_row + 1, 0).astype(jnp.int32)
        switch = streak >= patience
        peak = mean(interpolate(warmup, min_learning_rate, rate, draws.location))
        if watched:
            assert isinstance(state.loss_level, LossLevel)
            lowest = state.loss_level.lowest_position / end
            fallback = interpolate(warmup, min_learning_rate, rate, lowest)
            peak = jnp.where(good > 0, peak, fallback)
            switch |= diverged
        because = jnp.where(diverged, WarmupEnd.DIVERGED, WarmupEnd.MINIMUM_PASSED)
        return dict(
            smoother_state=fitted,
            draw_key=key,
            yes_in_a_row=streak,
            minimum_probability=mean(draws.probability),
            minimum_location=mean(draws.location),
            tests_made=state.tests_made + 1,
            failed_draws=state.failed_draws + jnp.sum((~ok).astype(jnp.int32)),
            peak_learning_rate=jnp.where(switch, peak, state.peak_learning_rate),
            warmup_end=jnp.where(switch, because, state.warmup_end).astype(jnp.int32),
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
        del params, extra_args
        if value is None:
            raise ValueError(
                "scale_by_autowu needs the loss: call optimizer.update(gradient, state, params, "
                "value=loss)"
            )
        loss = jnp.asarray(value).astype(jnp.float32)
        if axes:
            loss = jax.lax.pmean(to_varying(loss, checked_axes(axes)), axes)
        increment = _increment(by_steps, noise, num_examples)
        first = jnp.where(state.first_increment > 0, state.first_increment, increment)
        clock = advance(state.autowu_clock, increment)
        position, end = as_float(state.autowu_clock), as_float(clock)
        top = warmup_limit(jnp.maximum(first, 1))
        rises = state.warmup_end == WarmupEnd.RUNNING
        factor, held = curve.factor(position, end, state.peak_position)
        rate = jnp.where(rises, rising(position, top), state.peak_learning_rate * factor)
        phase = jnp.where(held, int(AutowuPhase.HOLD), int(AutowuPhase.DECAY))
        phase = jnp.where(rises, int(AutowuPhase.WARMUP), phase)

        finite = jnp.isfinite(loss)
        kept, diverged, level = loss, jnp.zeros((), bool), state.loss_level
        if watched:
            assert isinstance(level, LossLevel)
            followed, kept, diverged = follow(level, loss, position, divergence_factor)
            level = jax.tree.map(lambda a, b: jnp.where(rises, a, b), followed, level)
        since = state.since_test + jnp.maximum(increment, 0).astype(jnp.uint32)
        state = state._replace(
            autowu_learning_rate=rate.astype(jnp.float32),
            autowu_phase=phase.astype(jnp.int32),
            autowu_clock=clock,
            first_increment=first.astype(jnp.int32),
            since_test=since % np.uint32(interval),
            loss_history=record(state.loss_history, kept, position, finite & rises),
            loss_level=level,
            nonfinite_losses=state.nonfinite_losses + (~finite).astype(jnp.int32),
        )
        last = jnp.minimum(top, jnp.float32(curve.cooldown_start))
        # Nothing to smooth: no finite loss, or one alone.
        possible = rises & (end < last) & (state.loss_history.entries > 1)
        complete = jnp.asarray(emit).astype(bool)
        due = ((since >= np.uint32(interval)) | diverged) & possible & complete
        tested = {k: getattr(state, k) for k in _TESTED}
        tested = jax.lax.cond(due, test, lambda *_: tested, state, end, diverged)
        state = state._replace(**tested)

        ends = rises & (end >= last) & (state.warmup_end == WarmupEnd.RUNNING)
        reason = jnp.where(
            state.loss_history.entries > 0, int(WarmupEnd.AT_LIMIT), int(WarmupEnd.NO_FINITE_LOSS)
        )
        over = state.warmup_end != WarmupEnd.RUNNING
        state = state._replace(
            warmup_end=jnp.where(ends, reason, state.warmup_end).astype(jnp.int32),
            peak_learning_rate=jnp.where(ends, rate, state.peak_learning_rate).astype(jnp.float32),
            peak_position=jnp.where(rises & (over | ends), end, state.peak_position),
        )
        scaled = jax.tree.map(lambda u: u * (sign * rate).astype(u.dtype), updates)
        return scaled, state

    return optax.GradientTransformationExtraArgs(init, update)


_TESTED = (
    "smoother_state",
    "draw_key",
    "yes_in_a_row",
    "minimum_probability",
    "minimum_location",
    "tests_made",
    "failed_draws",
    "peak_learning_rate",
    "warmup_end",
)


def _clock(steps: Any, steps_per: Any, examples: Any, examples_per: Any) -> tuple[bool, int, int]:
    """Whether steps are counted, and length of the run and of a test interval in that unit."""
    given = {
        "total_steps": steps,
        "steps_per_test": steps_per,
        "total_examples": examples,
        "examples_per_test": examples_per,
    }
    known = {name: value for name, value in given.items() if value is not None}
    if set(known) not in (
        {"total_steps", "steps_per_test"},
        {"total_examples", "examples_per_test"},
    ):
        raise ValueError(
            "scale_by_autowu: give total_steps and steps_per_test, or total_examples and "
            f"examples_per_test, got {known or 'neither'}"
        )
    _validate.positive_int("scale_by_autowu", **known)
    total, interval = (int(value) for value in known.values())
    if interval >= 2**31:
        raise ValueError(f"scale_by_autowu: examples_per_test must be below 2**31, got {interval}")
    return "total_steps" in known, total, interval


def _check_order(low: Any, high: Any) -> None:
    if any(isinstance(x, jax.Array | jax.core.Tracer) for x in (low, high)):
        return
    if low >= high:
        raise ValueError(
            f"scale_by_autowu: min_learning_rate={low!r} must be below max_learning_rate={high!r}"
        )


def _increment(by_steps: bool, noise: GradientNoise | None, num_examples: Any) -> jax.Array:
    if by_steps:
        return jnp.ones((), jnp.int32)
    if noise is None and num_examples is None:
        raise ValueError(
            "scale_by_autowu counts examples: pass noise=noise (from value_and_grad_noise) or "
            "num_examples= to optimizer.update"
        )
    if num_examples is None and noise is not None:
        num_examples = noise.num_examples
    return jnp.asarray(num_examples).astype(jnp.int32)
