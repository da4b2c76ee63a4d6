"""AutoWU as we would use it: a shorter warm-up, finer tests, all losses, a watch for divergence."""

from __future__ import annotations

from typing import Any

import optax

from adabatch_jax import _validate
from adabatch_jax._tree import of_structure
from adabatch_jax._types import PyTree
from adabatch_jax.learning_rate._autowu import scale_by_autowu
from adabatch_jax.learning_rate._autowu_state import ScaleByAutowuState
from adabatch_jax.learning_rate._peak import IMPROVED_PEAK, Peak, PeakLike
from adabatch_jax.learning_rate._probe_direction import probe_direction

_DEFAULTS: dict[str, Any] = dict(patience=2, smoother="quasisep", watch_divergence=True)


def scale_by_improved_autowu(
    *,
    total_steps: int | None = None,
    total_examples: int | None = None,
    max_warmup_fraction: float = 0.2,
    num_tests: int = 20,
    direction: optax.GradientTransformation | None = None,
    peak: PeakLike = None,
    **autowu_options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_autowu` with defaults for runs of a few epochs.

    The paper's mode spends up to half of the run on its warm-up and tests once an epoch, three times
    in a row: the rate rises tenfold between two tests, and training has suffered when it turns back.
    Here the warm-up takes a fifth of the run at most and holds 20 tests, each on all losses
    (`smoother="quasisep"`, which decides alike whatever the loss is measured in); two in a row end it
    (`patience=2`). Losses that explode or are not finite, two in a row, end it at once, and halve the
    rate later on, six times at most (`watch_divergence`). The peak is

        Peak(at="confirmed", factor=4.0, at_limit="minimum", ramp_fraction=0.5)

    In a flat valley chance decides where the minimum lies. The earliest point as low, confirmed by a second
    test, has a steady rate, but a low one: hence the factor, and a setback where that is too high. The
    loss is most curved just there: hence the ramp. Wrap the optimizer in `return_to_minimum` to also go
    back to the parameters of the minimum.

    The defaults were chosen on 10,000 images held out of the training sets of the tasks in
    `tests/experiments/autowu_quality.py`, which compares the result with a tuned rate.

    Args:
      total_steps: optimizer steps of the run; or
      total_examples: examples of the run, where the batch grows. Exactly one of the two.
      max_warmup_fraction: of the run, in (0, 1].
      num_tests: tests during the warm-up, at most; at least 2.
      direction: what the schedule is chained behind, `optax.scale_by_adam()` for instance. `init` tries
        it, on small arrays in the structure of the parameters. The factor is 1 if its steps are as long
        as the parameters (LAMB), 8 if they shrink while it gathers squares (AdaGrad; at the "earliest" of
        the last test), else 4.
      peak: a dict of those fields of `Peak` that are to differ from the above, or a `Peak` in its place.
      **autowu_options: passed to `scale_by_autowu`, whose defaults they replace.

    Returns:
      A `GradientTransformationExtraArgs` that reads `value=`. For `optax.inject_hyperparams` see
      `scale_by_autowu`.

    Raises:
      ValueError: an argument out of range, not exactly one of the totals, a run whose warm-up has fewer
        than ten steps (with total_examples: if initial_batch_size= is given); in `init`, a direction that
        cannot be tried or turns the gradient around.

    Example:
      >>> import jax.numpy as jnp
      >>> link = scale_by_improved_autowu(total_steps=1000)
      >>> state = link.init(jnp.zeros(2))
      >>> updates, state = link.update(jnp.ones(2), state, value=jnp.array(2.3))
      >>> int(state.autowu_phase)
      0

    Source: ours, on the ground of Kim et al. (2021), arXiv 2107.05855.
    """
    where = "scale_by_improved_autowu"
    autowu_options = _validate.keywords("autowu_options", autowu_options)
    if (total_steps is None) == (total_examples is None):
        raise ValueError(
            f"{where}: give total_steps or total_examples, got {total_steps!r} and {total_examples!r}"
        )
    unit = "steps" if total_examples is None else "examples"
    total = total_steps if total_examples is None else total_examples
    _validate.positive_int(where, **{f"total_{unit}": total}, num_tests=num_tests)
    _validate.between(where, 0.0, 1.0, closed=True, max_warmup_fraction=max_warmup_fraction)
    interval = max(1, int(max_warmup_fraction * int(total or 0) / num_tests))
    options: dict[str, Any] = {f"total_{unit}": total, f"{unit}_per_test": interval, **_DEFAULTS}

    def with_peak(default: Peak) -> optax.GradientTransformationExtraArgs:
        return scale_by_autowu(
            max_warmup_fraction=max_warmup_fraction,
            peak=default.changed(where, peak),
            **(options | autowu_options),
        )

    schedule = with_peak(IMPROVED_PEAK)  # refuses bad options before there are parameters
    if direction is None:
        return schedule

    @of_structure
    def of_kind(params: PyTree) -> optax.GradientTransformationExtraArgs:
        remedy = "give peak={'factor': …} instead of direction="
        return with_peak(probe_direction(direction, where, remedy, params).peak)

    def init(params: PyTree) -> ScaleByAutowuState:
        state: ScaleByAutowuState = of_kind(params).init(params)
        return state

    def update(
        updates: PyTree, state: ScaleByAutowuState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ScaleByAutowuState]:
        return of_kind(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
