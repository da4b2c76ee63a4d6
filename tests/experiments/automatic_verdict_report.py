"""What `automatic_verdict.py` makes of its runs: the verdict, a table and a picture for every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from automatic_verdict_runs import Task
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from adabatch_jax.training.plot import BLUE, GREEN, ORANGE, SOFT, decimal, dress, finish, new_figure

Done = dict[str, Any]
POINTS, BITS, FEWER = 0.2, 0.01, 4  # the goal: as good within these, in so many times fewer steps


def judged(task: Task, rows: list[Done]) -> list[Done]:
    """Adds the distance from the best constant batch: points or bits, and steps."""
    best = next((row for row in rows if row["best"]), None)
    for row in rows:
        row |= {"better_by": None, "fewer_steps": None, "goal": ""}
        if best is None:
            continue
        gain = best["score"] - row["score"] if task.text else 100 * (row["score"] - best["score"])
        row |= {"better_by": gain, "fewer_steps": best["steps"] / row["steps"]}
        if row["way"].startswith("auto"):
            same = gain >= -(BITS if task.text else POINTS)
            row["goal"] = "met" if same and row["fewer_steps"] >= FEWER else "missed"
    return rows


def markdown(found: list[Done]) -> str:
    head = (
        "task, optimizer, way, score, better by, steps, fewer steps, largest batch, CPU s, to tune"
    )
    names = [*head.split(", "), "goal"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in found:
        score = f"{row['score']:.4f}"
        if row["seeds"] > 1:
            score += f" ({row['lowest']:.4f} – {row['highest']:.4f})"
        by = "–"
        if row["better_by"] is not None:
            unit, places = ("bits", 3) if row["task"] == "text" else ("points", 2)
            by = f"{row['better_by']:+.{places}f} {unit}"
        fewer = "–" if row["fewer_steps"] is None else f"{row['fewer_steps']:.1f} ×"
        tune = f"{row['runs_to_tune']} runs, {row['cpu_seconds_to_tune']:.0f} s"
        cells = [row["task"], row["optimizer"], row["way"] + (" (best)" if row["best"] else "")]
        cells += [score, by, f"{row['steps']:.0f}", fewer, f"{row['largest_batch']:.0f}"]
        cells += [f"{row['cpu_seconds']:.1f}", tune if row["runs_to_tune"] else "–", row["goal"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(task: Task, found: list[Done], path: Path) -> None:
    """Score against optimizer steps, at equal examples: a panel for every optimizer."""
    figure = new_figure()
    optimizers = list(dict.fromkeys(row["optimizer"] for row in found))
    down = -(-len(optimizers) // 2)
    figure.set_size_inches(8.0, 0.6 + 3.3 * down)
    panels = figure.subplots(down, 2, squeeze=False, sharey=True).ravel()
    for axes in panels[len(optimizers) :]:
        axes.set_visible(False)
    for axes, optimizer in zip(panels, optimizers, strict=False):
        dress(axes, optimizer)
        draw_panel(axes, [row for row in found if row["optimizer"] == optimizer], task.text)
    if task.text:  # fewer bits are better
        panels[0].invert_yaxis()
    panels[0].legend(frameon=False, loc="lower right", fontsize=8)
    score = "bits per byte, upside down," if task.text else "test accuracy"
    finish(figure, f"{task}: {score} against optimizer steps", path)


def draw_panel(axes: Axes, rows: list[Done], text: bool) -> None:
    autos = [row for row in rows if row["way"].startswith("auto")]
    constants = [row for row in rows if row not in autos]
    steps, scores = [[row[name] for row in constants] for name in ("steps", "score")]
    axes.plot(steps, scores, "o-", color=SOFT, label="constant batches, each tuned")
    for row in constants:
        at = row["steps"], row["score"]
        if row["best"]:
            axes.plot(*at, "o", color=BLUE, label="the best of them")
            goal = at[1] + (BITS if text else -POINTS / 100)
            axes.plot(at[0] / FEWER, goal, "<", color=GREEN, label="goal: this, or left of it")
        size = row["way"].split()[1]
        axes.annotate(size, at, (-4, 5), textcoords="offset points", size=8, ha="right")
    for row in autos:
        at = row["steps"], row["score"]
        axes.vlines(at[0], row["lowest"], row["highest"], ORANGE, linewidth=1)
        axes.plot(*at, "o", color=ORANGE, label="--auto" if row is autos[0] else None)
        axes.annotate(row["way"], at, (5, -11), textcoords="offset points", size=8)
    axes.set_xscale("log")
    axes.margins(0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: decimal(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
