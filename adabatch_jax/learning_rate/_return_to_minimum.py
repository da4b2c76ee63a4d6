"""`return_to_minimum`: when the warm-up ends, go on from the parameters that it was best with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax._protocols import inner_fields, reports_metrics
from adabatch_jax._types import PyTree
from adabatch_jax.learning_rate._autowu_state import WarmupEnd, find_schedule
from adabatch_jax.learning_rate._divergence import LossLevel

_WHERE = "return_to_minimum"
_PRESENT = 0.98  # from here on in [0, 1] a minimum counts as lying at present


class ReturnToMinimumState(NamedTuple):
    """State of `return_to_minimum`: a second set of parameters and moments."""

    snapshots_taken: jax.Array  # int32
    returns_made: jax.Array  # int32: how often the parameters went back to the snapshot
    returning: jax.Array  # bool: one more step leads there, since the last was rounded
    snapshot_params: PyTree
    # The arrays alone of what goes back with them: as states, each of their names would stand in the
    # optimizer state twice, and optax.tree.get refuses that.
    snapshot_moments: tuple[jax.Array, ...]
    inner_returning_state: PyTree

    def report_metrics(self) -> dict[str, Any]:
        """The numbers that `adabatch.metrics` shows."""
        return {"snapshots_taken": self.snapshots_taken, "returns_made": self.returns_made}


def return_to_minimum(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Goes back to the parameters of the minimum when AutoWU's warm-up ends past it.

    AutoWU notices that the loss has passed its minimum some tests after it has, and in between a
    learning rate that is too large damages the parameters. This wrapper keeps a snapshot of them,
    taken at the last test of the warm-up whose minimum lay at present. When the warm-up ends because
    the minimum is past or the loss diverged, the updates lead back there: `params + updates` is the
    snapshot to the rounding of one addition. Updates in bfloat16 or float16 round by up to 0.4 % of the
    way, which is more than that: then the next step leads there, too, and does nothing else. Where
    `max_relative_step` bounds the rate, no snapshot is taken above it: the loss of a network with
    normalisation may fall there while its weights grow so large that it learns slowly ever after. With
    `watch_divergence` the snapshot is renewed afterwards, once per test interval if the average loss is
    at its lowest, and a setback leads back to it. Moments of the direction (any state that holds
    floating-point numbers, with the counts that correct their bias) go back as well; batch-size
    controller, schedule, clocks, PRNG keys and injected hyperparameters stay.

    A step whose loss AutoWU leaves out, because it is not finite or far above the others, changes neither
    parameters nor moments.

    It must be outermost, because later links would distort the way back; only
    `adaptive_multi_steps` may stand around it. The memory is that of one more set of parameters and
    moments, in their dtypes, all through the run: a setback leads back there, too. Moments that start anew
    instead were tried, on the digits' MLP: they cost LAMB half as much loss again (.20 for .13; three and
    four seeds), and Adam nothing (.085 for .087).

    Args:
      optimizer: contains one `scale_by_autowu`, best with tests as fine as those of
        `scale_by_improved_autowu`.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` needs `params`. Under
      `optax.inject_hyperparams` `optimizer` belongs to static_args.

    Raises:
      ValueError: `optimizer` holds no `scale_by_autowu`, or several; at trace time, a missing `params`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import adabatch_jax as adabatch
      >>> optimizer = adabatch.return_to_minimum(optax.chain(
      ...     optax.scale_by_adam(), adabatch.scale_by_improved_autowu(total_steps=1000)))
      >>> params = jnp.ones(2)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params, value=jnp.array(2.3))

    Source: ours.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> ReturnToMinimumState:
        inner = optimizer.init(params)
        find_schedule(inner, _WHERE)
        return ReturnToMinimumState(
            snapshots_taken=jnp.zeros((), jnp.int32),
            returns_made=jnp.zeros((), jnp.int32),
            returning=jnp.zeros((), bool),
            snapshot_params=jax.tree.map(jnp.copy, params),
            snapshot_moments=jax.tree.map(jnp.copy, _moments(inner)),
            inner_returning_state=inner,
        )

    def update(
        updates: PyTree,
        state: ReturnToMinimumState,
        params: PyTree | None = None,
        *,
        trace_only: bool = False,
        **extra_args: Any,
    ) -> tuple[PyTree, ReturnToMinimumState]:
        if params is None:
            raise ValueError(
                "return_to_minimum keeps a snapshot of the parameters: call "
                "optimizer.update(gradient, state, params, value=loss)"
            )
        before = state.inner_returning_state
        if trace_only:  # what the optimizer moves, which the way back to a snapshot would hide
            updates, after = optimizer.update(
                updates, before, params, trace_only=True, **extra_args
            )
            return updates, state._replace(inner_returning_state=after)
        updates, after = optimizer.update(updates, before, params, **extra_args)
        old, new = find_schedule(before, _WHERE), find_schedule(after, _WHERE)
        # Told from what changed in this very call: adaptive_multi_steps may drop what it did.
        seen = new.last_warmup_test
        tested = seen.tests_made > old.last_warmup_test.tests_made
        rising = new.warmup_end == WarmupEnd.RUNNING
        rate, at_present = new.autowu_learning_rate, seen.minimum_location >= _PRESENT
        too_high = rate > new.bounded(rate)
        best = tested & rising & at_present & ~too_high
        past = (new.warmup_end == WarmupEnd.MINIMUM_PASSED) | (new.warmup_end == WarmupEnd.DIVERGED)
        past |= (new.warmup_end == WarmupEnd.AT_LIMIT) & tested & (~at_present | too_high)
        back = (old.warmup_end == WarmupEnd.RUNNING) & past
        level = new.loss_level
        if isinstance(level, LossLevel):
            setback = new.setbacks > old.setbacks
            back |= setback
            once_per_interval = new.since_test <= old.since_test
            falls = (old.warmup_end != WarmupEnd.RUNNING) & (level.average <= level.lowest)
            best |= falls & once_per_interval & ~setback

        best, back = _decided_once(best & ~state.returning), _decided_once(back)
        again = back & any(_is_narrow(u) for u in jax.tree.leaves(updates))
        moves = back | state.returning
        # What comes with a loss that is left out would spoil parameters and moments.
        withheld = _decided_once(new.losses_left_out > old.losses_left_out)
        updates = jax.tree.map(lambda u: jnp.where(withheld, jnp.zeros_like(u), u), updates)
        moments = optax.tree.where(withheld, _moments(before), _moments(after))
        # The loss that was lowest is that of the parameters before this step.
        way_back = jax.tree.map(_difference, state.snapshot_params, params, updates)
        moments = optax.tree.where(moves, state.snapshot_moments, moments)
        return optax.tree.where(moves, way_back, updates), ReturnToMinimumState(
            snapshots_taken=state.snapshots_taken + best.astype(jnp.int32),
            returns_made=state.returns_made + back.astype(jnp.int32),
            returning=again,
            snapshot_params=optax.tree.where(best, params, state.snapshot_params),
            snapshot_moments=optax.tree.where(best, _moments(before), state.snapshot_moments),
            inner_returning_state=_with_moments(after, moments),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _difference(there: jax.Array, here: jax.Array, like: jax.Array) -> jax.Array:
    """`there − here`, rounded once, in the dtype of the update that it replaces."""
    dtype = jnp.promote_types(there.dtype, like.dtype)
    return (there.astype(dtype) - here.astype(dtype)).astype(like.dtype)


def _decided_once(flag: jax.Array) -> jax.Array:
    """The same flag, behind a square root.

    XLA's CPU compiler fuses by copying: all that AutoWU computes for a decision would be compiled once more
    for every array of parameters and moments. It does not copy a square root.
    """
    return jnp.sqrt(flag.astype(jnp.float32)) > 0.5


def _is_narrow(update: jax.Array) -> bool:
    return jnp.finfo(update.dtype).bits < 32


def _map_moments(change: Callable[[Any], Any], opt_state: Any) -> Any:
    """`change` applied to every state of a direction; the others as they are.

    A state with fields named inner_… is a wrapper, and only those fields are searched. Every other
    state that holds floating-point numbers belongs to the direction, unless it reports metrics.
    """
    if isinstance(opt_state, dict):
        return {k: _map_moments(change, v) for k, v in opt_state.items()}
    if not isinstance(opt_state, tuple):
        return opt_state
    fields = getattr(opt_state, "_fields", None)
    if fields is None:  # optax.chain
        return tuple(_map_moments(change, part) for part in opt_state)
    if inner := inner_fields(opt_state):
        parts = {name: _map_moments(change, getattr(opt_state, name)) for name in inner}
        return type(opt_state)(*(parts.get(k, v) for k, v in zip(fields, opt_state, strict=True)))
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(opt_state)]
    is_moments = any(inexact) and not reports_metrics(opt_state)
    return change(opt_state) if is_moments else opt_state


def _moments(opt_state: PyTree) -> tuple[jax.Array, ...]:
    found: list[jax.Array] = []

    def note(state: Any) -> Any:
        found.extend(jax.tree.leaves(state))
        return state

    _map_moments(note, opt_state)
    return tuple(found)


def _with_moments(opt_state: PyTree, moments: tuple[jax.Array, ...]) -> PyTree:
    left = iter(moments)
    return _map_moments(lambda state: jax.tree.map(lambda _: next(left), state), opt_state)
