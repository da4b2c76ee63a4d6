"""`adapt_batch_size`: the link of an optimizer chain that decides the next batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adabatch_jax import _validate
from adabatch_jax._clock import advance, as_float, zero_clock
from adabatch_jax._loss import loss_of_call
from adabatch_jax._types import PyTree
from adabatch_jax.batch_size._arguments import (
    as_criterion,
    let_through,
    one_ema_decay,
    read_arguments,
    zero_evidence,
)
from adabatch_jax.batch_size._criterion import Criterion
from adabatch_jax.batch_size._decide import Rules, decide
from adabatch_jax.batch_size._sizes import Sizes, check_sizes
from adabatch_jax.batch_size._state import (
    AdaptBatchSizeState,
    BatchSizeStatus,
    Decision,
)
from adabatch_jax.noise import GradientNoise


def adapt_batch_size(
    criterion: Criterion | Callable[[GradientNoise], Any],
    *,
    initial_batch_size: int,
    max_batch_size: int,
    min_batch_size: int = 1,
    multiple_of: int = 1,
    growth_limit: Any = None,
    monotone: bool = True,
    test_interval: int = 1,
    ema_decay: Any = None,
    debias: bool = False,
    dataset_size: int | None = None,
    smoothing: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Decides the batch size of the next step from the noise of the present gradient.

    With T the batch size that `criterion` requires, `b ← min(⌈max(T, b)⌉, max_batch_size)`, used from
    the next step on. ⌈T⌉ is an integer that T exceeds by less than 2⁻²¹ T, the rounding of float32.
    Updates pass through unchanged; read the size with `get_batch_size(opt_state)`. The defaults are the
    test of the paper. Once a monotone batch is at its maximum the test is switched off. Evidence that
    is NaN or inf, comes from fewer than two groups, or from a gradient that is exactly zero moves nothing:
    `metrics(opt_state)["test_status"]` says which (`BatchSizeStatus`), and `skipped_tests` counts. One
    exception: a batch that may shrink (`monotone=False`) and came as one group has no way back by a
    test, so it is enlarged to two such groups at once, and goes no lower from then on.

    Inside `optax.masked` the noise of the parameters that are let through is told apart by its
    `coordinate_scatter`. Without that, and for inner products, the test judges the whole gradient; masked
    parameters count in it unless their gradient is zero, as where the noise was measured without them.

    `update` reads, all by keyword; other extra arguments are ignored:

    * `noise=`: a `GradientNoise`, measured before any clipping.
    * `hold_batch_size=`: bool, may be traced: skip the test.
    * what the criterion reads, such as `value=` (or `loss=`) for `cabs`.
    * `trained=`: bools like the parameters (see `trained_parameters`): coordinates of the others are no
      part of a coordinate-wise test.
    * `emit=` and `batch_size_multiple=`, which `adaptive_multi_steps` passes. The latter is a Python
      int, the examples that one call of all devices adds: sizes are multiples of it, too, and the
      largest stays below `max_batch_size`.

    Every update advances the clock by `noise.num_examples`, whatever becomes of the test: it counts what
    optimizer steps used. A wrapper that drops an update, state and all, drops its examples, too.

    Args:
      criterion: a criterion such as `norm_test(0.5)`, or any function from `GradientNoise` to a
        required batch size.
      initial_batch_size: examples of the first step, over all devices.
      max_batch_size: largest batch size, at most 2**30.
      min_batch_size: smallest batch size; matters with `monotone=False`. Where it leaves one group the
        batch takes the way out above.
      multiple_of: batch sizes are rounded up to a multiple of it, for instance micro-batch size ×
        devices. Must divide `initial_batch_size` and `max_batch_size`.
      growth_limit: largest factor (> 1) by which one test may enlarge the batch, before rounding up;
        None: no limit.
      monotone: whether the batch never shrinks. A monotone batch turns lucky estimates into growth;
        with few groups prefer `ema_decay` and `debias`.
      test_interval: updates from one test to the next; in between nothing is computed.
      ema_decay: decay d in [0, 1) of an exponential average of numerator and denominator, each by
        itself; None: every test stands alone. Use it together with `debias`: by an average of the
        *biased* denominator a batch settles at N (1/η² − 1), N the noise scale, instead of N/η², and at
        η ≥ 1 it never grows, which is refused.
      debias: compare with ‖ḡ‖² − tr Σ / b, an unbiased estimate of ‖∇F‖², instead of ‖ḡ‖². T is then
        the noise scale over η² at any batch size, but heavy-tailed: use it together with `ema_decay`.
        Where the estimate is not positive no size is large enough, and the batch grows by
        `growth_limit`, or doubles.
      dataset_size: number n of examples, sampled without replacement. The mean of b of them has a
        variance of tr Σ / b · (n − b)/n, so T becomes T n/(n + T), never more than n, and `debias`
        takes off tr Σ / b · (n − b)/n. None: infinitely many.
      smoothing: another name of `ema_decay`.

    Returns:
      A `GradientTransformationExtraArgs`. Under `optax.inject_hyperparams`, `growth_limit` and
      `ema_decay` may be injected; the static_args are criterion, initial_batch_size, max_batch_size,
      min_batch_size, multiple_of, test_interval, dataset_size (and the two booleans).

    Raises:
      ValueError: sizes not positive or out of order; `multiple_of` does not divide them;
        `growth_limit` ≤ 1; `ema_decay` outside [0, 1), given under both names, or without `debias` where
        the batch could never grow; `debias` with a plain function as criterion; at trace time, a missing
        `noise=` or one of other parameters, a missing extra argument that the criterion reads or one
        that is no scalar, a `batch_size_multiple` above `max_batch_size`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from adabatch_jax import GradientNoise, get_batch_size, norm_test
      >>> optimizer = optax.chain(
      ...     adapt_batch_size(norm_test(0.5), initial_batch_size=16, max_batch_size=1024),
      ...     optax.sgd(0.1))
      >>> grad = jnp.array([3.0, 4.0])
      >>> state = optimizer.init(grad)
      >>> noise = GradientNoise(grad, scatter=jnp.array(7000.0), num_examples=jnp.array(16),
      ...                       num_groups=jnp.array(8))  # tr Σ = 1000, ‖ḡ‖² = 25
      >>> _, state = optimizer.update(grad, state, noise=noise)
      >>> int(get_batch_size(state))
      160

    Source: Lau, Liu, Kolar (2024), arXiv 2402.11215 (AdAdaGrad); smoothing, de-biasing and
    `monotone=False` are ours.
    """
    where = "adapt_batch_size"
    check_sizes(initial_batch_size, max_batch_size, min_batch_size, multiple_of)
    _validate.positive_int(where, test_interval=test_interval)
    if growth_limit is not None:
        _validate.positive(where, growth_limit=growth_limit)
        if _validate.is_static(growth_limit) and growth_limit <= 1:
            raise ValueError(f"adapt_batch_size: growth_limit must exceed 1, got {growth_limit!r}")
    name, ema_decay = one_ema_decay(ema_decay, smoothing)
    if ema_decay is not None:
        _validate.between(where, 0.0, 1.0, **{name: ema_decay})
    if dataset_size is not None:
        _validate.positive_int(where, dataset_size=dataset_size)
    criterion = as_criterion(criterion, debias, name, ema_decay)
    rules = Rules(criterion, ema_decay, debias)
    population = dataset_size if criterion.uses_noise else None
    permitted = Sizes(
        min_batch_size, max_batch_size, multiple_of, growth_limit, monotone, population
    )

    def init(params: PyTree) -> AdaptBatchSizeState:
        def first() -> Any:
            if not _validate.is_static(initial_batch_size):
                return jnp.array(initial_batch_size, jnp.int32, copy=True)
            # While tracing it stays NumPy's, which is concrete. `adaptive_multi_steps` traces `init` and
            # takes this number out of it, to check it against its micro-batch (`_initial_size` there). And
            # the program does not hold an array that the device would have to give back.
            tracing = _validate.is_traced(jnp.zeros(()))
            size = np.int32(initial_batch_size)
            return size if tracing else jax.device_put(size)

        size = first()
        start = Decision.first(size, () if ema_decay is None else zero_evidence(criterion, params))
        # Every field has a buffer of its own: a state whose fields share one cannot be donated.
        return AdaptBatchSizeState(
            next_batch_size=size,
            largest_batch_size=jnp.array(max_batch_size, jnp.int32),
            last_batch_size=first(),
            examples_clock=zero_clock(),
            last_gradient_norm=jnp.zeros((), jnp.float32),
            updates_seen=jnp.zeros((), jnp.int32),
            updates_until_test=jnp.zeros((), jnp.int32),
            test_due=jnp.asarray(~permitted.full(size) & criterion.uses_noise),
            size_memory=start.size_memory,
            last_size_test=start.last_size_test,
        )

    def update(
        updates: PyTree,
        state: AdaptBatchSizeState,
        params: PyTree | None = None,
        *,
        noise: GradientNoise | None = None,
        hold_batch_size: Any = False,
        emit: Any = True,
        batch_size_multiple: int | None = None,
        trained: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, AdaptBatchSizeState]:
        del params
        if noise is None:
            raise ValueError(
                "adapt_batch_size needs the noise of the gradient: call "
                "optimizer.update(noise.mean, state, params, noise=noise) with noise from "
                "value_and_grad_noise, or wrap the optimizer in adaptive_multi_steps"
            )
        sizes = permitted.in_calls_of(batch_size_multiple)
        hold = jnp.asarray(hold_batch_size).astype(bool)
        due = state.updates_until_test == 0
        at_maximum = sizes.full(state.next_batch_size)

        square = noise.squared_norm

        def look(noise: GradientNoise, read: Any, before: Decision, square: jax.Array) -> Decision:
            seen = let_through(noise, updates, criterion)
            known = square if seen is noise else None
            return decide(rules, sizes, trained, seen, read, before, known)

        def skip(_: GradientNoise, __: Any, before: Decision, ___: jax.Array) -> Decision:
            status = jnp.where(due, BatchSizeStatus.HELD, BatchSizeStatus.NOT_TESTED)
            status = jnp.where(at_maximum, BatchSizeStatus.AT_MAXIMUM, status)
            last = before.last_size_test._replace(test_status=status.astype(jnp.int32))
            return before._replace(last_size_test=last)

        clock = advance(state.examples_clock, noise.num_examples)
        value = loss_of_call(extra_args.get("value"), extra_args)
        known = {**extra_args, "value": value, "examples_seen": as_float(clock)}
        read = read_arguments(criterion, known)
        # Without `emit` the batch is not complete, and adaptive_multi_steps drops what we return.
        complete = jnp.asarray(emit).astype(bool)
        before = Decision(*(getattr(state, name) for name in Decision._fields))
        wanted = due & complete & ~hold & ~at_maximum
        tested = jax.lax.cond(wanted, look, skip, noise, read, before, square)
        # A state that was restored beside other calls may hold a size that these do not add up to.
        tested = tested._replace(next_batch_size=sizes.rounded(tested.next_batch_size))
        until = jnp.where(due, test_interval, state.updates_until_test) - 1
        return updates, state._replace(
            last_batch_size=jnp.asarray(noise.num_examples).astype(jnp.int32),
            examples_clock=clock,
            # No metric is NaN: such a length counts as +inf.
            last_gradient_norm=jnp.where(square >= 0, jnp.sqrt(square), jnp.inf),
            updates_seen=optax.safe_increment(state.updates_seen),
            updates_until_test=until.astype(jnp.int32),
            test_due=(until == 0) & ~sizes.full(tested.next_batch_size) & criterion.uses_noise,
            **tested._asdict(),
        )

    return optax.GradientTransformationExtraArgs(init, update)
