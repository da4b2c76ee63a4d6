"""Colours, ticks and words that the pictures share."""

from __future__ import annotations

import math
import os
import pathlib

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullLocator

from adabatch_jax.training._files import PathLike, atomic_path

BLUE, ORANGE, GREEN, PURPLE = "#2b6cb0", "#d9622b", "#2f8f6b", "#6b4fa3"
INK, TICKS, SOFT, GRID = "#1f2933", "#52606d", "#7b8794", "#e4e7eb"


def new_figure() -> Figure:
    """An empty page for several panels, which belongs to no pyplot."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.09)  # inches
    return Figure(figsize=(8.0, 7.2), dpi=150, facecolor="white", layout=layout)


def finish(figure: Figure, title: str, path: PathLike | None) -> Figure:
    """Headline, and the file, atomically, if there are any; its suffix gives the format (png)."""
    if title:
        figure.suptitle(title, x=0.015, ha="left", fontsize=14, fontweight="bold", color=INK)
    if path is not None:
        suffix = pathlib.Path(path).suffix.removeprefix(".") or "png"
        with atomic_path(path) as temporary:
            figure.savefig(os.fspath(temporary), format=suffix)
    return figure


def dress(axes: Axes, name: str) -> None:
    """Title, grid and spines of a panel."""
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.grid(True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=9.5, labelcolor=TICKS, pad=5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#cbd2d9")


def add_legend(axes: Axes) -> None:
    """One row above the panel, at the right."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2,
        ncols=max(len(labels), 1), frameon=False, fontsize=9.5, labelcolor=TICKS, handlelength=1.6,
        columnspacing=1.4,
    )  # fmt: skip


def say(axes: Axes, text: str) -> None:
    """A text where there is nothing to draw."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=SOFT)
    axes.yaxis.set_major_locator(NullLocator())


def decimal(number: float) -> str:
    """12000 as 12k."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{suffix}"
    return f"{number:g}"


def short(number: float) -> str:
    """0.05 and 2e-5 rather than 2e-05."""
    mantissa, e, exponent = f"{number:.6g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def significant(value: float, digits: int = 3) -> str:
    """Three digits and all of those before the point, two of a small number; ∞, and – for NaN."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    size = abs(value)
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if size >= 1e-3 or not size:
        return f"{value:#.{digits if size >= 0.01 or not size else 2}g}"
    return short(float(f"{value:.2g}"))
