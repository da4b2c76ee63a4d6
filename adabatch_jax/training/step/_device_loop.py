"""Many optimizer steps in one call: the loop runs on the device, and the batch grows inside it.

The Python loop of `training/_loop.py` talks to the device once a step. Where a step takes a millisecond
or less, that is most of the time. The loop on the device is a `while_loop` that does the same: it cuts the
batches out of the order of the examples, makes the steps and keeps their numbers. It ends where the host is
needed: at the end of its steps, of an epoch, of the budget, or of its rung of the ladder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax._types import PyTree
from adabatch_jax.training.data import Rung
from adabatch_jax.training.devices import Devices


class LoopPlace(NamedTuple):
    """Where the loop is in the data and in the run; int32, so relative to the window of the feed."""

    offset: Any  # of the next example in `order`
    left: Any  # examples in the budget, as far as int32 counts
    steps: Any  # that this call may make
    decided: Any  # [lag + 1]: batch sizes of the next steps, the next one first


class LoopResult(NamedTuple):
    """What the loop carries from step to step, and what a call leaves behind."""

    params: PyTree
    opt_state: PyTree
    place: LoopPlace
    made: jax.Array  # int32: steps
    rows: dict[str, jax.Array]  # [steps per call] of each number; only the first `made` count


def loop_place(
    position: int, decided: tuple[int, ...], *, window: int, budget: int, steps: int
) -> LoopPlace:
    """Where a run is, of which `position` and `decided` are known as in `RunState`.

    Args:
      position: examples taken from the feed.
      decided: batch sizes of the next steps, the next one first.
      window: the position at which `order` begins.
      budget: examples in the run.
      steps: that this call may make.
    """
    return LoopPlace(
        offset=np.int32(position - window),
        left=np.int32(min(budget - position, 2**31 - 1)),
        steps=np.int32(steps),
        decided=np.array(decided, np.int32),
    )


def make_device_loop(
    step: Callable[..., tuple[PyTree, PyTree, dict[str, Any]]],
    devices: Devices,
    rung: Rung,
    sizes: tuple[int, int],
    num_examples: int,
    steps_per_call: int,
) -> Callable[..., LoopResult]:
    """Builds the loop for one rung.

    Args:
      step: as `make_step` builds it, spread over the devices.
      devices: of the run.
      rung: its micro-batch size and number of groups.
      sizes: the batch sizes that belong to the rung, from the first to before the second.
      num_examples: N, in an epoch.
      steps_per_call: room for the numbers of so many steps.

    Returns:
      `loop(params, opt_state, data, order, place) -> LoopResult`; `order` int32: the examples of the epoch
      in which the call begins, and of as many more as its batches may touch. It makes at least one step
      if `place` has examples and steps left and a batch size of this rung.
    """
    micro, groups = rung.micro_batch_size, devices.groups(rung.num_groups)
    low, high = sizes

    def batch(
        order: jax.Array, place: LoopPlace
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        length = jnp.minimum(place.decided[0], place.left)
        first = micro * jnp.arange(groups, dtype=jnp.int32)
        inside = jnp.arange(groups * micro, dtype=jnp.int32).reshape(groups, micro)
        taken = order[jnp.minimum(place.offset + inside, len(order) - 1)]
        indices = jnp.where(inside < length, taken, 0)
        group_sizes = jnp.clip(length - first, 0, micro)
        loops = devices.share(-(-length // micro))
        return length, devices.dealt(indices), devices.dealt(group_sizes), loops

    def loop(
        params: PyTree, opt_state: PyTree, data: PyTree, order: jax.Array, place: LoopPlace
    ) -> LoopResult:
        def one(params: PyTree, opt_state: PyTree, place: LoopPlace) -> Any:
            length, indices, group_sizes, loops = batch(order, place)
            params, opt_state, report = step(params, opt_state, data, indices, group_sizes, loops)
            row = {**report, "asked": place.decided[0], "length": length}
            decided = jnp.append(place.decided[1:], report["next_batch_size"])
            after = LoopPlace(place.offset + length, place.left - length, place.steps - 1, decided)
            return params, opt_state, after, row

        def more(so_far: LoopResult) -> jax.Array:
            place = so_far.place
            size = place.decided[0]
            inside = (place.offset < num_examples) & (size >= low) & (size < high)
            return inside & (place.left > 0) & (place.steps > 0)

        def advance(so_far: LoopResult) -> LoopResult:
            params, opt_state, place, row = one(so_far.params, so_far.opt_state, so_far.place)
            rows = jax.tree.map(lambda kept, x: kept.at[so_far.made].set(x), so_far.rows, row)
            return LoopResult(params, opt_state, place, so_far.made + 1, rows)

        shapes = jax.eval_shape(one, params, opt_state, place)[-1]
        rows = jax.tree.map(lambda s: jnp.zeros((steps_per_call, *s.shape), s.dtype), shapes)
        begin = LoopResult(params, opt_state, place, jnp.zeros((), jnp.int32), rows)
        return jax.lax.while_loop(more, advance, begin)

    return loop
