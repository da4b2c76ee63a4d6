"""Schedules that count optimizer steps, where the number of steps is not known: found, and warned of."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import optax

from adabatch_jax._protocols import may_count_steps
from adabatch_jax._types import PyTree
from adabatch_jax._validate import is_traced


@functools.cache
def _counting() -> tuple[type, ...]:
    """The states of Optax's schedules, of which it does not export the one under `inject_hyperparams`.

    Found when it is needed: an array that is made while this is imported would start JAX's backend, which
    `jax.distributed.initialize` then refuses.
    """
    injected = optax.schedules.WrappedSchedule(lambda count: count)
    return optax.ScaleByScheduleState, type(injected.init())


def warn_of_step_schedules(where: str, opt_state: PyTree) -> None:
    """Warns if something in this state is a schedule of Optax or AutoWU, and counts steps.

    It is found by the type of its state: within `chain`, `masked`, `partition`, `inject_hyperparams` or any
    other wrapper that is a pytree.
    """

    def known(x: Any) -> bool:
        return isinstance(x, _counting()) or may_count_steps(x)

    nodes = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=known)
    places = [jax.tree_util.keystr(path) for path, x in nodes if known(x) and _counts(x)]
    if places:
        warnings.warn(
            f"{where}: a schedule inside counts optimizer steps (its state is at "
            f"{', '.join(place or 'the top' for place in places)}). While the batch grows, fewer are made "
            "of the same examples, so the schedule does not come to its end. Let it count examples: "
            "adabatch.grow_batch_size(optax.adamw, learning_rate=schedule, …), or inside this wrapper "
            "adabatch.by_examples(optax.adamw, base_batch_size=64)(learning_rate=schedule, …); AutoWU by "
            "total_examples= in the place of total_steps=",
            stacklevel=3,
        )


def _counts(state: Any) -> bool:
    """Whether this one counts steps; False where that is traced."""
    if not may_count_steps(state):
        return True
    counts = state.counts_steps
    return not is_traced(counts) and bool(jax.device_get(counts))
