"""`unless_skipped`: what a loop carries beside its parameters stays clean when a call is left out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax._types import PyTree
from adabatch_jax.batch_size._read_state import last_call


def unless_skipped(opt_state: PyTree, new: PyTree, old: PyTree) -> PyTree:
    """`new`, or `old` where the last `update` was skipped because something in it was not finite.

    `adaptive_multi_steps` leaves a micro-batch with NaN or inf out of the gradient. What the loop itself
    made of the same micro-batch it cannot see: running statistics of batch normalisation would stay NaN for
    ever. Let them pass through here, right after `update`:

        updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
        batch_stats = unless_skipped(opt_state, new_batch_stats, batch_stats)

    A call that brought no examples (`num_examples=0`) counts as skipped. With `axis_name` a call counts as
    skipped if one device's part of it was, since statistics are shared by the devices. An average of the
    *parameters* needs no such care, since a skipped call does not move them: average where
    `has_updated(opt_state)`, so that the average does not decay once per micro-batch.
    `optax.apply_if_finite` and `optax.MultiSteps` around the optimizer are understood as well.

    Args:
      opt_state: the state that `update` returned; inside jit or on the host.
      new: pytree of what this call has made. What is no array is taken as it is.
      old: the same as it was before the call.

    Returns:
      A pytree like `new`, in its dtypes.

    Raises:
      ValueError: `new` and `old` of different structure; a state stacked by `vmap`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from adabatch_jax import adapt_batch_size, adaptive_multi_steps, norm_test
      >>> controller = adapt_batch_size(norm_test(1.0), initial_batch_size=8, max_batch_size=64)
      >>> optimizer = adaptive_multi_steps(optax.chain(controller, optax.sgd(0.1)), micro_batch_size=4)
      >>> w = jnp.zeros(2)
      >>> _, state = optimizer.update(jnp.array([1.0, jnp.nan]), optimizer.init(w), w)
      >>> float(unless_skipped(state, new=jnp.array(jnp.nan), old=jnp.array(0.5)))
      0.5

    Source: ours.
    """
    _, skipped = last_call(opt_state, "unless_skipped")

    def one(x: Any, y: Any) -> Any:
        if not isinstance(x, jax.Array) or not isinstance(y, jax.Array):
            return x
        return jnp.where(skipped, y.astype(x.dtype) if y.dtype != x.dtype else y, x)

    there, here = (str(jax.tree.structure(tree)) for tree in (new, old))
    if there != here:
        raise ValueError(f"unless_skipped: new and old differ in structure: {there} and {here}")
    return jax.tree.map(one, new, old)
