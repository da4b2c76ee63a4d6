"""Flax nnx: gradient and noise of a model as it is, with its random streams and running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adabatch_jax import batch_size, noise as noise_room
from adabatch_jax._axes import axis_tuple
from adabatch_jax._types import LossFn, PyTree

__all__ = ["unless_skipped", "value_and_grad_noise"]


def value_and_grad_noise(
    loss_fn: LossFn,
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    sum_aux: PyTree = False,
    **options: Any,
) -> Callable[..., Any]:
    """`adabatch_jax.value_and_grad_noise` for an nnx model: the fused form, model straight in.

    Splits the model, puts it together again for every group, and afterwards changes it in place as one
    training step of nnx would:

    * Dropout: every group has keys of its own, split from the model's streams, whose counts advance
      once per call. With `axis_name` every device has its own, too.
    * Batch normalisation: every group is normalised by itself, and running statistics become the mean,
      weighted by examples, of those that the groups would leave behind.
    * Any other variable that the loss changes: floats as the statistics, the rest as the first group
      leaves it, so that a counter advances by one. What is not changed costs nothing. A variable that the
      loss adds, such as `nnx.Intermediate`, is dropped: return it as aux.

    In the drop-in form nothing of this is needed: `nnx.value_and_grad`, then
    `optimizer.update(model, grads, value=value)`; see `unless_skipped`.

    Args:
      loss_fn: `loss_fn(model, group, *args)`, the mean loss of one group, or `(loss, aux)` with `has_aux`.
      wrt: filter of the variables that are trained, that of your `nnx.Optimizer`.
      has_aux: as in `adabatch_jax.value_and_grad_noise`; running statistics are no aux.
      sum_aux: as there.
      **options: passed on: `axis_name`, `vectorize`, `lanes`, `coordinate_wise`, `inner_products`.

    Returns:
      A function `fn(model, groups, *args, count=None, sizes=None, measure=None)` as there, to be called
      inside `nnx.jit`; `noise.mean` is a gradient as `nnx.grad` gives it. Both go into
      `optimizer.update(model, noise.mean, value=value, noise=noise)`.

    Raises:
      ValueError: as `adabatch_jax.value_and_grad_noise`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import adabatch_jax as adabatch
      >>> model = nnx.Sequential(nnx.Linear(1, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
      ...                        nnx.Dropout(0.1, rngs=nnx.Rngs(1)), nnx.Linear(4, 1, rngs=nnx.Rngs(2)))
      >>> controller = adabatch.adapt_batch_size(
      ...     adabatch.norm_test(0.5), initial_batch_size=8, max_batch_size=64)
      >>> optimizer = nnx.Optimizer(model, optax.chain(controller, optax.adam(0.01)), wrt=nnx.Param)
      >>> fn = value_and_grad_noise(lambda model, x: jnp.mean((model(x) - 1.0) ** 2))
      >>> @nnx.jit
      ... def step(model, optimizer, groups):
      ...     count = adabatch.get_batch_size(optimizer.opt_state) // 4
      ...     value, noise = fn(model, groups, count=count)
      ...     optimizer.update(model, noise.mean, value=value, noise=noise)
      ...     return value
      >>> value = step(model, optimizer, adabatch.split_groups(jnp.arange(64.0)[:, None], 16))
      >>> int(optimizer.step[...]), int(adabatch.metrics(optimizer.opt_state)["num_examples"])
      (1, 8)

    Source: ours.
    """
    axes, num_axes = axis_tuple(options.get("axis_name")), 2 if options.get("lanes") else 1
    rest_only = nnx.Not(nnx.Any(wrt, nnx.RngState))

    def fn(
        model: Any,
        groups: PyTree,
        *args: Any,
        count: Any = None,
        sizes: Any = None,
        measure: Any = None,
    ) -> Any:
        graphdef, params, *others = nnx.split(model, wrt, nnx.RngKey, nnx.RngCount, ...)
        keys, counts, rest = nnx.as_pure(others)
        before = _by_path(rest)
        # A stream gives its next key, which is split, and counts one more, as `nnx.split_rngs` does.
        leading = jnp.shape(jax.tree.leaves(groups)[0])[:num_axes]
        streams = zip(*map(jax.tree.leaves, (keys, counts)), strict=True)
        split = [_split(key, count, leading, axes) for key, count in streams]
        split = jax.tree.unflatten(jax.tree.structure(keys), split)
        nnx.update(model, jax.tree.map(lambda x: x + 1, counts))

        def loss(params: PyTree, group: PyTree, rest: PyTree, *args: Any) -> Any:
            data, keys = group
            from_zero = jax.tree.map(jnp.zeros_like, counts)
            # With variables of its own: those of the model belong to the trace outside of the loop.
            copied = nnx.merge(graphdef, params, keys, from_zero, rest, copy=True)
            out = loss_fn(copied, data, *args)
            value, aux = out if has_aux else (out, None)
            old, new = _by_path(rest), _by_path(nnx.state(copied, rest_only))
            return value, (aux, {k: x for k, x in new.items() if k in old and x is not old[k]})

        measured = noise_room.value_and_grad_noise(
            loss, has_aux=True, sum_aux=(sum_aux, False), **options
        )
        (value, (aux, changed)), noise = measured(
            params, (groups, split), rest, *args, count=count, sizes=sizes, measure=measure
        )
        some = noise.num_examples > 0  # of no examples aux is 0
        after = {
            k: jnp.where(some, changed[k], x) if k in changed else x for k, x in before.items()
        }
        nnx.update(model, jax.tree.unflatten(jax.tree.structure(rest), after.values()))
        return ((value, aux) if has_aux else value), noise

    return fn


@contextmanager
def unless_skipped(model: Any, optimizer: nnx.Optimizer[Any]) -> Iterator[None]:
    """Keeps running statistics clean: what the model collects in the block counts unless it is skipped.

    `adaptive_multi_steps` leaves a micro-batch with NaN or inf out of the gradient, but the model has
    seen it: statistics of batch normalisation would stay NaN for ever. Put the two lines of an unchanged
    step into such a block. If `optimizer.update` skipped the micro-batch, all variables but the trained
    ones and the random streams are then as they were before the block.

    Args:
      model: an nnx module.
      optimizer: the `nnx.Optimizer` that is updated in the block.

    Returns:
      A context manager; inside or outside of `nnx.jit`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import adabatch_jax as adabatch
      >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> controller = adabatch.adapt_batch_size(
      ...     adabatch.norm_test(0.5), initial_batch_size=8, max_batch_size=64)
      >>> tx = adabatch.adaptive_multi_steps(
      ...     optax.chain(controller, optax.sgd(0.1)), micro_batch_size=4)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     with unless_skipped(model, optimizer):
      ...         value, grads = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
      ...         optimizer.update(model, grads, value=value)
      >>> step(model, optimizer, jnp.array([[1.0], [2.0], [jnp.nan], [4.0]]))
      >>> float(model.mean[0])
      0.0

    Source: ours; see `adabatch_jax.unless_skipped`.
    """
    others = nnx.Not(nnx.Any(optimizer.wrt, nnx.RngState))
    before = _by_path(nnx.state(model, others))
    yield
    state = nnx.state(model, others)
    after = _by_path(state)
    old = {k: before.get(k, x) for k, x in after.items()}
    kept = batch_size.unless_skipped(optimizer.opt_state, after, old)
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(nnx.as_pure(state)), kept.values()))


def _by_path(state: nnx.State) -> dict[str, Any]:
    """The arrays of a state by their path, in the order of its leaves."""
    leaves = jax.tree.leaves_with_path(nnx.as_pure(state))
    return {jax.tree_util.keystr(path): x for path, x in leaves}


def _split(
    keys: jax.Array, counts: jax.Array, leading: tuple[int, ...], axes: tuple[str, ...]
) -> jax.Array:
    """Keys [*leading, …] for the groups, from the streams of [stacked] layers; others on every device."""

    def one(key: jax.Array, count: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, count)
        key = jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key
        return jax.random.split(key, leading)

    for _ in range(keys.ndim):
        one = jax.vmap(one, out_axes=len(leading))
    return one(keys, counts)
