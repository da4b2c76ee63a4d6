"""The order of the examples: an endless stream addressed by position, not by batch.

When batches change their size, a batch number says nothing about the place in the data. So the
place is counted in examples: position p is entry p % N of epoch p // N, and the order of an epoch
depends on nothing but the seed and the epoch. Two runs that cut the stream differently still see
the same examples in the same order, and a restored run continues from one integer.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from adabatch_jax._validate import integer


@dataclasses.dataclass(frozen=True)
class Feed:
    """An endless stream of example numbers: one seeded permutation per epoch.

    order(epoch) = argsort(Philox(key=(seed, epoch))). The raw Philox words are sorted rather than
    handed to NumPy's shuffle, because only the raw words are guaranteed between NumPy versions.

    Args:
      num_examples: examples in one epoch, in [1, 2**31).
      seed: any integer in [0, 2**64).

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> feed = Feed(num_examples=4, seed=0)
      >>> sorted(feed.indices(0, 4).tolist())
      [0, 1, 2, 3]
      >>> one_batch = feed.indices(0, 6).tolist()
      >>> one_batch == feed.indices(0, 1).tolist() + feed.indices(1, 5).tolist()
      True
    """

    num_examples: int
    seed: int

    def __post_init__(self) -> None:
        for name, low, high in (("num_examples", 1, 2**31), ("seed", 0, 2**64)):
            value = integer("Feed", name, getattr(self, name), low, high)
            object.__setattr__(self, name, value)

    def indices(self, start: SupportsIndex, length: SupportsIndex) -> npt.NDArray[np.int32]:
        """The example numbers at positions start … start + length - 1 of the stream.

        Args:
          start: examples consumed before, in [0, 2**63); it never wraps.
          length: examples wanted, non-negative; may reach over any number of epochs.

        Returns:
          int32 array of shape [length], a copy the caller may change.

        Raises:
          ValueError: if an argument is not an integer or out of its range.
        """
        first = integer("Feed", "start", start, 0, 2**63)
        last = first + integer("Feed", "length", length, 0)
        pieces = [np.empty(0, np.int32)]
        position = first
        while position < last:
            epoch, offset = divmod(position, self.num_examples)
            piece = _order(self.num_examples, self.seed, epoch)[offset : offset + last - position]
            pieces.append(piece)
            position += len(piece)
        return np.concatenate(pieces)

    def grouped(
        self,
        start: SupportsIndex,
        length: SupportsIndex,
        micro_batch_size: SupportsIndex,
        num_groups: SupportsIndex,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The same stretch of the stream, laid out in micro-batches of one static shape.

        The first `length` entries in row-major order are real; the rest is index 0, which exists
        in every data set, and is not counted in the sizes.

        Args:
          start: examples consumed before, in [0, 2**63).
          length: examples wanted, at most micro_batch_size * num_groups.
          micro_batch_size: columns, examples in a full group, at least 1.
          num_groups: rows, at least 1.

        Returns:
          Indices, int32 [num_groups, micro_batch_size], and the real examples in each group,
          int32 [num_groups]: full groups, at most one ragged group, then empty ones.

        Raises:
          ValueError: if an argument is out of its range or the stretch does not fit.

        Example:
          >>> indices, sizes = Feed(num_examples=100, seed=0).grouped(0, 5, 2, 4)
          >>> indices.shape, sizes.tolist()
          ((4, 2), [2, 2, 1, 0])
        """
        columns = integer("Feed", "micro_batch_size", micro_batch_size, 1)
        rows = integer("Feed", "num_groups", num_groups, 1)
        count = integer("Feed", "length", length, 0)
        if count > rows * columns:
            raise ValueError(
                f"Feed: length must be at most micro_batch_size * num_groups = {columns} * {rows}, "
                f"got {count}"
            )
        grid = np.zeros(rows * columns, np.int32)
        grid[:count] = self.indices(start, count)
        sizes = np.clip(count - columns * np.arange(rows), 0, columns).astype(np.int32)
        return grid.reshape(rows, columns), sizes


# A batch that crosses an epoch needs two orders again and again; four serve two feeds at once.
@functools.lru_cache(maxsize=4)
def _order(num_examples: int, seed: int, epoch: int) -> npt.NDArray[np.int32]:
    """The permutation of one epoch, int32 [num_examples], read-only because it is shared."""
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
    # Two equal words are nearly impossible; a stable sort settles even those the same way always.
    order = np.argsort(words, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order
