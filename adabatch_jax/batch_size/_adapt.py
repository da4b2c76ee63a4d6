"""`adapt_batch_size`: the link of an optimizer chain that decides the next batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adabatch_jax import _validate
from adabatch_jax.batch_size._criterion import Criterion, Evidence, corrected
from adabatch_jax.batch_size._state import AdaptBatchSizeState, BatchSizeStatus
from adabatch_jax.noise import GradientNoise
from adabatch_jax.noise._clock import advance, as_float, zero_clock

PyTree = Any
_DISPLAY_DECAY = 0.9  # of the noise scale that `metrics` reports; no decision hangs on it


class _Tested(NamedTuple):
    """The fields of the state that a test changes."""

    next_batch_size: jax.Array
    evidence_ema: PyTree
    evidence_weight: jax.Array
    display_ema: jax.Array
    test_numerator: jax.Array
    test_denominator: jax.Array
    test_degrees_of_freedom: jax.Array
    required_batch_size: jax.Array
    test_status: jax.Array
    skipped_tests: jax.Array


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
    smoothing: Any = None,
    debias: bool = False,
    dataset_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Decides the batch size of the next step from the noise of the present gradient.

    With T the batch size that `criterion` requires, `b ← min(⌈max(T, b)⌉, max_batch_size)`, used from
    the next step on. ⌈T⌉ is an integer that T exceeds by less than 2⁻²¹ T, the rounding of float32.
    Updates pass through unchanged; read the size with `get_batch_size(opt_state)`. The defaults are the
    test of the paper. Once a monotone batch is at its maximum the test is switched off. Evidence that
    is NaN or inf, comes from fewer than two groups, or from a gradient that is exactly zero never
    moves the batch: `metrics(opt_state)["test_status"]` says which (`BatchSizeStatus`), and
    `skipped_tests` counts.

    Inside `optax.masked` the coordinate-wise test sees the coordinates that are let through; the other
    tests always judge the whole gradient.

    `update` reads `noise=` (a `GradientNoise`, measured before any clipping) and `hold_batch_size=`
    (bool, may be traced: skip the test), `emit=` from `adaptive_multi_steps`, and what the criterion
    reads, such as `value=` for `cabs`; other extra arguments are ignored.

    Args:
      criterion: a criterion such as `norm_test(0.5)`, or any function from `GradientNoise` to a
        required batch size.
      initial_batch_size: examples of the first step, over all devices.
      max_batch_size: largest batch size, at most 2**30.
      min_batch_size: smallest batch size; matters with `monotone=False`.
      multiple_of: batch sizes are rounded up to a multiple of it, for instance micro-batch size ×
        devices. Must divide `initial_batch_size` and `max_batch_size`.
      growth_limit: largest factor (> 1) by which one test may enlarge the batch, before rounding up;
        None: no limit.
      monotone: whether the batch never shrinks. A monotone batch turns lucky estimates into growth;
        with few groups prefer `smoothing` and `debias`.
      test_interval: updates from one test to the next; in between nothing is computed.
      smoothing: decay d in [0, 1) of an exponential average of numerator and denominator, each by
        itself; None: every test stands alone. An average of the *biased* denominator can never ask
        for growth at η ≥ 1: use it together with `debias`.
      debias: compare with ‖ḡ‖² − tr Σ / b, an unbiased estimate of ‖∇F‖², instead of ‖ḡ‖². T is then
        the noise scale over η² at any batch size, but heavy-tailed: use it together with `smoothing`.
        Where the estimate is not positive no size is large enough, and the batch grows by
        `growth_limit`, or doubles.
      dataset_size: number n of examples, sampled without replacement: variances get the factor
        (n − b)/(n − 1). None: infinitely many.

    Returns:
      A `GradientTransformationExtraArgs`. Under `optax.inject_hyperparams`, `growth_limit` and
      `smoothing` may be injected; the static_args are criterion, initial_batch_size, max_batch_size,
      min_batch_size, multiple_of, test_interval, dataset_size (and the two booleans).

    Raises:
      ValueError: sizes not positive or out of order; `multiple_of` does not divide them;
        `growth_limit` ≤ 1; `smoothing` outside [0, 1); `debias` with a plain function as criterion;
        at trace time, a missing `noise=`, or an extra argument that the criterion reads.

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
    criterion = _as_criterion(criterion, debias)
    _check_sizes(initial_batch_size, max_batch_size, min_batch_size, multiple_of)
    _validate.positive_int("adapt_batch_size", test_interval=test_interval)
    if growth_limit is not None:
        _validate.positive("adapt_batch_size", growth_limit=growth_limit)
        if not isinstance(growth_limit, jax.Array | jax.core.Tracer) and growth_limit <= 1:
            raise ValueError(f"adapt_batch_size: growth_limit must exceed 1, got {growth_limit!r}")
    if smoothing is not None:
        _validate.between("adapt_batch_size", 0.0, 1.0, smoothing=smoothing)
    if dataset_size is not None:
        _validate.positive_int("adapt_batch_size", dataset_size=dataset_size)

    def full(size: jax.Array) -> jax.Array:
        return (size >= max_batch_size) & monotone

    def init(params: PyTree) -> AdaptBatchSizeState:
        first: Any
        if isinstance(initial_batch_size, jax.Array | jax.core.Tracer):
            first = initial_batch_size.astype(jnp.int32)
        else:
            # While tracing it stays NumPy's: a wrapper can check it against its micro-batch, and the
            # program does not hold an array that the device would have to give back.
            tracing = isinstance(jnp.zeros(()), jax.core.Tracer)
            first = np.int32(initial_batch_size)
            first = first if tracing else jax.device_put(first)
        # Every field has a buffer of its own: a state whose fields share one cannot be donated.
        return AdaptBatchSizeState(
            next_batch_size=first,
            largest_batch_size=jnp.array(max_batch_size, jnp.int32),
            examples_clock=zero_clock(),
            updates_seen=jnp.zeros((), jnp.int32),
            evidence_ema=() if smoothing is None else _zero_evidence(criterion, params),
            evidence_weight=jnp.zeros((), jnp.float32),
            display_ema=jnp.zeros((2,), jnp.float32),
            test_numerator=jnp.zeros((), jnp.float32),
            test_denominator=jnp.zeros((), jnp.float32),
            test_degrees_of_freedom=jnp.zeros((), jnp.int32),
            required_batch_size=jnp.zeros((), jnp.float32),
            test_status=jnp.array(int(BatchSizeStatus.NOT_TESTED), jnp.int32),
            skipped_tests=jnp.zeros((), jnp.int32),
            test_due=jnp.asarray(~full(first) & criterion.uses_noise),
        )

    def next_size(batch_size: jax.Array, required: jax.Array) -> jax.Array:
        size = batch_size.astype(jnp.float32)
        limit = jnp.inf if growth_limit is None else growth_limit
        beyond = 2.0 if growth_limit is None else growth_limit
        factor = jnp.where(jnp.isinf(required), beyond, limit).astype(jnp.float32)
        target = jnp.minimum(required, factor * size)
        target = jnp.where(jnp.isnan(target), size, target)
        # An integer stays one where division is a little off, as it is on a GPU: 100.00001 is 100.
        rounding = jnp.minimum(target * 2.0**-21, 0.25)
        # Bounds are integers: float32 has no room for all of them beyond 2**24.
        whole = jnp.ceil(jnp.minimum(target - rounding, 2.0**30)).astype(jnp.int32)
        whole = jnp.where(target >= jnp.float32(max_batch_size), max_batch_size, whole)
        whole = jnp.clip(whole, min_batch_size, max_batch_size)
        whole = jnp.minimum(whole + (-whole) % multiple_of, max_batch_size)
        return jnp.maximum(whole, batch_size) if monotone else whole

    def test(
        noise: GradientNoise, read: dict[str, jax.Array], state: AdaptBatchSizeState
    ) -> _Tested:
        evidence = criterion.evidence(noise, **read)
        square = noise.squared_norm
        examples = jnp.maximum(jnp.asarray(noise.num_examples).astype(jnp.float32), 1.0)
        population = jnp.float32(1.0)
        if dataset_size is not None and criterion.uses_noise:
            left = jnp.maximum(dataset_size - examples, 0.0)
            population = left / max(dataset_size - 1.0, 1.0)
        new = corrected(criterion, evidence, noise, debias=debias, population=population)
        ignored = not criterion.uses_noise
        finite = _all_finite((evidence, () if ignored else (square, jnp.asarray(noise.scatter))))
        enough = ignored | (jnp.asarray(noise.num_groups) > 1)
        signal = ignored | (square > 0)
        usable = enough & finite & signal

        ema, weight = state.evidence_ema, state.evidence_weight
        if smoothing is None:
            averaged = new
        else:
            decay = jnp.minimum(jnp.asarray(smoothing, jnp.float32), 1.0 - 1e-6)
            weight = jnp.where(usable, decay * weight + (1 - decay), weight)
            blended = jax.tree.map(lambda e, x: decay * e + (1 - decay) * x, ema, new)
            ema = jax.tree.map(lambda e, x: jnp.where(usable, x, e), ema, blended)
            start = jnp.where(weight > 0, weight, 1.0)
            averaged = jax.tree.map(lambda e: e / start, ema)
        numerator, denominator = criterion.summarize(*averaged)
        required = criterion.required(numerator, denominator)
        finite &= ~jnp.isnan(required)
        usable &= finite

        size = state.next_batch_size
        moved = jnp.where(usable, next_size(size, required), size)
        shown = jnp.stack([noise.trace, square - population * noise.trace / examples])
        keep = jnp.where(state.display_ema[0] > 0, jnp.float32(_DISPLAY_DECAY), 0.0)
        shown = keep * state.display_ema + (1 - keep) * shown
        if ignored:  # it need not have been measured
            shown = jnp.where(jnp.all(jnp.isfinite(shown)), shown, state.display_ema)
        status = jnp.where(moved == size, BatchSizeStatus.PASSED, BatchSizeStatus.CHANGED)
        status = jnp.where(signal, status, BatchSizeStatus.ZERO_GRADIENT)
        status = jnp.where(finite, status, BatchSizeStatus.NOT_FINITE)
        status = jnp.where(enough, status, BatchSizeStatus.TOO_FEW_GROUPS)

        def kept(x: Any, old: jax.Array) -> jax.Array:
            return jnp.where(usable, jnp.asarray(x).astype(old.dtype), old)

        return _Tested(
            next_batch_size=moved.astype(jnp.int32),
            evidence_ema=ema,
            evidence_weight=weight,
            display_ema=kept(shown, state.display_ema),
            test_numerator=kept(numerator, state.test_numerator),
            test_denominator=kept(denominator, state.test_denominator),
            test_degrees_of_freedom=kept(noise.num_groups - 1, state.test_degrees_of_freedom),
            required_batch_size=kept(required, state.required_batch_size),
            test_status=status.astype(jnp.int32),
            skipped_tests=state.skipped_tests + jnp.where(usable, 0, 1).astype(jnp.int32),
        )

    def update(
        updates: PyTree,
        state: AdaptBatchSizeState,
        params: PyTree | None = None,
        *,
        noise: GradientNoise | None = None,
        hold_batch_size: Any = False,
        emit: Any = True,
        **extra_args: Any,
    ) -> tuple[PyTree, AdaptBatchSizeState]:
        del params
        if noise is None:
            raise ValueError(
                "adapt_batch_size needs the noise of the gradient: call "
                "optimizer.update(noise.mean, state, params, noise=noise) with noise from "
                "value_and_grad_noise, or wrap the optimizer in adaptive_multi_steps"
            )
        hold = jnp.asarray(hold_batch_size).astype(bool)
        due = state.updates_seen % test_interval == 0
        at_maximum = full(state.next_batch_size)

        def skip(_: GradientNoise, __: Any, state: AdaptBatchSizeState) -> _Tested:
            status = jnp.where(due, BatchSizeStatus.HELD, BatchSizeStatus.NOT_TESTED)
            status = jnp.where(at_maximum, BatchSizeStatus.AT_MAXIMUM, status)
            unchanged = _Tested(*(getattr(state, name) for name in _Tested._fields))
            return unchanged._replace(test_status=status.astype(jnp.int32))

        clock = advance(state.examples_clock, noise.num_examples)
        read = _read(criterion, {**extra_args, "examples_seen": as_float(clock)})
        if criterion.coordinate_wise:
            noise = _without_masked(noise, updates)
        # Without `emit` the batch is not complete, and adaptive_multi_steps drops what we return.
        complete = jnp.asarray(emit).astype(bool)
        tested = jax.lax.cond(due & complete & ~hold & ~at_maximum, test, skip, noise, read, state)
        seen = optax.safe_increment(state.updates_seen)
        return updates, state._replace(
            examples_clock=clock,
            updates_seen=seen,
            test_due=(seen % test_interval == 0)
            & ~full(tested.next_batch_size)
            & criterion.uses_noise,
            **tested._asdict(),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _as_criterion(criterion: Any, debias: bool) -> Criterion:
    if isinstance(criterion, Criterion):
        return criterion
    if not callable(criterion):
        raise ValueError(f"adapt_batch_size: criterion must be a criterion, got {criterion!r}")
    if debias:
        raise ValueError(
            "adapt_batch_size: debias=True needs a criterion with a denominator such as "
            f"norm_test(eta), got the plain function {criterion!r}"
        )

    def evidence(noise: GradientNoise) -> Evidence:
        required = jnp.asarray(criterion(noise)).astype(jnp.float32)
        return Evidence(required, jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32))

    return Criterion(getattr(criterion, "__name__", "criterion"), evidence)


def _read(criterion: Criterion, known: dict[str, Any]) -> dict[str, jax.Array]:
    missing = [name for name in criterion.reads if known.get(name) is None]
    if missing:
        raise ValueError(
            f"adapt_batch_size: {criterion.name} reads {missing[0]}=: call optimizer.update(gradient, "
            f"state, params, noise=noise, {missing[0]}=…)"
        )
    return {name: jnp.asarray(known[name]).astype(jnp.float32) for name in criterion.reads}


def _check_sizes(initial: Any, largest: Any, smallest: Any, multiple_of: Any) -> None:
    sizes = dict(
        initial_batch_size=initial,
        max_batch_size=largest,
        min_batch_size=smallest,
        multiple_of=multiple_of,
    )
    _validate.positive_int("adapt_batch_size", **sizes)
    if any(isinstance(x, jax.Array | jax.core.Tracer) for x in sizes.values()):
        return
    if not smallest <= initial <= largest <= 2**30:
        raise ValueError(
            "adapt_batch_size: need min_batch_size ≤ initial_batch_size ≤ max_batch_size ≤ 2**30, got "
            f"{smallest}, {initial}, {largest}"
        )
    for name in ("initial_batch_size", "max_batch_size"):
        if sizes[name] % multiple_of:
            raise ValueError(
                f"adapt_batch_size: multiple_of={multiple_of} does not divide {name}={sizes[name]}"
            )


def _zero_evidence(criterion: Criterion, params: PyTree) -> PyTree:
    """Zeros of the shapes that the criterion's numerator and denominator have for these parameters."""

    def trial(params: PyTree) -> tuple[PyTree, PyTree]:
        zero = jnp.zeros((), jnp.float32)
        noise = GradientNoise(
            mean=params,
            scatter=zero,
            num_examples=jnp.int32(2),
            num_groups=jnp.int32(2),
            coordinate_scatter=jax.tree.map(lambda p: p.astype(jnp.float32), params),
            inner_product_scatter=zero,
        )
        evidence = criterion.evidence(noise, **dict.fromkeys(criterion.reads, zero))
        return corrected(criterion, evidence, noise)

    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(trial, params))


def _without_masked(noise: GradientNoise, updates: PyTree) -> GradientNoise:
    """Only the coordinates that `optax.masked` lets through: the state knows no others."""

    def is_masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    def select(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda u, x: u if is_masked(u) else x, updates, tree, is_leaf=is_masked)

    if noise.coordinate_scatter is None:
        return noise
    return noise._replace(
        mean=select(noise.mean), coordinate_scatter=select(noise.coordinate_scatter)
    )


def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]).all()
