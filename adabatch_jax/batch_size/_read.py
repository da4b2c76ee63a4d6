"""Reading the optimizer state: `get_batch_size`, `has_updated`, `needs_noise`, `metrics`.

States are found by type, wherever they sit: inside `chain`, `masked`, `inject_hyperparams`, with the
wrapped leaves of `nnx.Optimizer`, or stacked along a leading device axis by `pmap`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from adabatch_jax.batch_size._state import AdaptBatchSizeState

PyTree = Any


def _states(opt_state: PyTree) -> Iterator[Any]:
    """Every state that reports metrics, and those of inject_hyperparams, outermost first."""

    def is_ours(x: Any) -> bool:
        return hasattr(type(x), "report_metrics") or hasattr(x, "hyperparams")

    for node in jax.tree.leaves(opt_state, is_leaf=is_ours):
        if is_ours(node):
            yield node
            yield from _states(tuple(node))


def _plain(state: Any) -> Any:
    """The state with scalar fields freed from wrappers and from a leading device axis.

    The first field of every state of ours is a scalar, so its rank tells of a device axis.
    """
    stacked = jnp.ndim(jax.tree.leaves(state[0])[0])
    fields = {
        name: jax.tree.leaves(field) for name, field in zip(state._fields, state, strict=True)
    }
    return state._replace(
        **{k: leaves[0][(0,) * stacked] for k, leaves in fields.items() if len(leaves) == 1}
    )


def _controllers(opt_state: PyTree) -> list[AdaptBatchSizeState]:
    return [s for s in _states(opt_state) if isinstance(s, AdaptBatchSizeState)]


def controller_state(opt_state: PyTree) -> AdaptBatchSizeState:
    """The one batch-size controller in `opt_state`.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = _controllers(opt_state)
    if not found:
        raise ValueError(
            "no batch-size controller in this optimizer state: add adapt_batch_size to the chain"
        )
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} batch-size controllers in this optimizer state, and a step has one batch "
            "size: keep a single adapt_batch_size, outside optax.partition"
        )
    return _plain(found[0])


def get_batch_size(opt_state: PyTree) -> jax.Array:
    """The number of examples that the next optimizer step should use, over all devices.

    Args:
      opt_state: state of an optimizer with one `adapt_batch_size` in it; inside jit or on the host.

    Returns:
      int32 scalar.

    Raises:
      ValueError: no controller in the state, or more than one.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import adapt_batch_size, norm_test
      >>> link = adapt_batch_size(norm_test(1.0), initial_batch_size=32, max_batch_size=64)
      >>> int(get_batch_size(link.init(jnp.zeros(3))))
      32
    """
    return controller_state(opt_state).next_batch_size


def has_updated(opt_state: PyTree) -> jax.Array:
    """Whether the last `update` was a real optimizer step, as `optax.MultiSteps.has_updated`.

    Args:
      opt_state: state of an optimizer with one `adapt_batch_size` in it. With
        `adaptive_multi_steps` around it most updates only gather; without, every update is a step.

    Returns:
      bool scalar; False before the first update.

    Raises:
      ValueError: no controller in the state, or more than one.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import adapt_batch_size, norm_test
      >>> link = adapt_batch_size(norm_test(1.0), initial_batch_size=32, max_batch_size=64)
      >>> bool(has_updated(link.init(jnp.zeros(3))))
      False
    """
    for state in _states(opt_state):
        if hasattr(state, "emitted"):
            return _plain(state).emitted
    return controller_state(opt_state).updates_seen > 0


def needs_noise(opt_state: PyTree) -> jax.Array:
    """Whether the next optimizer step tests the noise: `measure=` of `value_and_grad_noise`.

    Between two tests (`test_interval`), and once the batch is as large as it may get, nobody asks for
    the noise, and a step that does not measure it costs hardly more than its gradient.
    `adaptive_multi_steps` sees to it by itself.

    Args:
      opt_state: state of an optimizer with one `adapt_batch_size` in it; inside jit or on the host.

    Returns:
      bool scalar.

    Raises:
      ValueError: no controller in the state, or more than one.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import adapt_batch_size, norm_test
      >>> link = adapt_batch_size(norm_test(1.0), initial_batch_size=64, max_batch_size=64)
      >>> bool(needs_noise(link.init(jnp.zeros(3))))  # it cannot grow
      False
    """
    return controller_state(opt_state).test_due


def metrics(opt_state: PyTree) -> dict[str, Any]:
    """What the controller and the other links of this library last did, as a dict of scalars.

    The keys depend on the links alone, never on the numbers. `batch_size` (of the next step),
    `num_examples` (used so far: a Python int on the host, float32 inside jit), `noise_scale` (tr Σ /
    ‖∇F‖², averaged over some ten tests, for display), `noise_numerator`, `noise_denominator` and
    `required_batch_size` (of the last update's test; NaN if it made none), `degrees_of_freedom`,
    `test_status` (`BatchSizeStatus`), `skipped_tests`, and `learning_rate`: the product of what
    `inject_hyperparams`, `scale_by_example_schedule` and `scale_by_batch_size` last applied, NaN if
    there is none of these. Links add keys of their own; for those of AutoWU see `scale_by_autowu`.

    Args:
      opt_state: state of an optimizer with one `adapt_batch_size` in it; inside jit or on the host.
        Without a controller, the keys of the other links of ours alone.

    Returns:
      dict from name to scalar.

    Raises:
      ValueError: no link of ours in the state, or more than one controller.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import adapt_batch_size, norm_test
      >>> link = adapt_batch_size(norm_test(1.0), initial_batch_size=32, max_batch_size=64)
      >>> metrics(link.init(jnp.zeros(3)))["num_examples"]
      0
    """
    ours = any(hasattr(type(s), "report_metrics") for s in _states(opt_state))
    without = ours and not _controllers(opt_state)
    shown = {} if without else controller_state(opt_state).report_metrics()
    factors = []
    for state in _states(opt_state):
        if isinstance(state, AdaptBatchSizeState):
            continue
        if hasattr(state, "hyperparams"):
            report = {k: _scalar(v) for k, v in state.hyperparams.items() if k == "learning_rate"}
        else:
            report = dict(_plain(state).report_metrics())
        factors += [report.pop(k) for k in ("learning_rate", "learning_rate_scale") if k in report]
        shown.update(report)
    rate = jnp.prod(jnp.stack(factors)) if factors else jnp.float32(jnp.nan)
    return {**shown, "learning_rate": rate}


def _scalar(x: Any) -> jax.Array:
    leaf = jax.tree.leaves(x)[0]
    return leaf[(0,) * jnp.ndim(leaf)].astype(jnp.float32)
