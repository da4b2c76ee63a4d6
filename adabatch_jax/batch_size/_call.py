"""One call of the drop-in: what its gradient, loss and count say, and whether it completes a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax._axes import checked_axes, shared_axis, to_varying
from adabatch_jax._tree import align, squared_norm, trainable, widen
from adabatch_jax._types import PyTree
from adabatch_jax.batch_size._arguments import as_scalar
from adabatch_jax.batch_size._state import AdaptBatchSizeState
from adabatch_jax.noise import GradientNoise, pool_noise, squared_gaps

_WHERE = "adaptive_multi_steps"


class Call(NamedTuple):
    """One micro-batch, merged over the devices. What is not finite has no examples."""

    noise: GradientNoise  # of the trained leaves, a list
    frozen: list[jax.Array]  # mean gradients of the leaves that are not trained, but looked at
    loss: jax.Array  # float32
    offered: jax.Array  # int32: examples behind the call, those that are skipped included
    skipped: jax.Array  # int32: devices whose part is skipped
    gaps: list[jax.Array] | None = None  # from the gathered mean, squared, leaf by leaf, if known


def measure_call(
    trained: list[jax.Array],
    frozen: list[jax.Array],
    value: Any,
    num_examples: Any,
    *,
    gathered: list[jax.Array],
    measure: jax.Array,
    coordinate_wise: bool,
    axes: tuple[str, ...],
) -> Call:
    """The micro-batch as one group, or one per device; those that are not finite have no examples.

    The distance from the `gathered` mean of the trained leaves, which the scatter needs, tells of NaN, inf
    and exploding entries as well as the length does: one reading of the gradient less. Without `measure`,
    and on several devices, it is the length.
    """
    checked = checked_axes(axes)
    same = shared_axis(trained, checked)
    if trained and same is not None:
        raise ValueError(
            f"{_WHERE}: the gradient is the same on all devices of axis {same!r}, so "
            "the noise between them cannot be seen: inside shard_map cast the parameters with "
            f"jax.lax.pcast(params, {same!r}, to='varying') before differentiating, and do not "
            "average the gradient"
        )
    loss, size = _float32(value), _count(num_examples)
    wide, beside = widen(trained), widen(frozen)
    gaps = None
    if not axes:
        lengths = lambda _, new: [squared_norm(x) for x in new]
        gaps = jax.lax.cond(measure, squared_gaps, lengths, gathered, wide)
    length = squared_norm(wide) if gaps is None else sum(gaps, start=jnp.float32(0))
    # The loss too: a label out of range makes it NaN and leaves a gradient that looks like any other.
    finite = trainable(length + squared_norm(beside)) & jnp.isfinite(loss)
    held = jnp.where(finite, size, 0)
    alone = GradientNoise(
        mean=wide,  # NaN and all: a merge ignores a side without examples
        scatter=jnp.zeros((), jnp.float32),
        num_examples=held,
        num_groups=(held > 0).astype(jnp.int32),
        coordinate_scatter=[jnp.zeros(g.shape, jnp.float32) for g in wide]
        if coordinate_wise
        else None,
    )
    skipped = (~finite & (size > 0)).astype(jnp.int32)
    if not axes:
        return Call(alone, beside, loss, size, skipped, gaps)

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.psum(to_varying(x, checked), axes)

    pooled, both = pool_noise(alone, jnp.stack([loss]), total)
    n, all_n = (x.astype(jnp.float32) for x in (held, jnp.maximum(pooled.num_examples, 1)))

    def average(x: jax.Array) -> jax.Array:
        weighted = jnp.where(align(n, x) > 0, align(n, x) * x, jnp.zeros_like(x))
        return total(weighted) / align(all_n, x)

    return Call(pooled, [average(x) for x in beside], both[0], total(size), total(skipped))


def given_call(
    noise: GradientNoise, frozen: list[jax.Array], value: Any, measure: jax.Array
) -> Call:
    """The noise that the caller measured; as if it had no examples where it is not finite.

    Without `measure` the scatter need not have been measured.
    """
    loss, beside = _float32(value), widen(frozen)
    size = _count(noise.num_examples)
    finite = trainable(squared_norm([noise.mean, beside])) & jnp.isfinite(loss)
    finite &= jnp.isfinite(noise.scatter) | ~measure
    kept = noise._replace(
        mean=widen(noise.mean),
        num_examples=jnp.where(finite, size, 0),
        num_groups=jnp.where(finite, noise.num_groups, 0).astype(jnp.int32),
    )
    return Call(kept, beside, loss, size, (~finite).astype(jnp.int32))


def is_complete(
    joint: GradientNoise,
    controller: AdaptBatchSizeState,
    call: Any,
    measure: jax.Array,
    *,
    told: bool,
) -> jax.Array:
    """Whether these examples make a batch; `call`: examples that the next call will bring.

    Where the calls tell their sizes nothing else keeps a batch from being one call, which shows no noise.
    A batch that one more call would carry beyond the largest size ends here.
    """
    examples = joint.num_examples
    complete = examples >= controller.next_batch_size
    if told:
        complete &= (joint.num_groups > 1) | ~measure
    return complete | ((examples > 0) & (examples + call > controller.largest_batch_size))


def check_call(
    updates: PyTree, gathered: GradientNoise, noise: GradientNoise | None, told: dict[str, Any]
) -> None:
    """Refuses, while tracing, what could only fail later and further inside.

    Args:
      updates: the gradient of the call.
      gathered: what the wrapper has gathered, in the structure of the parameters that `init` saw.
      noise: as given to `update`.
      told: the other arguments of the call, by name; None where one was not given.
    """
    _check_gradient(updates, gathered.mean)
    for name in ("value", "num_examples"):
        if told[name] is not None:
            as_scalar(_WHERE, name, told[name])
    if told["batch_size"] is not None:
        raise ValueError(
            f"{_WHERE}: batch_size= would overrule what the links inside are told of the whole batch: "
            "give num_examples=, the examples (or tokens) behind this call, which are added up"
        )
    if noise is None:
        if told["num_examples"] is None and told["micro_batch_size"] is None:
            raise ValueError(
                f"{_WHERE}: micro_batch_size=None: every call must tell what stands behind its gradient, "
                "by num_examples= (examples, or tokens) or by noise="
            )
        return
    if told["num_examples"] is not None:
        raise ValueError(
            f"{_WHERE}: noise.num_examples says already what stands behind the call: leave num_examples= "
            "out, and give value_and_grad_noise the sizes= of groups that hold unequal numbers"
        )
    if not _alike(noise.mean, updates):
        raise ValueError(
            f"{_WHERE}: noise.mean has another structure than the gradient: hand in noise.mean as the "
            "gradient. Inside optax.masked or optax.partition only a part of it arrives: put "
            f"{_WHERE} around them"
        )
    if gathered.coordinate_scatter is not None and noise.coordinate_scatter is None:
        raise ValueError(
            f"{_WHERE}: coordinate_wise=True, but noise= has no coordinate_scatter: measure it with "
            "value_and_grad_noise(..., coordinate_wise=True)"
        )


def check_first_batch(first: Any, micro: int, devices: int, least: int) -> None:
    """Refuses a first batch that is not whole calls, or fewer groups than `least`; a traced one passes."""
    if _validate.is_traced(first) or jnp.ndim(first):
        return
    first, step = int(first), micro * devices
    over = f"micro_batch_size={micro}" + (f" on {devices} devices" if devices > 1 else "")
    if first % step:
        raise ValueError(f"{_WHERE}: {over} does not divide initial batch size {first}")
    groups = first // micro
    if groups < least:
        raise ValueError(
            f"{_WHERE}: {over} leaves a first batch of {first} examples with {groups} "
            "group, and noise shows only between two or more: use a smaller micro_batch_size or pass "
            "noise= from value_and_grad_noise"
        )


def _check_gradient(updates: PyTree, like: PyTree) -> None:
    if not _alike(updates, like):
        path, got, had = _first_difference(updates, like)
        raise ValueError(
            f"{_WHERE}: at {path} the gradient has {got} and the parameters given to init have {had}: hand "
            "init what is differentiated and nothing else, of an Equinox model "
            "eqx.filter(model, eqx.is_inexact_array)"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(like), strict=True)
    for (keys, gradient), parameter in pairs:
        if jnp.shape(gradient) != jnp.shape(parameter):
            place = jax.tree_util.keystr(keys) or "the top"
            raise ValueError(
                f"{_WHERE}: at {place} the gradient has shape {jnp.shape(gradient)} and the parameter "
                f"given to init has {jnp.shape(parameter)}"
            )


def _alike(a: PyTree, b: PyTree) -> bool:
    """Whether two trees have the same structure."""
    one: Any = jax.tree.structure(a)
    return bool(one == jax.tree.structure(b))


def _first_difference(updates: PyTree, like: PyTree) -> tuple[str, str, str]:
    """Where two trees part, and what either has there, in words."""

    def by_path(tree: PyTree) -> dict[str, Any]:
        pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
        return {jax.tree_util.keystr(path): leaf for path, leaf in pairs}

    ours, theirs = by_path(updates), by_path(like)
    for path in [*theirs, *ours]:
        a, b = ours.get(path), theirs.get(path)
        if (a is None) != (b is None):
            got, had = ("nothing" if x is None else f"shape {jnp.shape(x)}" for x in (a, b))
            return path or "the top", got, had
    return "the top", type(updates).__name__, type(like).__name__


def _float32(value: Any) -> jax.Array:
    return jnp.zeros((), jnp.float32) if value is None else jnp.asarray(value).astype(jnp.float32)


def _count(number: Any) -> jax.Array:
    """As int32 ≥ 0; a count of tokens may be a float, as a sum of weights is. NaN counts nothing."""
    number = jnp.asarray(number)
    if jnp.issubdtype(number.dtype, jnp.floating):
        number = jnp.where(jnp.isnan(number), jnp.zeros_like(number), jnp.round(number))
    return jnp.maximum(number, jnp.zeros_like(number)).astype(jnp.int32)
