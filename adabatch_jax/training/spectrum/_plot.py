"""The picture of a spectrum: its density with the ends, and batches against the prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from adabatch_jax.curvature import SpectralDensity
from adabatch_jax.training._files import PathLike
from adabatch_jax.training.plot import (
    BLUE,
    INK,
    ORANGE,
    PURPLE,
    SOFT,
    add_legend,
    dress,
    finish,
    new_figure,
    say,
    short,
)
from adabatch_jax.training.spectrum._theory import predicted

_MATRIX = {"hessian": "Hessian", "gauss-newton": "Gauss-Newton matrix"}
_DOTTED = (0, (1, 2))
_POINTS = 200  # of the predicted curve


def plot_spectrum(
    summary: Mapping[str, Any],
    density: SpectralDensity,
    *,
    title: str = "",
    path: PathLike | None = None,
) -> Figure:
    """Draws the density of the full matrix, and the ends of batch matrices over the batch size.

    Args:
      summary: of `measure_spectrum`.
      density: of the full matrix.
      title: headline of the figure.
      path: where to save the picture, atomically; its suffix gives the format (default png).

    Returns:
      The figure, which belongs to the caller alone: no pyplot, no global state.

    Raises:
      ValueError: the format is unknown.
    """
    figure = new_figure()
    upper, lower = figure.subplots(2, 1, height_ratios=(1.0, 1.25))
    _draw_density(upper, summary, density)
    _draw_batches(lower, summary)
    return finish(figure, title, path)


def _draw_density(axes: Axes, summary: Mapping[str, Any], density: SpectralDensity) -> None:
    matrix, examples = _MATRIX[summary["matrix"]], summary["examples"]
    dress(axes, f"Spectral density: {matrix} of {examples:,} examples")
    grid, values = np.asarray(density.grid), np.asarray(density.density)
    error = np.nan_to_num(np.asarray(density.standard_error))
    # The height of one eigenvalue: what lies far below is the tail of a Gaussian, not of the matrix.
    bound = max(float(summary["full"]["largest"] - summary["full"]["smallest"]), 1e-12)
    floor = 0.1 / (summary["num_parameters"] * 0.01 * bound * math.sqrt(2 * math.pi))
    axes.set_yscale("log")
    low, high = np.maximum(values - error, floor), np.maximum(values + error, floor)
    axes.fill_between(grid, low, high, color=BLUE, alpha=0.25, linewidth=0)
    axes.plot(grid, np.maximum(values, floor), color=BLUE, linewidth=1.6)
    axes.set_ylim(floor, 12 * max(float(values.max()), floor))
    for name, symbol, side in (("smallest", "$λ_P$", "left"), ("largest", "λ₁", "right")):
        value = summary["full"][name]
        axes.axvline(value, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=2.1)
        axes.annotate(
            f"{symbol} = {short(float(f'{value:.3g}'))}", (value, 1.0),
            xycoords=axes.get_xaxis_transform(), xytext=(4 if side == "left" else -4, -5),
            textcoords="offset points", ha=side, va="top", fontsize=9.5, color=INK,
        )  # fmt: skip
    axes.set_xlim(float(grid[0]), float(grid[-1]))
    axes.set_xlabel("Eigenvalue", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_batches(axes: Axes, summary: Mapping[str, Any]) -> None:
    dress(axes, "Ends of a batch's spectrum")
    rows: Sequence[Mapping[str, Any]] = summary["batches"]
    sizes = np.array([row["batch_size"] for row in rows])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    many = sizes[0] < sizes[-1]
    ends = (sizes[0] / 1.3, sizes[-1] * 1.3) if many else (sizes[0] / 2, sizes[0] * 2)
    curve = np.geomspace(*ends, _POINTS)
    shown: list[float] = []
    drawn: list[tuple[str, str]] = []
    series = [("largest", 1.0, ORANGE, "λ₁")]
    if summary["matrix"] == "hessian":
        series.append(("smallest", -1.0, PURPLE, "$|λ_P|$"))
    for index, (name, sign, color, symbol) in enumerate(series):
        full = sign * summary["full"][name]
        values = sign * np.array([row[name] for row in rows])
        error = np.nan_to_num(np.array([row[f"{name}_standard_error"] for row in rows]))
        theory = sign * predicted(summary, curve)[index]
        seen, known = values > 0, theory > 0
        if not seen.any():
            continue
        drawn.append((symbol, color))
        if known.any():
            axes.plot(curve[known], theory[known], color=color, linewidth=1.8)
            shown += theory[known].tolist()
        axes.errorbar(
            sizes[seen], values[seen], np.minimum(error, 0.99 * np.abs(values))[seen], fmt="o",
            color=color, markersize=5.5, capsize=2.5, elinewidth=1.3, markeredgecolor="white",
            zorder=3,
        )  # fmt: skip
        shown += values[seen].tolist()
        if full > 0:
            axes.axhline(full, color=color, linewidth=1.0, linestyle=_DOTTED, zorder=2.1)
            shown.append(full)
    if not shown:
        say(axes, "no batch has an eigenvalue of the sign expected")
        return
    axes.set_ylim(min(shown) / 1.25, max(shown) * 1.25)
    axes.set_xlim(*ends)
    _mark_transition(axes, summary["transition_batch_size"], ends)
    stride = math.ceil(len(sizes) / 10)
    axes.xaxis.set_major_locator(FixedLocator(sizes[::stride].tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
    axes.set_xlabel("Batch size", color=INK)
    for symbol, color in drawn:
        axes.plot([], [], color=color, linewidth=4, label=symbol)
    axes.plot([], [], color=SOFT, linewidth=1.8, label="theory")
    axes.plot([], [], "o", color=SOFT, markersize=5.5, label="measured")
    axes.plot([], [], color=SOFT, linewidth=1.0, linestyle=_DOTTED, label="all examples")
    add_legend(axes)


def _mark_transition(axes: Axes, size: float, ends: tuple[float, float]) -> None:
    """A line where λ₁′ = 2 λ₁, if that is in the panel."""
    if ends[0] < size < ends[1]:
        axes.axvline(size, color=SOFT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=2.1)
        axes.annotate(
            f"b* = {size:.0f}", (size, 1.0), xycoords=axes.get_xaxis_transform(),
            xytext=(4, -5), textcoords="offset points", va="top", fontsize=9.5, color=SOFT,
        )  # fmt: skip
