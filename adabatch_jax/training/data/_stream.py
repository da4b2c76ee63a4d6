"""Micro-batches of one static shape for batches that change their size: the interface, and arrays.

A compiled step wants arrays of one shape; the controller wants another number of examples every time.
So a stream lays the next examples out in groups of a fixed size and says how many of each are real.
Its place is a count of examples, as everywhere in a run: batch numbers would mean nothing.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, SupportsIndex

import jax
import numpy as np
import numpy.typing as npt

from adabatch_jax._types import PyTree
from adabatch_jax._validate import integer
from adabatch_jax.training.data._feed import Feed
from adabatch_jax.training.data._ladder import Rung

Offsets = npt.NDArray[np.int64]
Gather = Callable[[Offsets], PyTree]


class MicroBatches(NamedTuple):
    """This process's share of one batch, in the arguments that `value_and_grad_noise` takes.

    Args:
      groups: pytree of NumPy arrays [num_groups, micro_batch_size, …].
      sizes: int32 [num_groups], real examples in each group, the first rows of it. The other rows
        repeat an example and must be left out of the loss (`masked_mean`).
      used: int32, groups in use: the rest are empty. The same on all processes.
    """

    groups: PyTree
    sizes: npt.NDArray[np.int32]
    used: np.int32


class Stream(abc.ABC):
    """A stream of examples from which batches of any size are taken, one after the other.

    What all streams share. Several processes: a batch is cut into groups of `micro_batch_size`, and
    group g belongs to process g % process_count. All processes take the same sizes; the groups of all
    together, and so the noise between them, do not depend on how many processes there are.

    Args:
      micro_batch_size: examples in a full group, at least 1.
      num_groups: groups in the arrays of one process, at least 1. Both are defaults: a `take` may
        name another shape.
      drop_remainder: leave out the last batch if the data end inside it; otherwise it is shorter.
      process_index: this process; None: `jax.process_index()`.
      process_count: processes; None: `jax.process_count()`.
    """

    def __init__(
        self,
        *,
        micro_batch_size: SupportsIndex,
        num_groups: SupportsIndex,
        drop_remainder: bool = False,
        process_index: SupportsIndex | None = None,
        process_count: SupportsIndex | None = None,
    ) -> None:
        name = type(self).__name__
        self._rung = _checked_rung(name, micro_batch_size, num_groups)
        self._drop_remainder = drop_remainder
        count = jax.process_count() if process_count is None else process_count
        index = jax.process_index() if process_index is None else process_index
        self._process_count = integer(name, "process_count", count, 1)
        self._process_index = integer(name, "process_index", index, 0, self._process_count)
        self._position = 0
        self._failed = False

    @property
    def position(self) -> int:
        """Examples handed out so far, over all processes. It never wraps."""
        return self._position

    def take(self, batch_size: SupportsIndex, rung: Rung | None = None) -> MicroBatches:
        """Hands out the next examples.

        Args:
          batch_size: examples wanted, over all processes, at least 1.
          rung: shape of the arrays, in place of the one that was given to the factory.

        Returns:
          The share of this process. If the data end inside the batch it is shorter: `position` and
          the sizes say so. It is never filled up.

        Raises:
          StopIteration: no example is left or, with `drop_remainder`, fewer than a batch.
          ValueError: an argument out of its range; a batch that does not fit into the shape; for
            some sources, an example unlike the first.
          RuntimeError: an earlier call failed halfway: examples would be lost.
        """
        name = type(self).__name__
        wanted = integer(name, "batch_size", batch_size, 1)
        rung = self._rung if rung is None else _checked_rung(name, *rung)
        room = rung.micro_batch_size * rung.num_groups * self._process_count
        if wanted > room:
            raise ValueError(
                f"{name}: batch_size must be at most micro_batch_size * num_groups * process_count = "
                f"{rung.micro_batch_size} * {rung.num_groups} * {self._process_count}, got {wanted}"
            )
        self._check_whole()
        self._failed = True  # until it is over
        found, gather = self._read(wanted)
        if found == 0 or (self._drop_remainder and found < wanted):
            self._failed = False
            raise StopIteration(f"{name}: the data end after {self._position + found} examples")
        offsets, sizes, count = _share(found, rung, self._process_index, self._process_count)
        batch = MicroBatches(gather(offsets), sizes, count)
        self._advance(found)
        self._failed = False
        return batch

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Where the stream is: a dictionary that `json` can write, the same on every process."""

    @abc.abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state()` was taken, exactly; also with another number of processes.

        Raises:
          ValueError: the state is of another kind of stream, or of other data.
        """

    @abc.abstractmethod
    def _read(self, length: int) -> tuple[int, Gather]:
        """How many of the next `length` examples there are, and what gathers them by offset."""

    def _advance(self, number: int) -> None:
        """Counts examples that are handed out."""
        self._position += number

    def _check_whole(self) -> None:
        if self._failed:
            name = type(self).__name__
            raise RuntimeError(f"{name}: an earlier take failed; restore a state to go on")

    def _integers(self, state: Mapping[str, Any], *keys: str) -> list[int]:
        """These entries of a state, if they are counts and the state is of this kind of stream."""
        name = type(self).__name__
        if not isinstance(state, Mapping) or state.get("stream") != name:
            raise ValueError(f"{name}: state must come from {name}.state(), got {state!r}")
        return [integer(name, f"state[{key!r}]", state.get(key, "nothing"), 0) for key in keys]


class ArrayStream(Stream):
    """Arrays in host memory, in a new order every epoch: every example exactly once in each.

    The order is that of `Feed`: a function of (seed, epoch) alone. A batch may reach over the border of
    two epochs; only the end of the last one is an end.

    Args:
      data: pytree of arrays [N, …] with one leading axis; memory-mapped ones are read row by row.
      seed: of the order, any integer in [0, 2**64).
      epochs: after so many passes `take` raises StopIteration; None: never.
      shape_and_processes: keywords, as for `Stream`: `micro_batch_size`, `num_groups`, `drop_remainder`,
        `process_index`, `process_count`. With `drop_remainder`, a smaller batch may still fit after
        StopIteration.

    Raises:
      ValueError: an argument out of its range; `data` without arrays, or of different lengths.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, adabatch_jax as adabatch
      >>> from adabatch_jax.training import masked_mean
      >>> def loss_fn(w, group):
      ...     (x, y), size = group
      ...     return masked_mean((w * x - y) ** 2, size)
      >>> value_and_grad = jax.jit(adabatch.value_and_grad_noise(loss_fn))
      >>> x = np.arange(10, dtype=np.float32)
      >>> stream = ArrayStream((x, 2 * x), seed=0, epochs=1, micro_batch_size=2, num_groups=4)
      >>> for batch_size in (3, 4, 8):  # as decided by `adapt_batch_size`; one compilation
      ...     batch = stream.take(batch_size)
      ...     value, noise = value_and_grad(
      ...         1.0, (batch.groups, batch.sizes), sizes=batch.sizes, count=batch.used
      ...     )
      ...     print(batch.sizes, stream.position, int(noise.num_examples))
      [2 1 0 0] 3 3
      [2 2 0 0] 7 4
      [2 1 0 0] 10 3
      >>> saved = stream.state()  # beside the parameters; `stream.restore(saved)` comes back here
      >>> saved["position"]
      10
    """

    def __init__(
        self,
        data: PyTree,
        *,
        seed: SupportsIndex = 0,
        epochs: SupportsIndex | None = None,
        **shape_and_processes: Any,
    ) -> None:
        super().__init__(**shape_and_processes)
        self._data = jax.tree.map(np.asarray, data)
        shapes = [leaf.shape for leaf in jax.tree.leaves(self._data)]
        if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
            raise ValueError(
                f"ArrayStream: every leaf of data needs the same leading axis, got shapes {shapes}"
            )
        number = integer("ArrayStream", "the length of data", shapes[0][0], 1, 2**31)
        self._feed = Feed(number, integer("ArrayStream", "seed", seed, 0, 2**64))
        self._end = (
            None
            if epochs is None
            else number * integer("ArrayStream", "epochs", epochs, 1, 2**63 // number)
        )

    def state(self) -> dict[str, Any]:
        """The position, and what fixes the order: seed and number of examples."""
        return {"stream": "ArrayStream", "position": self._position, **self._order()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to the position; the data are not looked at.

        Raises:
          ValueError: the state is of another kind of stream, seed, or number of examples.
        """
        order = self._order()
        position, *found = self._integers(state, "position", *order)
        for (key, value), other in zip(order.items(), found, strict=True):
            if other != value:
                raise ValueError(f"ArrayStream: {key} is {value}, but the state has {other}")
        self._position = position
        self._failed = False

    def _order(self) -> dict[str, int]:
        return {"seed": self._feed.seed, "num_examples": self._feed.num_examples}

    def _read(self, length: int) -> tuple[int, Gather]:
        if self._end is not None:
            length = max(min(length, self._end - self._position), 0)
        indices = self._feed.indices(self._position, length)
        return length, lambda offsets: jax.tree.map(lambda x: x[indices[offsets]], self._data)


def _checked_rung(name: str, micro_batch_size: SupportsIndex, num_groups: SupportsIndex) -> Rung:
    return Rung(
        integer(name, "micro_batch_size", micro_batch_size, 1),
        integer(name, "num_groups", num_groups, 1),
    )


def _share(
    length: int, rung: Rung, process_index: int, process_count: int
) -> tuple[Offsets, npt.NDArray[np.int32], np.int32]:
    """Which examples of a batch of `length` go where: offsets [num_groups, micro_batch_size], sizes, count.

    Places without an example have the offset 0: zeros might not be valid inputs, an example is.
    """
    micro, groups = rung
    starts = micro * (process_index + process_count * np.arange(groups, dtype=np.int64))
    sizes = np.clip(length - starts, 0, micro).astype(np.int32)
    offsets = starts[:, None] + np.arange(micro)
    count = -(-length // (micro * process_count))
    return np.where(offsets < length, offsets, 0), sizes, np.int32(count)
