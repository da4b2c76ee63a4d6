"""Schedules that count optimizer steps, where the number of steps is not known: found, and warned of."""

from __future__ import annotations

import warnings

import jax
import optax

from adabatch_jax._types import PyTree

# Optax does not export the type of a plain schedule's state under `inject_hyperparams`.
_COUNTING = (optax.ScaleByScheduleState, type(optax.schedules.WrappedSchedule(lambda n: n).init()))


def warn_of_step_schedules(where: str, opt_state: PyTree) -> None:
    """Warns if something in this state is a schedule of Optax, which counts steps.

    It is found by the type of its state: within `chain`, `masked`, `partition`, `inject_hyperparams` or any
    other wrapper that is a pytree.
    """
    nodes = jax.tree_util.tree_leaves_with_path(
        opt_state, is_leaf=lambda x: isinstance(x, _COUNTING)
    )
    places = [jax.tree_util.keystr(path) for path, x in nodes if isinstance(x, _COUNTING)]
    if places:
        warnings.warn(
            f"{where}: a schedule inside counts optimizer steps (its state is at "
            f"{', '.join(place or 'the top' for place in places)}). While the batch grows, fewer are made "
            "of the same examples, so the schedule does not come to its end. Let it count examples: "
            "adabatch.grow_batch_size(optax.adamw, learning_rate=schedule, …), or inside this wrapper "
            "adabatch.by_examples(optax.adamw, base_batch_size=64)(learning_rate=schedule, …)",
            stacklevel=3,
        )
