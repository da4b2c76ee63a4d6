"""What `adapt_batch_size` is given: a criterion, the noise, and what the criterion reads besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adabatch_jax._types import PyTree
from adabatch_jax.batch_size._criterion import Criterion, Evidence, corrected
from adabatch_jax.noise import GradientNoise


def as_criterion(
    criterion: Criterion | Callable[[GradientNoise], Any], debias: bool, name: str, ema_decay: Any
) -> Criterion:
    """A criterion that fits `debias` and the decay called `name`; a plain function becomes one.

    Raises:
      ValueError: it does not.
    """
    if isinstance(criterion, Criterion):
        averaged = isinstance(ema_decay, int | float) and ema_decay > 0
        if averaged and criterion.needs_debias and not (debias or criterion.debias):
            raise ValueError(
                f"adapt_batch_size: with {name}={ema_decay!r} and without debias=True, {criterion.name} "
                "never asks for a larger batch at a threshold of 1 or more, since the average of ‖ḡ‖² "
                f"holds tr Σ / b, too: add debias=True, or lower the threshold, or leave {name} out"
            )
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


def one_ema_decay(ema_decay: Any, smoothing: Any) -> tuple[str, Any]:
    """The decay of the average, and the name under which it was given.

    Raises:
      ValueError: it was given under both.
    """
    if smoothing is None:
        return "ema_decay", ema_decay
    if ema_decay is not None:
        raise ValueError(
            "adapt_batch_size: smoothing is another name of ema_decay: give one of them, got "
            f"ema_decay={ema_decay!r} and smoothing={smoothing!r}"
        )
    return "smoothing", smoothing


def read_arguments(criterion: Criterion, known: dict[str, Any]) -> dict[str, jax.Array]:
    """The extra arguments that the criterion reads, float32 scalars.

    Raises:
      ValueError: one is missing, or is no scalar.
    """
    found = {}
    for name in criterion.reads:
        x = known.get(name)
        if x is None:
            raise ValueError(
                f"adapt_batch_size: {criterion.name} reads {name}=: call optimizer.update(gradient, "
                f"state, params, noise=noise, {name}=…)"
            )
        found[name] = as_scalar("adapt_batch_size", name, x)
    return found


def as_scalar(where: str, name: str, x: Any) -> jax.Array:
    """An extra argument as a float32 scalar, traced or not.

    Raises:
      ValueError: it has another shape, or is no number.
    """
    leaf = jax.tree_util.all_leaves([x])
    if not leaf or jnp.shape(x) != ():
        kind = f"shape {jnp.shape(x)}" if leaf else f"a {type(x).__name__}"
        hint = ", the mean over examples, without aux" if name == "value" else ""
        raise ValueError(f"{where}: {name}= must be a scalar{hint}, got {kind}")
    return jnp.asarray(x).astype(jnp.float32)


def zero_evidence(criterion: Criterion, params: PyTree) -> PyTree:
    """Zeros of the shapes that the criterion's numerator and denominator have for these parameters."""

    def trial(params: PyTree) -> tuple[PyTree, PyTree]:
        zero = jnp.zeros((), jnp.float32)
        noise = GradientNoise(
            mean=params,
            scatter=zero,
            num_examples=jnp.int32(2),
            num_groups=jnp.int32(2),
            coordinate_scatter=jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
            inner_product_scatter=zero,
        )
        evidence = criterion.evidence(noise, **dict.fromkeys(criterion.reads, zero))
        return corrected(criterion, evidence, noise)

    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(trial, params))


def let_through(noise: GradientNoise, updates: PyTree, criterion: Criterion) -> GradientNoise:
    """The noise of what `optax.masked` or `optax.partition` lets through, where it can be told.

    tr Σ of a part is the sum of `coordinate_scatter` over it. Without that, or for inner products, which
    were taken over the whole gradient, noise and mean stay those of the whole gradient, as far as it is
    not zero where it is masked.

    Raises:
      ValueError: the noise is of other parameters than the updates.
    """
    hidden = any(map(_is_masked, jax.tree.leaves(updates, is_leaf=_is_masked)))
    if noise.coordinate_scatter is None or not (hidden or criterion.coordinate_wise):
        return noise
    if noise.inner_product_scatter is not None and not criterion.coordinate_wise:
        return noise

    def select(tree: PyTree) -> PyTree:
        def one(u: Any, x: Any) -> Any:
            if not _is_masked(u) and jnp.shape(x) != jnp.shape(u):
                raise ValueError(f"shape {jnp.shape(x)} for {jnp.shape(u)}")
            return u if _is_masked(u) else x

        return jax.tree.map(one, updates, tree, is_leaf=_is_masked)

    try:
        mean, scatter = select(noise.mean), select(noise.coordinate_scatter)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "adapt_batch_size: noise= is of another structure than the updates: hand in the noise of "
            "all parameters, with noise.mean as the updates; what optax.masked or optax.partition hides "
            f"is left out here ({error})"
        ) from error
    if not hidden:
        return noise
    total = sum((jnp.sum(x) for x in jax.tree.leaves(scatter)), start=jnp.float32(0))
    return noise._replace(mean=mean, coordinate_scatter=scatter, scatter=total)


def only_trained(tree: PyTree, trained: PyTree) -> PyTree:
    """The tree with nothing in the place of parameters that are not `trained`."""
    return jax.tree.map(lambda keep, x: x if keep else optax.MaskedNode(), trained, tree)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
