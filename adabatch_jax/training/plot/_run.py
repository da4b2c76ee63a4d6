"""The picture of a run: loss, batch size and learning rate over the examples consumed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.lib.stride_tricks import sliding_window_view

from adabatch_jax.learning_rate import SmoothedLosses
from adabatch_jax.training._files import PathLike
from adabatch_jax.training.plot._style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    SOFT,
    add_legend,
    decimal,
    dress,
    finish,
    new_figure,
    say,
    short,
)
from adabatch_jax.training.plot._warmup import draw_smoothed, mark_switch

Floats = npt.NDArray[np.float64]

_STEPS = (1, 2, 2.5, 5, 10)  # distances between ticks
_MAX_POINTS = 4000  # more than the pixels of a line's width, few enough to draw and to store
_SMOOTH_FRACTION = 0.02  # of the rows: how far the smoothed loss looks to each side
_LEFT_REACH = 8  # rows
_NOISE_OCTAVES = 3.0  # how far the noise scale may widen the batch-size axis


def plot_run(
    rows: Mapping[str, Sequence[Any] | npt.NDArray[Any]],
    *,
    title: str = "",
    smoothed: SmoothedLosses | None = None,
    note: str = "",
    path: PathLike | None = None,
) -> Figure:
    """Draws a run in three panels over a shared axis of examples.

    Args:
      rows: column name → values, one per logged step, as `read_metrics` returns them: "examples"
        (consumed after the step, not decreasing), "loss", "batch_size", "learning_rate", and, if
        it is known, "noise_scale" (in examples). Not-finite values leave gaps. Other columns are
        ignored.
      title: headline of the figure.
      smoothed: what AutoWU saw, from `adabatch_jax.learning_rate.smoothed_losses`, with positions in
        examples: the smoothed loss with its band, and a line through all panels where the warm-up ended.
      note: a few words about the learning rate, above its panel.
      path: where to save the picture, atomically; its suffix gives the format (default png).

    Returns:
      The figure, which belongs to the caller alone: no pyplot, no global state.

    Raises:
      ValueError: if a column is missing, the columns differ in length or are empty, or the format
        is unknown.

    Example:
      >>> rows = dict(examples=[8, 24], loss=[2.0, 1.0], batch_size=[8, 16], learning_rate=[1, 1])
      >>> [axes.get_title(loc="left") for axes in plot_run(rows).axes]
      ['Loss', 'Batch size', 'Learning rate']
    """
    data = _columns(rows)
    figure = new_figure()
    panels: Sequence[Axes] = figure.subplots(3, 1, sharex=True, height_ratios=(1.25, 1.25, 1.0))
    for axes, name in zip(panels, ("Loss", "Batch size", "Learning rate"), strict=True):
        dress(axes, name)
    _draw_loss(panels[0], data)
    _draw_batch_size(panels[1], data)
    _draw_learning_rate(panels[2], data["examples"], data["learning_rate"])
    if smoothed is not None:
        _draw_warmup(panels, smoothed)
    if note:
        panels[2].set_title(note, loc="right", fontsize=9.5, color=SOFT)

    start, end = _start(data), data["examples"][-1]
    panels[2].set_xlim(start, end + 0.012 * (end - start))
    panels[2].xaxis.set_major_locator(MaxNLocator(nbins=8, steps=_STEPS, integer=True))
    panels[2].xaxis.set_major_formatter(FuncFormatter(lambda x, _: decimal(x)))
    panels[2].set_xlabel("Examples", color=INK)
    return finish(figure, title, path)


def _columns(rows: Mapping[str, Any]) -> dict[str, Floats]:
    names = ("examples", "loss", "batch_size", "learning_rate")
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError(f"plot_run: rows lacks the columns {', '.join(missing)}")
    data = {name: np.asarray(rows[name], np.float64) for name in names}
    noise = rows.get("noise_scale")
    data["noise_scale"] = np.full_like(data["loss"], np.nan)
    if noise is not None:
        data["noise_scale"] = np.asarray(noise, np.float64)
    lengths = {name: values.shape for name, values in data.items()}
    if len(set(lengths.values())) != 1 or data["examples"].ndim != 1 or not data["examples"].size:
        raise ValueError(f"plot_run: columns must be of one length of at least 1, got {lengths}")
    if not np.isfinite(data["examples"]).all() or (np.diff(data["examples"]) < 0).any():
        raise ValueError("plot_run: examples must be finite and must not decrease")
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in data.items()}


def _start(data: Mapping[str, Floats]) -> float:
    """Where the first row's batch begins: 0 for a whole run."""
    first, batch_size = data["examples"][0], data["batch_size"][0]
    return float(max(0.0, first - (batch_size if batch_size > 0 else 1.0)))


def _draw_loss(axes: Axes, data: Mapping[str, Floats]) -> None:
    examples, loss = data["examples"], data["loss"]
    known = ~np.isnan(loss)
    if not known.any():
        say(axes, "no finite loss")
        return
    smooth = _smooth(loss, round(_SMOOTH_FRACTION * len(loss)))
    marker = "o" if len(loss) == 1 else None
    axes.plot(*_thin(examples, loss), color=BLUE, alpha=0.28, linewidth=0.9)
    axes.plot(*_thin(examples, smooth), color=BLUE, linewidth=2.0, marker=marker, markersize=5.5)

    # A few spikes must not flatten the curve: the smoothed line and most of the raw one decide,
    # each row with the width it takes in the picture.
    widths = np.diff(examples, prepend=_start(data))[known]
    order = np.argsort(loss[known])
    share = np.cumsum(widths[order]) / max(widths.sum(), 1.0)
    near, far = np.interp([0.005, 0.995], share, loss[known][order])
    low = min(near, float(np.nanmin(smooth)))
    high = max(far, float(np.nanmax(smooth)))
    if low > 0 and high > 30 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(low / 1.2, high * 1.2)
    else:
        margin = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
    last = np.flatnonzero(known)[-1]
    _label(axes, examples[last], smooth[last], f"{smooth[last]:.3g}", BLUE, "right")


def _draw_batch_size(axes: Axes, data: Mapping[str, Floats]) -> None:
    examples = data["examples"]
    batch_size = np.where(data["batch_size"] > 0, data["batch_size"], np.nan)
    noise = np.where(data["noise_scale"] > 0, data["noise_scale"], np.nan)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _binary(y)))
    if np.isnan(batch_size).all():
        say(axes, "no batch size")
        return
    log_noise = np.log2(noise)
    has_noise = not np.isnan(noise).all()
    if has_noise:
        trend = np.exp2(_smooth(log_noise, round(_SMOOTH_FRACTION / 2 * len(noise))))
        x, y = _thin(examples, trend)
        marker = "o" if np.count_nonzero(~np.isnan(y)) == 1 else None
        axes.plot(x, y, color=SOFT, alpha=0.75, lw=1.2, marker=marker, ms=4, label="noise scale")
    # A row's batch ends at its examples, so its step reaches back to the row before it. Of equal
    # steps in a row only the last point counts.
    x, y = np.append(_start(data), examples), np.append(batch_size[0], batch_size)
    keep = np.append(y[:-1] != y[1:], True)
    keep[0] = True
    axes.plot(
        x[keep], y[keep], color=ORANGE, linewidth=2.0, drawstyle="steps-pre", label="batch size"
    )
    # The last batch takes what is left of the budget, and says nothing about the sizes.
    cut = len(batch_size) > 1 and y[-1] < y[-2]
    whole = y[:-1] if cut else y
    low, high = float(np.nanmin(whole)), float(np.nanmax(whole))
    _set_octaves(axes, low, high, log_noise[~np.isnan(log_noise)])
    if low == high:
        text = f"{high:,.0f}, the last {y[-1]:,.0f}" if cut else f"{high:,.0f} throughout"
        _label(axes, x[len(whole) - 1], high, text, ORANGE, "right")
    else:
        begin = x[np.nanargmax(batch_size)]
        left = begin - x[0] < 0.6 * (x[-1] - x[0])  # the text must not leave the panel
        _label(axes, begin, high, f"max {high:,.0f}", ORANGE, "left" if left else "right")
    if has_noise:
        add_legend(axes)


def _set_octaves(axes: Axes, low: float, high: float, log_noise: Floats) -> None:
    """Room for the batch sizes, for a label, and for the noise as far as it does not dwarf them."""
    bottom, top = math.log2(low), math.log2(high)
    if log_noise.size:
        near, far = np.percentile(log_noise, [2, 98])
        bottom = min(bottom, max(near, bottom - _NOISE_OCTAVES))
        top = max(top, min(far, top + _NOISE_OCTAVES))
    margin = max(0.5, (3.0 - (top - bottom)) / 2)  # a constant batch gets three octaves
    bottom, top = bottom - margin, top + max(margin, 0.14 * (top - bottom))
    axes.set_ylim(2**bottom, 2**top)
    octaves = range(math.ceil(bottom), math.floor(top) + 1)
    stride = math.ceil(len(octaves) / 7)
    axes.yaxis.set_major_locator(FixedLocator([2.0**k for k in octaves if k % stride == 0]))


def _label(axes: Axes, x: float, y: float, text: str, color: str, side: str) -> None:
    """A dot on a line with its value above, readable over whatever lies behind it."""
    axes.plot([x], [y], "o", color=color, markersize=6, markeredgecolor="white", zorder=3.5)
    axes.annotate(
        text, (x, y), xytext=(-3 if side == "left" else 3, 7), textcoords="offset points",
        ha=side, fontsize=9.5, fontweight="bold", color=color, zorder=4,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip


def _draw_learning_rate(axes: Axes, examples: Floats, learning_rate: Floats) -> None:
    known = learning_rate[~np.isnan(learning_rate)]
    if not known.size:
        say(axes, "no finite learning rate")
        return
    marker = "o" if len(learning_rate) == 1 else None
    axes.plot(
        *_thin(examples, learning_rate), color=GREEN, linewidth=2.0, marker=marker, markersize=5
    )
    low, high = min(0.0, float(known.min())), max(0.0, float(known.max()))
    room = 0.1 * (high - low) or 1.0
    axes.set_ylim(low - room if low < 0 else 0.0, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))


def _draw_warmup(panels: Sequence[Axes], smoothed: SmoothedLosses) -> None:
    if smoothed.grid.size:
        limits = panels[0].get_ylim()
        draw_smoothed(panels[0], smoothed)
        panels[0].set_ylim(limits)
    for axes in panels:
        mark_switch(axes, smoothed, text=axes is panels[0])
    if smoothed.grid.size:
        add_legend(panels[0])


def _smooth(values: Floats, reach: int) -> Floats:
    """Running median of five, then twice a running mean over `reach` rows to each side.

    The median takes out lone spikes. At the left end the mean reaches hardly further right than
    left: the loss falls steeply there, and the line would start too low. Gaps stay gaps.
    """
    known = ~np.isnan(values)
    line = values[known]
    if reach == 0 or line.size < 5:
        return values
    row = np.arange(line.size)
    line = np.median(sliding_window_view(np.pad(line, 2, mode="reflect"), 5), axis=1)
    first = np.maximum(row - reach, 0)
    last = np.minimum(row + np.minimum(reach, np.maximum(row, _LEFT_REACH)) + 1, line.size)
    for _ in range(2):
        sums = np.append(0.0, np.cumsum(line))
        line = (sums[last] - sums[first]) / (last - first)
    smooth = np.full_like(values, np.nan)
    smooth[known] = line
    return smooth


def _thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most `_MAX_POINTS` points: lowest and highest of each stretch, so that spikes survive."""
    stretch = math.ceil(2 * len(x) / _MAX_POINTS)
    if stretch <= 2:
        return x, y
    whole = len(x) // stretch * stretch
    blocks = y[:whole].reshape(-1, stretch)
    low = np.where(np.isnan(blocks), np.inf, blocks).argmin(axis=1)
    high = np.where(np.isnan(blocks), -np.inf, blocks).argmax(axis=1)
    starts = np.arange(0, whole, stretch)
    keep = np.unique(np.concatenate([[0], starts + low, starts + high, [len(x) - 1]]))
    return x[keep], y[keep]


def _binary(number: float) -> str:
    """Powers of two as people say them: 512, 1k, 64k, 1M."""
    for exponent, suffix in ((30, "G"), (20, "M"), (10, "k")):
        if number >= 2**exponent:
            return f"{number / 2**exponent:g}{suffix}"
    return f"{number:g}"
