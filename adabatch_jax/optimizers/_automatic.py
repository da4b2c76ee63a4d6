"""`automatic`: the whole system around a direction, with nothing left to sweep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._tree import of_structure
from adabatch_jax._types import PyTree, ScalingRule
from adabatch_jax.batch_size import Criterion, adapt_batch_size, norm_test, trained_parameters
from adabatch_jax.learning_rate import (
    DirectionTraits,
    Peak,
    UntriedError,
    WarmupEnd,
    probe_direction,
    return_to_minimum,
    scale_by_batch_size,
    scale_by_improved_autowu,
    sqrt_scaling,
)
from adabatch_jax.noise import GradientNoise

ETA = 1.5  # of the norm test
BATCH_SIZE_OPTIONS = dict(ema_decay=0.9, debias=True, growth_limit=1.1)
WARMUP = 0.1  # of the run, at most
LEAST_STEPS = 40  # of a warm-up that finds a rate: two for each test
# Without one: how long a first step may be against the parameters. By the factor on the peak: steps that
# are as long as the parameters whatever the gradient, others, and those that shrink as they go.
_STEP_WITHOUT_SEARCH = {1.0: 1 / 32, 4.0: 1 / 8, 8.0: 1 / 2}
_REMEDY = (
    "say by scaling=adabatch.sqrt_scaling() or linear_scaling() how the rate follows the batch"
)


class AutomaticState(NamedTuple):
    """State of what `automatic` returns around: its four links."""

    inner_controller: Any
    inner_direction: Any
    inner_scaling: Any
    inner_schedule: Any


def automatic(
    direction: optax.GradientTransformation,
    *,
    total_examples: int,
    initial_batch_size: int,
    max_batch_size: int,
    criterion: Criterion | Callable[..., Any] | None = None,
    scaling: ScalingRule | None = None,
    autowu_options: Mapping[str, Any] | None = None,
    **batch_size_options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Finds the learning rate, grows the batch, scales the rate with it, and decays over the budget.

    1. `scale_by_improved_autowu` warms up until the loss has passed its minimum, over a tenth of the
       run at most. The batch is held meanwhile: two things that move at once would hide each other.
    2. `return_to_minimum` goes back to the parameters of the minimum, and the rate to the earliest
       whose loss was as low to two standard deviations, times a factor: 1 if the direction is as
       long as the parameters (LAMB), 8 if it shrinks while it gathers squares (AdaGrad), else 4. But
       (except for AdaGrad) to no higher rate than that at which one of the first steps would have
       been an eighth as long as the parameters.
    3. `adapt_batch_size` grows the batch by the noise of the gradient, de-biased and smoothed, by a
       tenth per step at most, and `scale_by_batch_size` lets the rate follow, from the batch with
       which it was found.
    4. The rate decays with a cosine until the budget of examples is used up.

    The kind of a direction is found by `init`, which tries it on tiny arrays in the structure of the
    parameters: trees of masks and labels, `optax.masked`, `optax.partition`, muon for the matrices are
    all taken. Where kinds are mixed, the one that moves the most numbers decides for all. Parameters that
    are never moved count neither there nor in the bound.

    The numbers were chosen on images held out of Fashion-MNIST's training data, with an MLP
    (`tests/experiments/automatic_choice.py`); the bound is the smallest of four that costs that MLP no
    more than seeds differ by, 0.1 points.

    A run whose warm-up would have fewer than 40 steps cannot find a rate. It begins at once, with a
    warning, at the rate at which the longest of the first 24 steps is an eighth as long as the parameters
    (a half for AdaGrad, 1/32 for LAMB), for the array that allows least; the rate rises over those steps.
    2. falls away then, 3. and 4. are as above. `metrics` says by `minimum_found` whether a rate was found.
    When `total_examples` are used up the rate is 0, and training on changes nothing.

    Its price, with Adam inside `adaptive_multi_steps` (`tests/benchmarks/adoption_cost.py`): the state
    holds six times the numbers of the parameters. Adam's moments are two, the gathered gradient is one,
    and the snapshot of `return_to_minimum` the other three, parameters and moments; without it
    `optax.MultiSteps` has three. The first call takes four times the processor's time to compile, 28 s
    against 6.7 s for 28 arrays: 7 s are the Gaussian process, which `warmup_over` leaves out, and 20 to
    30 ms for each array are the trial of the direction. Later calls take no longer.

    `direction` says where to go, without sign or rate: `optax.scale_by_adam()`, `optax.trace(0.9)`, and
    **not** `optax.adam(1e-3)` or `optax.sgd(...)`, which have both already and would turn the step
    around. `update` reads `noise=` (or stands inside `adaptive_multi_steps`) and `value=`, and needs
    `params`.

    Args:
      direction: a transformation whose updates point along the gradient, such as
        `optax.scale_by_adam()`. May be a chain, with clipping before or weight decay after.
      total_examples: examples that the run will use.
      initial_batch_size: examples per step until the rate is found; then the base of the scaling. A
        hundred steps in the first tenth of the run are a good number, and 40 the least.
      max_batch_size: largest batch size.
      criterion: what lets the batch grow; None: `norm_test(1.5)`.
      scaling: rule by which the rate follows the batch. None: `sqrt_scaling()` if the direction is
        insensitive to the gradient's length (Adam, AdaGrad, LAMB), `linear_scaling()` if it is
        proportional to it (SGD, momentum). If it is given, a direction that cannot be tried is taken
        for one like Adam.
      autowu_options: passed to `scale_by_improved_autowu`; max_warmup_fraction=0.1 by default. `peak` has
        the factor above and the bound as max_relative_step by default; a dict changes some of its fields:
        {"peak": {"max_relative_step": None}}.
      **batch_size_options: passed to `adapt_batch_size`; ema_decay=0.9, debias=True and
        growth_limit=1.1 by default.

    Returns:
      A `GradientTransformationExtraArgs`. Under `optax.inject_hyperparams` every argument belongs to
      static_args.

    Raises:
      ValueError: an argument out of range; in `init`, a direction that turns the gradient around, as one
        with a learning rate does; one that cannot be tried, without `scaling`; a run too short to find
        a rate, and no trained parameter with two axes to tell one from.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import adabatch_jax as adabatch
      >>> optimizer = adabatch.automatic(optax.scale_by_adam(), total_examples=300_000,
      ...                                initial_batch_size=256, max_batch_size=8192)
      >>> fn = adabatch.value_and_grad_noise(lambda w, x: jnp.mean((w - x) ** 2))
      >>> params = jnp.array(0.0)
      >>> state = optimizer.init(params)
      >>> groups = adabatch.split_groups(jnp.arange(256.0) - 100.0, 8)
      >>> value, noise = fn(params, groups)
      >>> updates, state = optimizer.update(noise.mean, state, params, value=value, noise=noise)
      >>> int(adabatch.get_batch_size(state)), int(adabatch.metrics(state)["phase"])
      (256, 0)

    Source: the parts are AdAdaGrad (arXiv 2402.11215), AutoWU (arXiv 2107.05855) and the scaling rules
    of Granziol et al. (arXiv 2006.09092); how they are coupled is ours.
    """
    where = "automatic"
    _validate.positive_int(where, total_examples=total_examples)
    batch_size_options = _validate.keywords("batch_size_options", batch_size_options)
    defaults: dict[str, Any] = dict(BATCH_SIZE_OPTIONS)
    if "smoothing" in batch_size_options:  # another name of the same
        del defaults["ema_decay"]
    controller = adapt_batch_size(
        norm_test(ETA) if criterion is None else criterion,
        initial_batch_size=initial_batch_size,
        max_batch_size=max_batch_size,
        **(defaults | batch_size_options),
    )
    options = {"max_warmup_fraction": WARMUP, **(autowu_options or {})}
    own_peak = options.pop("peak", None)
    too_short = _too_short(options["max_warmup_fraction"], total_examples, initial_batch_size)
    if too_short:
        warnings.warn(
            f"automatic: {too_short}. The rate is taken from the length of the parameters instead",
            stacklevel=2,
        )
    direction = optax.with_extra_args_support(direction)

    def after_direction(
        traits: DirectionTraits,
    ) -> tuple[optax.GradientTransformationExtraArgs, ...]:
        """The links that the kind of the direction decides."""
        bound: dict[str, Any] = {"max_relative_step": traits.max_relative_step}
        peak = traits.peak.changed(where, bound).changed(where, own_peak)
        more = dict(options)
        if too_short:
            step = Peak().changed(where, own_peak).max_relative_step
            step = _STEP_WITHOUT_SEARCH[traits.peak_factor] if step is None else step
            peak = replace(peak, max_relative_step=step, ramp_fraction=0.0)
            more["max_warmup_fraction"] = 0.0
        return (
            scale_by_batch_size(traits.scaling, base_batch_size=initial_batch_size),
            scale_by_improved_autowu(
                total_examples=total_examples,
                initial_batch_size=initial_batch_size,
                peak=peak,
                **more,
            ),
        )

    like_adam = DirectionTraits(sqrt_scaling() if scaling is None else scaling)
    after_direction(like_adam)  # refuses bad options before there are parameters

    # Functions of structure and shapes alone: `update` finds the same as `init`, also in another process.
    @of_structure
    def kind_of(params: PyTree) -> tuple[optax.GradientTransformationExtraArgs, ...]:
        try:
            traits = probe_direction(direction, "automatic", _REMEDY, params)
        except UntriedError:
            if scaling is None:
                raise
            traits = like_adam
        return after_direction(traits if scaling is None else traits._replace(scaling=scaling))

    @of_structure
    def trained(params: PyTree) -> PyTree:
        return trained_parameters(direction, params)

    def init(params: PyTree) -> AutomaticState:
        links = (controller, direction, *kind_of(params))
        if too_short:
            kept = jax.tree.map(lambda p, moves: moves and jnp.ndim(p) > 1, params, trained(params))
            if not any(jax.tree.leaves(kept)):
                raise ValueError(
                    f"automatic: {too_short}. No trained parameter with two axes or more tells one by "
                    "its length"
                )
        return AutomaticState(*(link.init(params) for link in links))

    def update(
        updates: PyTree,
        state: AutomaticState,
        params: PyTree | None = None,
        *,
        noise: GradientNoise | None = None,
        hold_batch_size: Any = False,
        **extra_args: Any,
    ) -> tuple[PyTree, AutomaticState]:
        rises = state.inner_schedule.warmup_end == WarmupEnd.RUNNING
        hold = jnp.asarray(hold_batch_size).astype(bool) | rises
        updates, held = controller.update(
            updates,
            state.inner_controller,
            params,
            noise=noise,
            hold_batch_size=hold,
            **extra_args,
        )
        updates, moved = direction.update(
            updates, state.inner_direction, params, noise=noise, **extra_args
        )
        scale, schedule = kind_of(params)
        updates, scaled = scale.update(
            updates, state.inner_scaling, params, noise=noise, **extra_args
        )
        # In the place of what is never moved stands a scalar, which the bound does not look at.
        zero = jnp.zeros(())
        lengths = jax.tree.map(lambda p, moves: p if moves else zero, params, trained(params))
        updates, found = schedule.update(
            updates, state.inner_schedule, lengths, noise=noise, **extra_args
        )
        return updates, AutomaticState(held, moved, scaled, found)

    return return_to_minimum(optax.GradientTransformationExtraArgs(init, update))


def _too_short(fraction: Any, total_examples: int, initial_batch_size: int) -> str:
    """What is wrong with a run that has too few steps to find a rate; empty if nothing is."""
    steps = int(fraction * total_examples) // initial_batch_size
    if not fraction > 0 or steps >= LEAST_STEPS:
        return ""
    needed = -(-LEAST_STEPS * initial_batch_size // fraction)
    smaller = int(fraction * total_examples) // LEAST_STEPS
    remedy = f"at least total_examples={int(needed)}"
    remedy += f" or initial_batch_size={smaller} at most" if smaller > 1 else ""
    return (
        f"total_examples={total_examples} in batches of initial_batch_size={initial_batch_size} is too "
        f"short a run: its warm-up has {steps} steps, and it takes {LEAST_STEPS} to find a learning rate "
        f"({remedy})"
    )
