"""The ladder of micro-batch sizes: small batches stay cheap, large ones efficient, few compilations.

A batch of b examples is cut into groups of one rung's micro-batch size. Rungs double, from the
initial batch size over the number of groups up to the largest micro-batch, and a batch uses the
largest rung that still leaves enough groups to measure noise. One compiled step serves all batch
sizes of a rung, because the number of groups is a traced loop bound.
"""

from __future__ import annotations

from typing import NamedTuple


class Rung(NamedTuple):
    """One compiled shape: at most `num_groups` groups of `micro_batch_size` examples."""

    micro_batch_size: int
    num_groups: int


def rung_for(
    batch_size: int,
    *,
    initial_batch_size: int,
    max_batch_size: int,
    max_micro_batch_size: int,
    noise_groups: int,
) -> Rung:
    """The rung for a batch: a function of sizes alone, never of time.

    Args:
      batch_size: examples of the step, between `initial_batch_size` and `max_batch_size`.
      initial_batch_size: the first batch size of the run; sets the lowest rung.
      max_batch_size: the largest; sets how many groups the top rung holds.
      max_micro_batch_size: most examples in one group.
      noise_groups: least number of groups in a batch (fewer only if the batch has fewer examples).

    Returns:
      The rung; every batch that maps to it fits into it.

    Example:
      >>> ladder = dict(initial_batch_size=64, max_batch_size=8192, max_micro_batch_size=256,
      ...               noise_groups=8)
      >>> for batch_size in (64, 200, 8192):
      ...     print(rung_for(batch_size, **ladder))
      Rung(micro_batch_size=8, num_groups=16)
      Rung(micro_batch_size=16, num_groups=16)
      Rung(micro_batch_size=256, num_groups=32)
    """
    micro = min(max(1, initial_batch_size // noise_groups), max_micro_batch_size)
    while 2 * micro <= max_micro_batch_size and 2 * micro * noise_groups <= batch_size:
        micro *= 2
    largest = max_batch_size
    if 2 * micro <= max_micro_batch_size:  # from here on the next rung takes over
        largest = min(largest, max(2 * micro * noise_groups, initial_batch_size))
    return Rung(micro, -(-largest // micro))


def rung_after(
    rung: Rung,
    *,
    initial_batch_size: int,
    max_batch_size: int,
    max_micro_batch_size: int,
    noise_groups: int,
) -> Rung | None:
    """The next rung that a growing batch comes to; None at the top. Arguments as for `rung_for`.

    Example:
      >>> ladder = dict(initial_batch_size=64, max_batch_size=8192, max_micro_batch_size=256,
      ...               noise_groups=8)
      >>> rung_after(Rung(micro_batch_size=8, num_groups=16), **ladder)
      Rung(micro_batch_size=16, num_groups=16)
      >>> rung_after(Rung(micro_batch_size=256, num_groups=32), **ladder) is None
      True
    """
    least = 2 * rung.micro_batch_size * noise_groups
    if 2 * rung.micro_batch_size > max_micro_batch_size or least > max_batch_size:
        return None
    return rung_for(
        least,
        initial_batch_size=initial_batch_size,
        max_batch_size=max_batch_size,
        max_micro_batch_size=max_micro_batch_size,
        noise_groups=noise_groups,
    )


def batch_sizes_of(
    rung: Rung,
    *,
    initial_batch_size: int,
    max_batch_size: int,
    max_micro_batch_size: int,
    noise_groups: int,
) -> tuple[int, int]:
    """The batch sizes that `rung_for` maps to this rung: from the first to before the second.

    Example:
      >>> ladder = dict(initial_batch_size=64, max_batch_size=8192, max_micro_batch_size=256,
      ...               noise_groups=8)
      >>> batch_sizes_of(Rung(micro_batch_size=16, num_groups=16), **ladder)
      (128, 256)
    """
    lowest = min(max(1, initial_batch_size // noise_groups), max_micro_batch_size)
    micro = rung.micro_batch_size
    low = 1 if micro == lowest else micro * noise_groups
    high = 2 * micro * noise_groups if 2 * micro <= max_micro_batch_size else max_batch_size + 1
    return low, high
