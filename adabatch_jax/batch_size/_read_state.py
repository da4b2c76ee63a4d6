"""Reading the optimizer state: `get_batch_size`, `has_updated`, `needs_noise`, `metrics`.

States are found by type, wherever they sit: inside `chain`, `masked`, `inject_hyperparams`, with the
wrapped leaves of `nnx.Optimizer`, or stacked along a leading device axis by `pmap`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adabatch_jax import _validate
from adabatch_jax._protocols import emits_steps, goes_back, is_record, reports_metrics
from adabatch_jax._types import PyTree
from adabatch_jax.batch_size._state import AdaptBatchSizeState

_SKIPPING = (optax.ApplyIfFiniteState, optax.MultiStepsState)


def _states(opt_state: PyTree) -> Iterator[Any]:
    """Every state that reports metrics, and those of three wrappers of Optax's, outermost first."""

    def is_ours(x: Any) -> bool:
        known = reports_metrics(x) or hasattr(x, "hyperparams")
        return known or isinstance(x, _SKIPPING)

    for node in jax.tree.leaves(opt_state, is_leaf=is_ours):
        if is_ours(node):
            yield node
            yield from _states(tuple(node))


def _read(state: Any, reader: str, *names: str) -> dict[str, Any]:
    """Scalar fields (all of them, unless named), freed from wrappers and from leading axes.

    So are the fields of the records in it: see `ReportsMetrics`.

    The first field of every state that is read is a scalar, so its rank tells of axes that stand before:
    that of devices, whose copies are alike, or that of an ensemble, where no single number is right.

    Raises:
      ValueError: the copies differ, or are traced, so that it cannot be seen.
    """
    stacked = jnp.ndim(jax.tree.leaves(state[0])[0])

    def freed(node: Any, names: tuple[str, ...]) -> dict[str, Any]:
        found = {}
        for name in names:
            part = getattr(node, name)
            leaves = jax.tree.leaves(part)
            if is_record(name, part):
                found[name] = part._replace(**freed(part, part._fields))
            elif len(leaves) == 1:
                found[name] = _first(leaves[0], stacked, f"{reader} of {name}", reader)
        return found

    return freed(state, names or state._fields)


def _first_of(state: Any, tree: PyTree, name: str, reader: str) -> Any:
    """The single number in `tree`, which is part of `state`."""
    stacked = jnp.ndim(jax.tree.leaves(state[0])[0])
    return _first(jax.tree.leaves(tree)[0], stacked, f"{reader} of {name}", reader)


def _first(leaf: Any, stacked: int, what: str, reader: str) -> Any:
    if not stacked:
        return leaf
    remedy = f"read every member with jax.vmap({reader})(opt_state)"
    if _validate.is_traced(leaf):
        raise ValueError(
            f"{reader}: the optimizer state is stacked along {stacked} leading axis, and while tracing it "
            f"cannot be seen whether its members are alike: {remedy}, or take one of them first"
        )
    small = math.prod(leaf.shape[stacked:]) <= 16  # a scalar or a clock, not somebody's history
    if small and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        on_device = isinstance(leaf, jax.Array)
        parts = [x.data for x in leaf.addressable_shards] if on_device else [leaf]
        parts = [np.asarray(x) for x in jax.device_get(parts)]
        rows = np.concatenate([x.reshape(-1, *x.shape[stacked:]) for x in parts])
        if rows.dtype.kind not in "biu":  # copies may differ by the rounding of their devices
            rows = rows.astype(np.float64)
            alike = np.isclose(rows, rows[:1], rtol=1e-3, atol=0.0, equal_nan=True)
        else:
            alike = rows == rows[:1]
        if not alike.all():
            raise ValueError(
                f"{what}: the optimizer state is stacked, and its members differ, so that there is no "
                f"single number: {remedy}"
            )
    return leaf[(0,) * stacked]


def _plain(state: Any, reader: str) -> Any:
    return state._replace(**_read(state, reader))


def _controllers(opt_state: PyTree) -> list[AdaptBatchSizeState]:
    return [s for s in _states(opt_state) if isinstance(s, AdaptBatchSizeState)]


def controller_state(opt_state: PyTree, reader: str = "get_batch_size") -> AdaptBatchSizeState:
    """The one batch-size controller in `opt_state`, freed from leading axes.

    Raises:
      ValueError: there is none, or more than one, or a stack of different ones.
    """
    return _plain(find_controller(opt_state), reader)


def find_controller(opt_state: PyTree) -> AdaptBatchSizeState:
    """The one batch-size controller in `opt_state`, as it stands there.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = _controllers(opt_state)
    if not found:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(opt_state)]
        keys = {getattr(key, "key", None) for path in paths for key in path}
        if AdaptBatchSizeState._fields[0] in keys:
            raise ValueError(
                "this optimizer state was restored without its types, as dicts and lists: restore it "
                "into optimizer.init(params) as the target, such as "
                "orbax.checkpoint.args.StandardRestore(target) or flax.serialization.from_bytes(target, …)"
            )
        raise ValueError(
            "no batch-size controller in this optimizer state: add adapt_batch_size to the chain"
        )
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} batch-size controllers in this optimizer state, and a step has one batch "
            "size: keep a single adapt_batch_size, outside optax.partition"
        )
    return found[0]


def last_call(opt_state: PyTree, reader: str = "metrics") -> tuple[jax.Array, jax.Array]:
    """Of the last `update`: whether it made a step, and whether it left its gradient out.

    Bool scalars. Where nothing can gather or skip, every call makes a step. What stands inside a wrapper
    that did not call it tells of an earlier call, and is not asked.
    """
    stepped, skipped = jnp.ones((), bool), jnp.zeros((), bool)
    for state in _states(opt_state):
        if isinstance(state, optax.ApplyIfFiniteState):
            left_out = ~_read(state, reader, "last_finite")["last_finite"]
            done = ~left_out
        elif isinstance(state, optax.MultiStepsState):
            told = _read(state, reader, "mini_step", "gradient_step")
            left_out = jnp.zeros((), bool)
            if isinstance(state.skip_state, dict) and "should_skip" in state.skip_state:
                left_out = _first_of(state, state.skip_state["should_skip"], "should_skip", reader)
            done = (told["mini_step"] == 0) & (told["gradient_step"] > 0) & ~left_out
        elif emits_steps(state):
            done = _read(state, reader, "emitted")["emitted"]
            left_out = jnp.zeros((), bool)
            if hasattr(state, "skipped_call"):
                left_out = _read(state, reader, "skipped_call")["skipped_call"]
        else:
            continue
        skipped |= stepped & left_out
        stepped &= done
    return stepped, skipped


def returns_made(opt_state: PyTree) -> Any:
    """How often `return_to_minimum` has gone back, int32 scalar; None where nothing inside can."""
    for state in _states(opt_state):
        if goes_back(state):
            return _read(state, "metrics", "returns_made")["returns_made"]
    return None


def get_batch_size(opt_state: PyTree) -> jax.Array:
    """The number of examples that the next optimizer step should use, over all devices.

    Args:
      opt_state: state of an optimizer with one `adapt_batch_size` in it; inside jit or on the host.

    Returns:
      int32 scalar.

    Raises:
      ValueError: no controller in the state, or more than one; the state is stacked (an ensemble under
        `vmap`) and its members differ, or are traced: `jax.vmap(get_batch_size)(opt_state)` then gives
        one number a member. A state stacked over devices by `pmap` reads like one.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import adapt_batch_size, norm_test
      >>> link = adapt_batch_size(norm_test(1.0), initial_batch_size=32, max_batch_size=64)
      >>> int(get_batch_size(link.init(jnp.zeros(3))))
      32
    """
    return controller_state(opt_state, "get_batch_size").next_batch_size


def has_updated(opt_state: PyTree) -> jax.Array:
    """Whether the last `update` was a real optimizer step, as `optax.MultiSteps.has_updated`.

    With `adaptive_multi_steps` (or `optax.MultiSteps`) around the optimizer most updates only gather, and
    `optax.apply_if_finite` makes no step of a gradient that is not finite; else every update is one.

    Args:
      opt_state: state of an optimizer with one `adapt_batch_size` in it; inside jit or on the host.

    Returns:
      bool scalar; False before the first update.

    Raises:
      ValueError: as `get_batch_size`.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import adapt_batch_size, norm_test
      >>> link = adapt_batch_size(norm_test(1.0), initial_batch_size=32, max_batch_size=64)
      >>> bool(has_updated(link.init(jnp.zeros(3))))
      False
    """
    stepped, _ = last_call(opt_state, "has_updated")
    return stepped & (controller_state(opt_state, "has_updated").updates_seen > 0)


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
      ValueError: as `get_batch_size`.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import adapt_batch_size, norm_test
      >>> link = adapt_batch_size(norm_test(1.0), initial_batch_size=64, max_batch_size=64)
      >>> bool(needs_noise(link.init(jnp.zeros(3))))  # it cannot grow
      False
    """
    return controller_state(opt_state, "needs_noise").test_due


def metrics(opt_state: PyTree) -> dict[str, Any]:
    """What the controller and the other links of this library last did, as a dict of scalars.

    The keys depend on the links alone, never on the numbers. No number is NaN in a healthy run: what was
    not measured is 0.

    * `optimizer_steps`: made so far; int32.
    * `num_examples`: used by all of them: a Python int on the host, float32 inside jit.
    * `batch_size`: examples that the last step used; before there was one, those that the first will use.
    * `next_batch_size`: as `get_batch_size`.
    * `gradient_norm`: ‖ḡ‖ of the last step's batch as it was measured, before what stands behind the
      controller, such as clipping; +inf if not finite.
    * `noise_scale`: tr Σ / ‖∇F‖², averaged over some ten tests, for display; 0 before the first test, +inf
      where no signal shows.
    * `test_status`: a `BatchSizeStatus`, which prints its name, on the host; its int32 inside jit.
    * `skipped_tests`: how many had no usable evidence.
    * `noise_numerator`, `noise_denominator`, `required_batch_size` (+inf where no size is large enough),
      `degrees_of_freedom`: of the last update's test. All four are 0 if it made none, or had no usable
      evidence, and the last is 0 just then.
    * `loss`, with `adaptive_multi_steps`: the mean loss of the last complete batch; 0 where no `value=` is
      given. (Fused, it is the value that you have.)

    `skipped`: the last call left its gradient out, as `adaptive_multi_steps`, `optax.apply_if_finite` and
    `optax.MultiSteps` with `should_skip_update_fn` do; False where nothing can. (`apply_if_finite` gives
    up after its `max_consecutive_errors`, and takes a gradient that it calls not finite.) All leave the
    examples of such a call out of `num_examples`: it counts what steps used, and schedules over examples
    wait. (In `adabatch_jax.training` a step that is dropped has used its examples up, and every clock
    counts them: a run has a budget, and a decay ends with it.)

    `learning_rate`: the product of what `inject_hyperparams`, `scale_by_example_schedule`, AutoWU and
    `scale_by_batch_size` last applied. It is absent where only the scale of the last is known, which
    is then `learning_rate_scale`, or none of these. Links add keys of their own; for those of AutoWU see
    `scale_by_autowu`.

    Args:
      opt_state: state of an optimizer with one `adapt_batch_size` in it; inside jit or on the host.
        Without a controller, the keys of the other links of ours alone.

    Returns:
      dict from name to scalar.

    Raises:
      ValueError: no link of ours in the state, or more than one controller; stacked states as in
        `get_batch_size`.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import adapt_batch_size, norm_test
      >>> link = adapt_batch_size(norm_test(1.0), initial_batch_size=32, max_batch_size=64)
      >>> metrics(link.init(jnp.zeros(3)))["num_examples"]
      0
    """
    ours = any(map(reports_metrics, _states(opt_state)))
    without = ours and not _controllers(opt_state)
    shown = {} if without else controller_state(opt_state, "metrics").report_metrics()
    rates, scales = [], []
    for state in _states(opt_state):
        if isinstance(state, (AdaptBatchSizeState, *_SKIPPING)):
            continue
        if hasattr(state, "hyperparams"):
            report = _injected_rate(state)
        else:
            report = dict(_plain(state, "metrics").report_metrics())
        rates += [report.pop(k) for k in ("learning_rate",) if k in report]
        scales += [report.pop(k) for k in ("learning_rate_scale",) if k in report]
        shown.update(report)
    shown["skipped"] = last_call(opt_state)[1]
    if rates or scales:
        name = "learning_rate" if rates else "learning_rate_scale"
        shown[name] = jnp.prod(jnp.stack([jnp.asarray(x, jnp.float32) for x in rates + scales]))
    return shown


def _injected_rate(state: Any) -> dict[str, Any]:
    """The learning rate of `inject_hyperparams`, where it is one number."""
    leaves = jax.tree.leaves(state.hyperparams.get("learning_rate"))
    if len(leaves) != 1 or jnp.ndim(leaves[0]) != jnp.ndim(jax.tree.leaves(state[0])[0]):
        return {}
    return {"learning_rate": _first_of(state, leaves, "learning_rate", "metrics")}
