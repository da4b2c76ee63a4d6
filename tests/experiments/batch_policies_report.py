"""What `batch_policies.py` prints and draws of its rows, a row for every task and policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from adabatch_jax.training.plot import BLUE, ORANGE, dress, finish, new_figure

Done = dict[str, Any]
COLUMNS = {  # of a result: its format, and what the table calls it
    "accuracy": (".4f", "test accuracy"),
    "steps": (".0f", "optimizer steps"),
    "average_batch": (".0f", "average batch"),
    "largest_batch": (".0f", "largest batch"),
    "train_loss": (".4f", "training loss"),
    "test_loss": (".4f", "test loss"),
    "train_seconds": (".1f", "seconds"),
}


def names_of(row: Done) -> tuple[str, str, str]:
    """The task of a row."""
    return row["dataset"], row["model"], row["optimizer"]


def is_constant(row: Done) -> bool:
    return row["policy"].startswith("constant")


def coordinates(found: list[Done]) -> tuple[list[float], list[float]]:
    return [float(r["steps"]) for r in found], [float(r["accuracy"]) for r in found]


def markdown(found: list[Done]) -> str:
    """Every row: the mean, and in brackets lowest and highest of the seeds."""
    names = ["data", "model", "optimizer", "policy", "learning rate"]
    names += [shown for _, shown in COLUMNS.values()]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in found:
        cells = [*names_of(row), row["policy"], row["learning_rate"]]
        for name in COLUMNS:
            low, high = row[f"{name}_lowest"], row[f"{name}_highest"]
            cells.append(row[name] if low == high else f"{row[name]} ({low} – {high})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def distances(found: list[Done]) -> str:
    """Of every policy and task: points of accuracy above the line through the constant batches.

    The line is straight in the logarithm of the steps. Empty without two constant batches of a task.
    """
    tasks = list(dict.fromkeys(names_of(row) for row in found))
    above: dict[str, dict[Any, str]] = {}
    for task in tasks:
        rows = [row for row in found if names_of(row) == task]
        line = sorted(zip(*coordinates([r for r in rows if is_constant(r)]), strict=True))
        if len(line) < 2:
            continue
        at, height = np.array(line).T
        for row in rows:
            if not is_constant(row):
                (steps,), (accuracy,) = coordinates([row])
                points = 100.0 * (accuracy - np.interp(np.log(steps), np.log(at), height))
                above.setdefault(row["policy"], {})[task] = f"{points:+.1f} ({steps:.0f})"
    if not above:
        return ""
    lines = [
        "Points above the line through the constant batches (steps)",
        "",
        "| policy | " + " | ".join(map(" ".join, tasks)) + " |",
        "|---" * (1 + len(tasks)) + "|",
    ]
    for policy, cells in above.items():
        lines.append(f"| {policy} | " + " | ".join(cells.get(t, "–") for t in tasks) + " |")
    return "\n".join(lines)


def draw(task: str, found: list[Done], path: Path) -> None:
    """Accuracy against optimizer steps, at equal examples; constant batches are joined by a line."""
    figure = new_figure()
    axes = figure.subplots()
    dress(axes, "test accuracy against optimizer steps, equal examples, mean of the seeds")
    constant, others = [[r for r in found if is_constant(r) is wanted] for wanted in (True, False)]
    axes.plot(*coordinates(constant), "o-", color=BLUE, label="constant batches")
    for row in others:
        low, high = (float(row[f"accuracy_{end}"]) for end in ("lowest", "highest"))
        axes.vlines(float(row["steps"]), low, high, color=ORANGE, linewidth=1)
        axes.plot(*coordinates([row]), "o", color=ORANGE)
    axes.set_xscale("log")
    axes.margins(0.1)
    axes.legend(frameon=False, loc="lower right")
    figure.draw_without_rendering()  # places the axes, and with them what is asked below
    label_points(axes, constant + others)
    finish(figure, task, path)


def label_points(axes: Axes, found: list[Done]) -> None:
    """Names beside points: on the first side on which a name covers neither a point nor a name."""
    places = axes.transData.transform(np.column_stack(coordinates(found)))
    taken: list[Any] = []
    for row, *at in zip(found, *coordinates(found), strict=True):
        name = row["policy"].removeprefix("constant ")
        for x, y, side in ((-5, 5, "right"), (5, -9, "left"), (5, 5, "left"), (-5, -9, "right")):
            text = axes.annotate(name, at, (x, y), textcoords="offset points", size=8, ha=side)
            box = text.get_window_extent()
            if not (box.count_contains(places) or box.count_overlaps(taken)):
                break
            text.remove()
        else:
            text = axes.annotate(name, at, (5, -9), textcoords="offset points", size=8)
        taken.append(text.get_window_extent())
