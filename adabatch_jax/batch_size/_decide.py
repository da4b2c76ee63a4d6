"""One test of the batch size: from the noise of a gradient to the next batch size, as pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adabatch_jax._types import PyTree
from adabatch_jax.batch_size._arguments import only_trained
from adabatch_jax.batch_size._criterion import Criterion, corrected, of_population
from adabatch_jax.batch_size._sizes import Sizes
from adabatch_jax.batch_size._state import BatchSizeStatus, Decision, SizeMemory, SizeRecord
from adabatch_jax.noise import GradientNoise

_DISPLAY_DECAY = 0.9  # of the noise scale that `metrics` reports; no decision hangs on it


@dataclass(frozen=True)
class Rules:
    """How a test judges: arguments of `adapt_batch_size`. `Sizes` has those about the sizes themselves."""

    criterion: Criterion
    ema_decay: Any
    debias: bool

    @property
    def ignores_noise(self) -> bool:
        """Whether the batch size does not depend on the noise, which need not have been measured."""
        return not self.criterion.uses_noise


class Usable(NamedTuple):
    """Whether the evidence may move anything: bool scalars, all of which must hold."""

    enough: Any  # at least two groups
    finite: jax.Array
    signal: Any  # the gradient is not exactly zero

    @property
    def all(self) -> jax.Array:
        """Whether it may."""
        return self.enough & self.finite & self.signal

    def status(self, moved: jax.Array) -> jax.Array:
        """`BatchSizeStatus` of a test after which the size `moved`, int32."""
        status = jnp.where(moved, BatchSizeStatus.CHANGED, BatchSizeStatus.PASSED)
        status = jnp.where(self.signal, status, BatchSizeStatus.ZERO_GRADIENT)
        status = jnp.where(self.finite, status, BatchSizeStatus.NOT_FINITE)
        status = jnp.where(self.enough, status, BatchSizeStatus.TOO_FEW_GROUPS)
        return status.astype(jnp.int32)


def decide(
    rules: Rules,
    sizes: Sizes,
    trained: PyTree | None,
    noise: GradientNoise,
    read: dict[str, jax.Array],
    before: Decision,
    square: jax.Array | None = None,
) -> Decision:
    """The test: what follows from the noise of one gradient.

    Args:
      rules: how it judges.
      sizes: the sizes that it may choose.
      trained: bools like the parameters: those of a coordinate-wise test. None: all.
      noise: of the gradient.
      read: what the criterion reads besides.
      before: the fields of the state that a test changes.
      square: ‖ḡ‖² of that noise, where the caller has it: XLA does not see that it is the same, and over
        shards of the gradient it is a sum over devices.

    Returns:
      The same after the test.

    Raises:
      ValueError: the criterion gives no scalar.
    """
    criterion, (size, memory, last) = rules.criterion, before
    evidence = criterion.evidence(noise, **read)
    square = noise.squared_norm if square is None else square
    examples = jnp.maximum(jnp.asarray(noise.num_examples).astype(jnp.float32), 1.0)
    left = jnp.float32(1.0)
    if sizes.population is not None:
        left = jnp.maximum(sizes.population - examples, 0.0) / sizes.population
    new = corrected(criterion, evidence, noise, debias=rules.debias, population=left)
    usable = _usable(rules, noise, square, evidence)

    ema, weight, averaged = _averaged(rules.ema_decay, usable.all, memory, new)
    if trained is not None and criterion.coordinate_wise:
        averaged = tuple(only_trained(tree, trained) for tree in averaged)
    numerator, denominator = criterion.summarize(*averaged)
    required = criterion.required(numerator, denominator)
    if required.shape != ():
        raise ValueError(
            f"adapt_batch_size: {criterion.name} must give a scalar, got shape {required.shape}"
        )
    if sizes.population is not None:
        required = of_population(required, sizes.population)
    usable = usable._replace(finite=usable.finite & ~jnp.isnan(required))

    way_out = None if sizes.monotone or rules.ignores_noise else two_groups(noise, square, size)
    moved, least = next_size(sizes, size, required, memory.two_group_examples, usable.all, way_out)
    shown = jnp.stack([noise.trace, square - left * noise.trace / examples])

    def kept(x: Any, old: jax.Array) -> jax.Array:
        return jnp.where(usable.all, jnp.asarray(x).astype(old.dtype), old)

    return Decision(
        next_batch_size=moved.astype(jnp.int32),
        size_memory=SizeMemory(ema, weight, least),
        last_size_test=SizeRecord(
            display_ema=kept(_displayed(rules, shown, last), last.display_ema),
            test_numerator=kept(numerator, last.test_numerator),
            test_denominator=kept(denominator, last.test_denominator),
            test_degrees_of_freedom=kept(
                0 if rules.ignores_noise else jnp.asarray(noise.num_groups) - 1,
                last.test_degrees_of_freedom,
            ),
            required_batch_size=kept(required, last.required_batch_size),
            test_status=usable.status(moved != size),
            skipped_tests=jnp.where(
                usable.all, last.skipped_tests, optax.safe_increment(last.skipped_tests)
            ),
        ),
    )


class WayOut(NamedTuple):
    """From a batch that came as one group: it has no variance, and no test would ever count again."""

    pair: jax.Array  # int32: examples of two groups as large as these
    needed: jax.Array  # bool: there is one group, and two would be a larger batch


def two_groups(noise: GradientNoise, square: jax.Array, size: jax.Array) -> WayOut:
    """The way out for this noise, the squared length of its mean, and the present batch size."""
    groups = jnp.asarray(noise.num_groups)
    pair = 2 * -(-jnp.clip(noise.num_examples, 1, 2**29) // jnp.maximum(groups, 1))
    pair = pair.astype(jnp.int32)
    return WayOut(pair, (groups == 1) & jnp.isfinite(square) & (square > 0) & (pair > size))


def next_size(
    sizes: Sizes,
    size: jax.Array,
    required: jax.Array,
    least: jax.Array,
    usable: jax.Array,
    way_out: WayOut | None,
) -> tuple[jax.Array, jax.Array]:
    """The next batch size, and the least one from then on, both int32.

    Args:
      sizes: the sizes that may be chosen.
      size: the present one, int32.
      required: what the criterion asks for, float32.
      least: the least one so far, int32.
      usable: whether `required` counts.
      way_out: for a batch that may shrink. Two groups are then the least until groups are smaller.
    """
    if way_out is None:
        return jnp.where(usable, sizes.after(size, required, least), size), least
    pair, needed = way_out
    least = jnp.where(usable, jnp.minimum(least, pair), least)
    least = jnp.where(needed, jnp.maximum(least, pair), least)
    moved = jnp.where(usable, sizes.after(size, required, least), size)
    return jnp.where(needed, sizes.rounded(jnp.minimum(pair, sizes.largest)), moved), least


def _usable(rules: Rules, noise: GradientNoise, square: jax.Array, evidence: PyTree) -> Usable:
    """Of the evidence of one gradient, whose mean has this squared length."""
    if rules.ignores_noise:
        return Usable(True, _all_finite(evidence), True)
    # tr Σ is NaN, too, where a scatter is below 0: it was not measured.
    known = _all_finite((evidence, square, noise.trace))
    return Usable(jnp.asarray(noise.num_groups) > 1, known, square > 0)


def _averaged(
    ema_decay: Any, usable: jax.Array, memory: SizeMemory, new: PyTree
) -> tuple[PyTree, jax.Array, PyTree]:
    """The running averages and their weight with the `new` evidence, and the averages to decide by."""
    ema, weight = memory.evidence_ema, memory.evidence_weight
    if ema_decay is None:
        return ema, weight, new
    decay = jnp.minimum(jnp.asarray(ema_decay, jnp.float32), 1.0 - 1e-6)
    weight = jnp.where(usable, decay * weight + (1 - decay), weight)
    ema = _blend(usable, decay, ema, new)
    start = jnp.where(weight > 0, weight, 1.0)
    return ema, weight, jax.tree.map(lambda e: e / start, ema)


def _blend(usable: jax.Array, decay: jax.Array, ema: PyTree, new: PyTree) -> PyTree:
    """The average with one more; the old one where that is not `usable`.

    Behind a condition, or XLA's CPU compiler writes what `usable` is made of, every leaf, into every leaf.
    """

    def blended(decay: jax.Array, ema: PyTree, new: PyTree) -> PyTree:
        return jax.tree.map(lambda e, x: decay * e + (1 - decay) * x, ema, new)

    return jax.lax.cond(usable, blended, lambda _, ema, __: ema, decay, ema, new)


def _displayed(rules: Rules, shown: jax.Array, last: SizeRecord) -> jax.Array:
    """The running average for display with what this gradient has `shown`."""
    keep = jnp.where(last.display_ema[0] > 0, jnp.float32(_DISPLAY_DECAY), 0.0)
    mean = keep * last.display_ema + (1 - keep) * shown
    if rules.ignores_noise:  # it need not have been measured
        mean = jnp.where(jnp.all(jnp.isfinite(mean)), mean, last.display_ema)
    return mean


def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]).all()
