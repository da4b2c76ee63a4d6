"""Equinox: models whose leaves are not all arrays, handed over as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import optax

from adabatch_jax import noise as noise_room
from adabatch_jax._types import LossFn, PyTree

__all__ = ["for_models", "value_and_grad_noise"]


def value_and_grad_noise(
    loss_fn: LossFn, *, filter_spec: PyTree = eqx.is_inexact_array, **options: Any
) -> Callable[..., Any]:
    """`adabatch_jax.value_and_grad_noise` for an Equinox model: the fused form, model straight in.

    As `eqx.filter_value_and_grad`: the gradient is that of all floating-point arrays, and whatever else
    the model holds, an activation function, say, reaches the loss as it is.

    Dropout: make the keys a leaf of `groups`, `jax.random.split(key, num_groups)`, one for each group.

    Batch normalisation: hand the `eqx.nn.State` over behind the groups and return the new one as aux:
    `loss_fn(model, group, state) -> (loss, state)` with `has_aux=True`. Every group is normalised by
    itself. The statistics that come back are the mean, weighted by examples, of those that the groups
    leave behind; counters and flags are those of the first. Equinox makes its counters weakly typed, and
    what a loop over groups returns has no weak type: begin with
    `state = jax.tree.map(lambda x: x.astype(x.dtype), state)`, or the second step is compiled once more.

    Args:
      loss_fn: `loss_fn(model, group, *args)`, the mean loss of one group, or `(loss, aux)` with `has_aux`.
      filter_spec: which leaves are trained: a function of a leaf, or a pytree of bools like the model, or a
        prefix of it, as in `eqx.partition`.
      **options: passed on: `has_aux`, `sum_aux`, `axis_name`, `vectorize`, `lanes`, `coordinate_wise`,
        `inner_products`.

    Returns:
      A function `fn(model, groups, *args, count=None, sizes=None, measure=None)` as there. `noise.mean` is
      the gradient, a model with None where nothing is trained.

    Raises:
      ValueError: as `adabatch_jax.value_and_grad_noise`.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, optax
      >>> import adabatch_jax as adabatch
      >>> model = eqx.nn.MLP(1, 1, 4, 1, key=jax.random.key(0))  # holds jax.nn.relu
      >>> fn = value_and_grad_noise(lambda model, x: jnp.mean((jax.vmap(model)(x) - 1.0) ** 2))
      >>> controller = adabatch.adapt_batch_size(
      ...     adabatch.norm_test(0.5), initial_batch_size=8, max_batch_size=64)
      >>> optimizer = for_models(optax.chain(controller, optax.adam(0.01)))
      >>> opt_state = optimizer.init(model)
      >>> @eqx.filter_jit
      ... def step(model, opt_state, groups):
      ...     count = adabatch.get_batch_size(opt_state) // 4
      ...     value, noise = fn(model, groups, count=count)
      ...     updates, opt_state = optimizer.update(noise.mean, opt_state, model, value=value, noise=noise)
      ...     return eqx.apply_updates(model, updates), opt_state, value
      >>> groups = adabatch.split_groups(jnp.arange(64.0)[:, None], 16)
      >>> model, opt_state, value = step(model, opt_state, groups)
      >>> int(adabatch.metrics(opt_state)["num_examples"])
      8

    Source: ours.
    """

    def fn(model: Any, groups: PyTree, *args: Any, **told: Any) -> Any:
        params, static = eqx.partition(model, filter_spec)
        dynamic, fixed = eqx.partition(args, eqx.is_array)

        def loss(params: PyTree, group: PyTree, *dynamic: Any) -> Any:
            # Joined anew in every trace: a layer invalidates the `eqx.nn.State` that it is given.
            return loss_fn(eqx.combine(params, static), group, *eqx.combine(dynamic, fixed))

        return noise_room.value_and_grad_noise(loss, **options)(params, groups, *dynamic, **told)

    return fn


def for_models(
    optimizer: optax.GradientTransformation, *, filter_spec: PyTree = eqx.is_inexact_array
) -> optax.GradientTransformationExtraArgs:
    """The optimizer for Equinox models as they are: it looks at the trained arrays alone.

    `init(model)` and `update(grads, state, model, value=loss)` filter the model, as
    `eqx.filter(model, eqx.is_inexact_array)` by hand would. Put it outermost. The optimizer state is that
    of `optimizer`, and `get_batch_size` and `metrics` read it.

    Args:
      optimizer: any Optax transformation, such as `adaptive_multi_steps(...)`.
      filter_spec: which leaves are trained, as in `eqx.partition`.

    Returns:
      A `GradientTransformationExtraArgs`.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, optax
      >>> import adabatch_jax as adabatch
      >>> model = eqx.nn.MLP(1, 1, 4, 1, key=jax.random.key(0))
      >>> controller = adabatch.adapt_batch_size(
      ...     adabatch.norm_test(0.5), initial_batch_size=8, max_batch_size=64)
      >>> optimizer = for_models(adabatch.adaptive_multi_steps(
      ...     optax.chain(controller, optax.adam(0.01)), micro_batch_size=4))
      >>> opt_state = optimizer.init(model)
      >>> @eqx.filter_jit
      ... def step(model, opt_state, x):
      ...     value, grads = eqx.filter_value_and_grad(lambda m: jnp.mean(jax.vmap(m)(x) ** 2))(model)
      ...     updates, opt_state = optimizer.update(grads, opt_state, model, value=value)
      ...     return eqx.apply_updates(model, updates), opt_state
      >>> for _ in range(2):
      ...     model, opt_state = step(model, opt_state, jnp.ones((4, 1)))
      >>> int(adabatch.metrics(opt_state)["num_examples"])
      8

    Source: ours.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(model: PyTree) -> Any:
        return optimizer.init(eqx.filter(model, filter_spec))

    def update(
        updates: PyTree, state: Any, model: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        params = None if model is None else eqx.filter(model, filter_spec)
        return optimizer.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
