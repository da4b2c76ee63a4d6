"""What AutoWU saw: the losses of the warm-up, the smoothed curve with its band, the switch."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from adabatch_jax._types import PyTree
from adabatch_jax.learning_rate import SmoothedLosses, smoothed_losses
from adabatch_jax.training.plot._style import (
    BLUE,
    INK,
    PURPLE,
    add_legend,
    decimal,
    dress,
    say,
    short,
)

_BAND = 2.0  # standard deviations


def plot_warmup(opt_state: PyTree, *, axes: Axes | None = None) -> Axes:
    """Draws the losses of AutoWU's warm-up, the curve behind its decision, and where it switched.

    Args:
      opt_state: state of an optimizer with one `scale_by_autowu` in it, during or after the warm-up.
      axes: where to draw; None: the axes of a new figure (`axes.figure`), which belongs to no pyplot.

    Returns:
      The axes, over steps or examples by the clock of the schedule.

    Raises:
      ValueError: `opt_state` holds no `scale_by_autowu`, or several.

    Example:
      >>> import jax.numpy as jnp
      >>> import adabatch_jax as adabatch
      >>> link = adabatch.scale_by_autowu(total_steps=40, steps_per_test=10)
      >>> _, state = link.update({}, link.init({}), value=jnp.array(2.0))
      >>> plot_warmup(state).get_xlabel()
      'Steps'

    Source: as figure 1 of Kim et al. (2021), arXiv 2107.05855.
    """
    seen = smoothed_losses(opt_state)
    if axes is None:
        figure = Figure(figsize=(8.0, 4.0), dpi=150, facecolor="white", layout="constrained")
        axes = figure.subplots()
    dress(axes, "What AutoWU saw")
    axes.set_xlabel("Steps" if seen.by_steps else "Examples", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: decimal(x)))
    if not seen.losses.size:
        say(axes, "no finite loss")
        return axes
    axes.plot(
        seen.positions, seen.losses, ".", color=BLUE, alpha=0.45, markersize=4, label="losses"
    )
    low, high = seen.losses.min(), np.percentile(seen.losses, 99)
    if seen.grid.size:
        draw_smoothed(axes, seen)
        low, high = min(low, seen.mean.min()), max(high, seen.mean.max())
    mark_switch(axes, seen, text=True)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
    add_legend(axes)
    return axes


def draw_smoothed(axes: Axes, seen: SmoothedLosses) -> None:
    """The posterior mean, its band, and a dot at its minimum."""
    low, high = seen.mean - _BAND * seen.deviation, seen.mean + _BAND * seen.deviation
    axes.fill_between(seen.grid, low, high, color=PURPLE, alpha=0.2, linewidth=0, zorder=2.2)
    axes.plot(
        seen.grid,
        seen.mean,
        color=PURPLE,
        linewidth=1.6,
        label="smoothed, ± 2 deviations",
        zorder=2.3,
    )
    axes.plot(
        [seen.minimum], [seen.mean.min()], "o", color=PURPLE, markersize=6,
        markeredgecolor="white", label="minimum", zorder=3.6,
    )  # fmt: skip


def mark_switch(axes: Axes, seen: SmoothedLosses, *, text: bool = False) -> None:
    """A vertical line where the warm-up ended, if it has."""
    if np.isfinite(seen.end):
        label = "end of the warm-up" if text else None
        axes.axvline(
            seen.end, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label=label, zorder=2.1
        )
