"""`Peak`: which rate AutoWU takes from its warm-up, and how the run goes on from there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from adabatch_jax import _validate

PLACES = ("minimum", "earliest", "confirmed")
AT_LIMIT = ("last", "minimum")


@dataclasses.dataclass(frozen=True)
class Peak:
    """The learning rate that `scale_by_autowu` turns back to when its warm-up ends.

    α* = min(factor · rate of the minimum, last rate of the warm-up, bound by `max_relative_step`).
    The defaults are the paper's. Every number but `ramp_fraction` may be traced.

    Args:
      at: which rate counts as that of the minimum.

        * "minimum": where the smoothed loss is lowest.
        * "earliest": the lowest rate whose smoothed loss is within two posterior standard deviations of
          the minimum. In a flat valley chance decides where the lowest point lies, not where the valley
          begins.
        * "confirmed": the lower of the "earliest" rates of the last two tests.
      factor: > 0, on the rate of the minimum.
      max_relative_step: > 0; None: no bound. A step as long as the first ones changes the parameters by
        at most this part of their length: α* ≤ max_relative_step / max ‖d‖/‖w‖, over the first 24
        directions d. Only parameters w with at least two axes count, taken as no shorter than
        half of √(outputs); where they begin at zero there is no bound. A deep network may bear a rate for
        long without a rise of its loss, and learn little with it. Without a warm-up each of these
        arrays is a bound by itself, and the rate rises over those 24 steps: a rate without search.
        `update` then needs `params`.
      at_limit: what to do where the warm-up reaches its limit W before a test has ended it: go on with
        the "last" rate, or turn back to that of the "minimum" even so.
      ramp_fraction: ≥ 0. The rate rises linearly from a third of the peak to all of it, over this
        fraction of the time that the warm-up took. 0: it starts at the peak.
      hold_factor: in (0, 1], on the rate once per test interval while `cooldown_fraction` holds it.

    Raises:
      ValueError: a field out of range.

    Example:
      >>> import optax
      >>> from adabatch_jax.learning_rate import Peak, scale_by_autowu
      >>> def link(factor):
      ...     return scale_by_autowu(total_steps=100, steps_per_test=10, peak=Peak(factor=factor))
      >>> state = optax.inject_hyperparams(link)(factor=2.0).init({})  # a number of it, injected
      >>> float(state.hyperparams["factor"])
      2.0

    Source: Kim et al. (2021), arXiv 2107.05855, for the minimum, and their code for `hold_factor`; the
    rest is ours.
    """

    at: str = "minimum"
    factor: Any = 1.0
    max_relative_step: Any = None
    at_limit: str = "last"
    ramp_fraction: float = 0.0
    hold_factor: Any = 1.0

    def __post_init__(self) -> None:
        _validate.one_of("Peak", PLACES, at=self.at)
        _validate.one_of("Peak", AT_LIMIT, at_limit=self.at_limit)
        _validate.positive("Peak", factor=self.factor, hold_factor=self.hold_factor)
        if self.max_relative_step is not None:
            _validate.positive("Peak", max_relative_step=self.max_relative_step)
        _validate.between("Peak", 0.0, float("inf"), ramp_fraction=self.ramp_fraction)
        _validate.between("Peak", 0.0, 1.0, closed=True, hold_factor=self.hold_factor)

    def changed(self, where: str, peak: Peak | Mapping[str, Any] | None) -> Peak:
        """What a user's `peak=` makes of it: a `Peak` replaces all of it, a dict the fields it names.

        Raises:
          ValueError: it is neither, or names a field that there is not.
        """
        if isinstance(peak, Peak):
            return peak
        names = [field.name for field in dataclasses.fields(Peak)]
        changes = {} if peak is None else peak
        if not isinstance(changes, Mapping) or not set(changes) <= set(names):
            raise ValueError(
                f"{where}: peak must be a Peak, or a dict of some of {', '.join(names)}, got {peak!r}"
            )
        return dataclasses.replace(self, **changes)


PeakLike: TypeAlias = Peak | Mapping[str, Any] | None

# Of `scale_by_improved_autowu`. The rate of the earliest point as low, twice confirmed, is steady, and low:
# the peak lies four times above it. The loss is most curved just there, and so the rate rises to the peak.
IMPROVED_PEAK = Peak(at="confirmed", factor=4.0, at_limit="minimum", ramp_fraction=0.5)
