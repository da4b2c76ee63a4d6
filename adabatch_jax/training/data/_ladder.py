"""The ladder of micro-batch sizes: small batches stay cheap, large ones efficient, few compilations.

A batch of b examples is cut into groups of one rung's micro-batch size. Rungs double, from the
initial batch size over the number of groups up to the largest micro-batch, and a batch uses the
largest rung that still leaves enough groups to measure noise. One compiled step serves all batch
sizes of a rung, because the number of groups is a traced loop bound.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from adabatch_jax import _validate

_ANY_SIZE = 2**31 - 1  # above every batch size


class Rung(NamedTuple):
    """One compiled shape: at most `num_groups` groups of `micro_batch_size` examples."""

    micro_batch_size: int
    num_groups: int


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The shapes into which the batches of a run are cut: a function of sizes alone, never of time.

    Args:
      initial_batch_size: the first batch size of the run; sets the lowest rung.
      max_batch_size: the largest; sets how many groups the top rung holds.
      max_micro_batch_size: most examples in one group.
      noise_groups: least number of groups in a batch (fewer only if the batch has fewer examples).

    Raises:
      ValueError: an argument is not a positive integer.

    Example:
      >>> ladder = Ladder(64, 8192, max_micro_batch_size=256, noise_groups=8)
      >>> for batch_size in (64, 200, 8192):
      ...     print(ladder.rung(batch_size))
      Rung(micro_batch_size=8, num_groups=16)
      Rung(micro_batch_size=16, num_groups=16)
      Rung(micro_batch_size=256, num_groups=32)
    """

    initial_batch_size: int
    max_batch_size: int
    max_micro_batch_size: int
    noise_groups: int

    def __post_init__(self) -> None:
        """Checks every size."""
        _validate.positive_int("Ladder", **vars(self))

    def rung(self, batch_size: int) -> Rung:
        """The rung for a batch.

        Args:
          batch_size: examples asked for; above `max_batch_size` it counts as that.

        Returns:
          The rung; every batch that maps to it fits into it.
        """
        batch_size = min(batch_size, self.max_batch_size)
        micro = self._lowest
        while 2 * micro <= self.max_micro_batch_size and self._least(2 * micro) <= batch_size:
            micro *= 2
        largest = self.max_batch_size
        if 2 * micro <= self.max_micro_batch_size:  # from here on the next rung takes over
            largest = min(largest, max(self._least(2 * micro), self.initial_batch_size))
        return Rung(micro, -(-largest // micro))

    def after(self, rung: Rung) -> Rung | None:
        """The next rung that a growing batch comes to; None at the top.

        Example:
          >>> ladder = Ladder(64, 8192, max_micro_batch_size=256, noise_groups=8)
          >>> ladder.after(Rung(micro_batch_size=8, num_groups=16))
          Rung(micro_batch_size=16, num_groups=16)
          >>> ladder.after(Rung(micro_batch_size=256, num_groups=32)) is None
          True
        """
        upper = 2 * rung.micro_batch_size
        if upper > self.max_micro_batch_size or self._least(upper) > self.max_batch_size:
            return None
        return self.rung(self._least(upper))

    def batch_sizes(self, rung: Rung) -> tuple[int, int]:
        """The batch sizes that have this rung: from the first to before the second.

        Those of the top rung have no end: the second is then 2**31 - 1.

        Example:
          >>> ladder = Ladder(64, 8192, max_micro_batch_size=256, noise_groups=8)
          >>> ladder.batch_sizes(Rung(micro_batch_size=16, num_groups=16))
          (128, 256)
        """
        micro = rung.micro_batch_size
        low = 1 if micro == self._lowest else self._least(micro)
        return low, _ANY_SIZE if self.after(rung) is None else self._least(2 * micro)

    @property
    def _lowest(self) -> int:
        """The micro-batch size of the lowest rung."""
        lowest = max(1, self.initial_batch_size // self.noise_groups)
        return min(lowest, self.max_micro_batch_size)

    def _least(self, micro_batch_size: int) -> int:
        """The smallest batch that has enough groups of this size."""
        return micro_batch_size * self.noise_groups
