"""`track_noise_scale`: the noise of the gradient measured in any loop, and nothing decided by it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax import _validate
from adabatch_jax._protocols import by_name
from adabatch_jax._types import PyTree
from adabatch_jax.batch_size._arguments import as_criterion, read_arguments, zero_evidence
from adabatch_jax.batch_size._criteria import norm_test
from adabatch_jax.batch_size._criterion import Criterion
from adabatch_jax.batch_size._decide import Rules, decide
from adabatch_jax.batch_size._run_if import run_if, unmoved
from adabatch_jax.batch_size._sizes import Sizes
from adabatch_jax.batch_size._state import BatchSizeStatus, Decision, SizeMemory, SizeRecord
from adabatch_jax.noise import GradientNoise, merge_noise

_WHERE = "track_noise_scale"
_ANY_SIZE = Sizes(1, 2**30, 1, None, monotone=True, population=None)


class TrackNoiseScaleState(NamedTuple):
    """State of `track_noise_scale`."""

    until_measured: jax.Array  # int32: calls until the next test; 0: this one makes it
    previous_gradient: PyTree  # the one before it; () where `noise=` is passed
    tracked_memory: SizeMemory
    last_tracked_test: SizeRecord

    def report_metrics(self) -> dict[str, Any]:
        """The numbers that `adabatch.metrics` shows."""
        last = self.last_tracked_test
        return {
            "noise_scale": last.noise_scale,
            "required_batch_size": last.required_batch_size,
            "test_status": by_name(BatchSizeStatus, last.test_status),
        }


def track_noise_scale(
    criterion: Criterion | None = None,
    *,
    batch_size: int | None,
    interval: int = 10,
    ema_decay: Any = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Measures the noise scale in a loop as it is, with a batch that stays as it is; nothing is decided.

        optimizer = optax.chain(track_noise_scale(batch_size=64), optimizer)  # one line, to add or take out
        ...
        log(adabatch.metrics(opt_state))  # noise_scale, required_batch_size, test_status

    Two gradients g, g' of successive calls have independent noise, so that

        tr Σ = b ‖g − g'‖² / 2 and ‖∇F‖² = ⟨g, g'⟩, on average,

    if ∇F itself changes little from one to the next. Where it changes by Δ in between, tr Σ comes out too
    large by b ‖Δ‖² / 2: do not trust a noise scale far below b. With `noise=` in `update` (from
    `value_and_grad_noise`) this does not matter: it takes the place of the two gradients.

    Every `interval` calls two gradients are compared; the other calls cost nothing. Updates pass through
    unchanged. Put the link first, before clipping. It sees micro-batches, most of whose pairs belong to the
    same parameters, around `optax.MultiSteps`:
    `optax.chain(track_noise_scale(batch_size=16), optax.MultiSteps(optimizer, 4))`.

    `metrics` shows `noise_scale` (tr Σ / ‖∇F‖²: about the batch size above which further examples bring
    less and less), `required_batch_size` (what the criterion asks for, by the averages) and `test_status`
    (`PASSED`: the present batch is as large as that; `CHANGED`: the criterion would enlarge it).

    Args:
      criterion: a test on tr Σ and ‖∇F‖², such as `norm_test(eta)` or `gradient_noise_scale()`; None:
        `norm_test(1.0)`. Tests by coordinate or inner product need `noise=`.
      batch_size: examples behind each gradient, over all devices. (Under `pmap` and `shard_map` the link
        must see the averaged gradient.) None: every call passes `noise=`, and no gradient is kept.
      interval: calls from one measurement to the next.
      ema_decay: of the averages of tr Σ and ‖∇F‖², each by itself; in [0, 1).

    Returns:
      A `GradientTransformationExtraArgs`. Its state holds one gradient. Under `optax.inject_hyperparams`
      `ema_decay` may be injected; the rest belongs to static_args.

    Raises:
      ValueError: a size or interval that is no positive integer; `ema_decay` outside [0, 1); at trace
        time, a missing `noise=` where `batch_size` is None or the criterion needs it.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from adabatch_jax import metrics
      >>> optimizer = optax.chain(track_noise_scale(batch_size=64, interval=2), optax.sgd(0.0))
      >>> params = jnp.ones(10_000)
      >>> state = optimizer.init(params)
      >>> for key in jax.random.split(jax.random.key(0), 20):  # ‖∇F‖² = 1e4, tr Σ = 64 · 1e4
      ...     gradient = params + jax.random.normal(key, (10_000,))
      ...     _, state = optimizer.update(gradient, state, params)
      >>> bool(abs(metrics(state)["noise_scale"] - 64) < 2)
      True

    Source: McCandlish et al. (2018), arXiv 1812.06162, for the noise scale; successive gradients in the
    place of two batch sizes are ours.
    """
    criterion = norm_test(1.0) if criterion is None else criterion
    if batch_size is not None:
        _validate.positive_int(_WHERE, batch_size=batch_size)
    _validate.positive_int(_WHERE, interval=interval)
    _validate.between(_WHERE, 0.0, 1.0, ema_decay=ema_decay)
    criterion = as_criterion(criterion, True, "ema_decay", ema_decay)
    rules = Rules(criterion, ema_decay, True)

    def of_pair(before: PyTree, now: PyTree) -> GradientNoise:
        def one(gradient: PyTree) -> GradientNoise:
            number = jnp.array(batch_size, jnp.int32)
            return GradientNoise(gradient, jnp.zeros((), jnp.float32), number, jnp.int32(1))

        return merge_noise(one(before), one(now))

    def init(params: PyTree) -> TrackNoiseScaleState:
        _validate.arrays(_WHERE, params=params)
        start = Decision.first(jnp.int32(1), zero_evidence(criterion, params))
        return TrackNoiseScaleState(
            until_measured=jnp.array(interval - 1 if batch_size is None else interval, jnp.int32),
            previous_gradient=() if batch_size is None else jax.tree.map(jnp.zeros_like, params),
            tracked_memory=start.size_memory,
            last_tracked_test=start.last_size_test,
        )

    def update(
        updates: PyTree,
        state: TrackNoiseScaleState,
        params: PyTree | None = None,
        *,
        noise: GradientNoise | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, TrackNoiseScaleState]:
        del params
        if noise is None and batch_size is None:
            raise ValueError(
                f"{_WHERE}: batch_size=None: every call must pass noise=noise, from value_and_grad_noise"
            )
        read = read_arguments(criterion, extra_args)
        due = state.until_measured == 0
        # The gradient before the one that is measured is kept, and no other.
        wanted = due if noise is not None else due | (state.until_measured == 1)

        def look(
            turn: jax.Array, old: TrackNoiseScaleState
        ) -> tuple[tuple[()], TrackNoiseScaleState]:
            now, given, told = unmoved((updates, noise, read), turn)
            found = of_pair(old.previous_gradient, now) if given is None else given
            size = jnp.asarray(batch_size if given is None else given.num_examples, jnp.int32)
            before = Decision(size, old.tracked_memory, old.last_tracked_test)
            after = decide(rules, _ANY_SIZE, None, found, told, before)
            kept = optax.tree.where(due, after, before)
            return (), old._replace(
                previous_gradient=now if given is None else old.previous_gradient,
                tracked_memory=kept.size_memory,
                last_tracked_test=kept.last_size_test,
            )

        _, state = run_if(wanted, look, (), state)
        until = jnp.where(due, interval, state.until_measured) - 1
        return updates, state._replace(until_measured=until.astype(jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)
