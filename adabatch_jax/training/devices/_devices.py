"""The devices of a run: what each of them holds, and which part of a batch it computes.

Parameters, optimizer state and data lie on every device; of a batch, each takes its share of the
groups. Group j of a batch goes to device j modulo their number, so that the same groups are made,
and the same noise is measured, on any number of devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax._types import PyTree

AXIS = "data"


class Devices:
    """All devices of a run, of this process and of others.

    Args:
      number: use only the first of them; None: all.

    Raises:
      ValueError: there are fewer, or several processes of which each must have a part.
    """

    def __init__(self, number: int | None = None) -> None:
        there = jax.devices()
        if number is not None and number > len(there):
            raise ValueError(f"train: --devices {number}: there are {len(there)}")
        if number is not None and number < len(there) and jax.process_count() > 1:
            raise ValueError(
                f"train: --devices {number} with {jax.process_count()} processes: leave it out"
            )
        self.number = number or len(there)
        self._mesh = jax.sharding.Mesh(np.array(there[: self.number]), (AXIS,))

    @property
    def axis_name(self) -> str | None:
        """The axis over which a step averages; None on a single device."""
        return None if self.number == 1 else AXIS

    def mapped(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step(params, opt_state, data, indices, sizes, count)`, with the groups spread."""
        same, spread = jax.P(), jax.P(AXIS)
        return self._mapped(step, (same, same, same, spread, spread, same))

    def repeated(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, computed on every device from the same arguments."""
        return self._mapped(function, jax.P())

    def _mapped(self, function: Callable[..., Any], specs: Any) -> Callable[..., Any]:
        if self.number == 1:
            return function
        return jax.shard_map(function, mesh=self._mesh, in_specs=specs, out_specs=jax.P())

    def replicate(self, tree: PyTree) -> PyTree:
        """The same arrays on every device. Every process must give the same."""
        if self.number == 1:
            return jax.device_put(tree)
        return jax.tree.map(lambda x: self._place(x, jax.P()), tree)

    def groups(self, num_groups: int) -> int:
        """The number of groups that makes equal shares: `num_groups`, rounded up."""
        return math.ceil(num_groups / self.number) * self.number

    def dealt(self, rows: Any) -> Any:
        """The rows [num_groups, …], a multiple of the devices, those of one device side by side."""
        dealt = rows.reshape(-1, self.number, *rows.shape[1:]).swapaxes(0, 1)
        return dealt.reshape(rows.shape)

    def share(self, num_groups: Any) -> Any:
        """How many groups every device goes through, where `num_groups` have examples."""
        return -(-num_groups // self.number)

    def spread(self, rows: np.ndarray) -> Any:
        """Deals out the rows, one after the other, and hands them over."""
        return rows if self.number == 1 else self._place(self.dealt(rows), jax.P(AXIS))

    def loops(self, num_groups: int) -> Any:
        """`share` of a number that the host knows, handed over."""
        count = np.int32(self.share(num_groups))
        return count if self.number == 1 else self._place(count, jax.P())

    def _place(self, x: Any, spec: jax.P) -> Any:
        if _is_key(x):
            return jax.random.wrap_key_data(
                self._place(jax.random.key_data(x), spec), impl=jax.random.key_impl(x)
            )
        values = np.asarray(x)
        sharding = jax.NamedSharding(self._mesh, spec)
        # Every process hands over the rows of its own devices only.
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def on_host(tree: PyTree) -> PyTree:
    """Copies in host memory of arrays that are the same on every device; PRNG keys as their words."""

    def copy(x: Any) -> np.ndarray:
        x = jax.random.key_data(x) if _is_key(x) else x
        here = x.addressable_data(0) if isinstance(x, jax.Array) else x
        return np.array(here)  # a copy: the next step may overwrite what is donated to it

    return jax.tree.map(copy, tree)


def as_before(values: PyTree, like: PyTree) -> PyTree:
    """Arrays of this process's first device, with PRNG keys where `like` has them: undoes `on_host`."""

    def back(value: Any, x: Any) -> Any:
        if _is_key(x):
            return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(x))
        return jnp.asarray(value)

    return jax.tree.map(back, values, like)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
