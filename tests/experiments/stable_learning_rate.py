"""The largest stable learning rate and the smallest stable ε against the batch size, by bisection.

    python tests/experiments/stable_learning_rate.py      # 20 to 25 minutes on two CPU cores
    python tests/experiments/stable_learning_rate.py --parts local frozen

Fashion-MNIST, an MLP of 51k parameters, three seeds (initialisation, batches with replacement, data of
the curvature). θ₀ is the point after 928 steps of SGD at rate 0.02 and batch 64. What is stable:

* local: from θ₀, 128 steps (at batch 4096: 32) at a constant rate never raise the loss on 2048 training
  examples above 1.5 times that of θ₀. Adam's averages are filled first, by 200 steps of rate 0. This is
  what the formula speaks of, as far as the curvature stays what it is at θ₀ and the noise of the
  gradient does not raise the loss by itself.
* frozen: the linear recursion alone, v ← v − α G_b v, with the Gauss-Newton matrices of batches at θ₀
  (their λ₁ and ν² are within 1 % of the Hessian's, and they have no negative curvature), from the top
  eigenvector; Adam with D frozen too. Unstable: |v| doubles in the second 64 of 128 steps (at batches
  below 256 the mean log of two runs). No gradient noise, no adaptation of the curvature.
* global: from the initialisation, 30,000 examples, but 32 to 2048 steps, end with a loss below half of
  log 10. (Below the initial loss would count networks that died: they reach log 10.)
* damping: local, for Adam's ε at a fixed rate.

Expected, in octaves of measured / predicted: the frozen limit of SGD is the formula's from batch 256 up
(within 0.1), and 0.3 to 0.9 above it below: the formula bounds the mean square, which rare runs
dominate. With momentum and under Adam it is 0.2 to 1.2 above at every batch size, and the exponents below
b*·m are those of the abstract: 0.9 to 1.1 with momentum, 0.4 to 0.6 under Adam; above, 0. Without the
factor m = (1 + β)/(1 − β), by which momentum remembers the noise, the formula would be three octaves too
high at batches 1 and 4. The local limit is one octave below the formula in the smallest batches, where the
noise of the gradient raises the loss by itself, and for SGD nearly two above at 1024, since λ₁ falls to a
third on the way; λ₁ at the end of the run explains that of SGD, not that with momentum. Adam's at 4096 is
1.7 octaves below. The global limit is 2 to 4.4 octaves above. The smallest ε goes as B to −1.1 at a fixed
rate and to −0.5 at a rate ∝ √B, below b*·m, and as the rate to 1.2; where Adam's rate is stable by itself
there is none.

Every result is kept in runs.json: an interrupted command goes on where it stopped. The tables are
saved as table.md and table.csv, the figure as figure.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import CSV_OPTION, run_all, save_tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stability_runs import (
    METHODS,
    SEEDS,
    SIZES,
    damped_cases,
    damped_prediction,
    predicted,
    wanted,
)

from adabatch_jax.training.plot import BLUE, GREEN, INK, ORANGE, PURPLE, TICKS, dress


def cell(values: Any, show: Callable[[float], str] = lambda mean: f"{2.0**mean:.3g}") -> str:
    """Geometric mean of the seeds, standard error in octaves."""
    logs = np.log2(np.asarray(values, float))
    if np.isnan(logs).any():
        return "–"
    return f"{show(logs.mean())} ± {logs.std(ddof=1) / len(logs) ** 0.5:.2f}"


def gap(values: Any) -> str:
    return cell(values, lambda mean: f"{mean:+.2f}")


def at_margin(result: dict[str, Any], margin: float) -> list[float]:
    """The limit at another margin, on a line through the logs of what was tried."""
    found = []
    for tried in result["tried"]:
        rates, losses = (np.log(x) for x in zip(*sorted(tried), strict=True))
        i = int(np.argmax(losses > np.log(margin)))
        if i == 0:  # outside what was tried
            found.append(float("nan"))
            continue
        share = (np.log(margin) - losses[i - 1]) / (losses[i] - losses[i - 1])
        found.append(float(np.exp(rates[i - 1] + share * (rates[i] - rates[i - 1]))))
    return found


def slope(along: list[Any], limits: list[Any]) -> str:
    """The exponent, mean ± standard error of the seeds' fits."""
    if len(along) < 2:
        return "–"
    fits = np.polyfit(np.log2(along), np.log2(np.asarray(limits, float)), 1)[0]
    return f"{fits.mean():.2f} ± {fits.std(ddof=1) / len(fits) ** 0.5:.2f}"


def markdown(head: str, rows: list[list[str]]) -> str:
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def limits_of(done: dict[str, Any], kind: str, name: str) -> dict[int, dict[str, Any]]:
    return {b: done[k] for b in SIZES[kind] if (k := f"{kind} {b} | {name}") in done}


def rate_tables(done: dict[str, Any]) -> str:
    rates, ratios, exponents = [], [], []
    for name, method in METHODS.items():
        got = {kind: limits_of(done, kind, name) for kind in ("frozen", "local", "global")}
        factor = (1 + method.momentum) / (1 - method.momentum)
        noisy, flat = [], []
        for b, result in got["local"].items():
            known = done[f"curvature | adam {b}" if method.adaptive else "curvature | plain"]
            largest, noise = np.asarray(known["l1"]), np.asarray(known["nu2"])
            transition = noise / largest**2
            noisy += [b] if b < factor * transition.mean() else []
            flat += [b] if b >= 4 * factor * transition.mean() else []
            forms = [predicted(name, b, done, form) for form in ("", "piecewise", "without m")]
            cells = [cell(got[k][b]["limit"]) if b in got[k] else "–" for k in got]
            cells.insert(2, cell(at_margin(result, 3.0)))
            known = (largest, transition, *forms)
            rates.append([name, str(b), *(cell(v) for v in known), *cells])
            frozen = ["–", "–"]
            if b in got["frozen"]:
                frozen = [gap(got["frozen"][b]["limit"] / forms[i]) for i in (0, 2)]
            limit, fall = np.asarray(result["limit"]), np.asarray(result["end"]) / largest
            local = [gap(limit / forms[i]) for i in (0, 2)]
            ratios.append([name, str(b), *frozen, *local, cell(fall), gap(limit * fall / forms[0])])
        for regime, chosen in (("noise", noisy), ("saturated", flat)):
            forms = [[predicted(name, b, done, form) for b in chosen] for form in ("", "without m")]
            fits = [slope(chosen, values) for values in forms]
            for found in got.values():
                use = [b for b in chosen if b in found]
                fits.append(slope(use, [found[b]["limit"] for b in use]))
            exponents.append([name, regime, ", ".join(map(str, chosen)), *fits])
    return "\n".join([
        "Largest stable rate, geometric mean of the seeds ± standard error in octaves. λ₁ and b* of the",
        "Hessian, Adam's of D⁻¹H. Without m: ν² not times m = (1 + β)/(1 − β).\n",
        markdown(
            "method | B | λ₁ | b* | formula | piecewise | without m | frozen | local | "
            "local, margin 3 | global", rates),
        "log₂ of measured / predicted. Fall: λ₁ at the end of a run at the local limit / 1.1, over that "
        "at θ₀ (same D).",
        "Last column: the formula with that λ₁ and the same b*.\n",
        markdown(
            "method | B | frozen | frozen, without m | local | local, without m | fall | "
            "local, λ₁ at the end", ratios),
        "Exponent of the largest stable rate in B, ± standard error over seeds. Noise: B below b*·m;",
        "saturated: at least 4 times that. Global: of these, the B it was measured at.\n",
        markdown(
            "method | regime | B | formula | without m | frozen | local | global", exponents),
    ])  # fmt: skip


def damping_tables(done: dict[str, Any]) -> str:
    rows, exponents = [], []
    for title, cases in damped_cases().items():
        cases = [c for c in cases if f"damping {c[1]} | {c[0]:.4g}" in done]
        limits = [1.0 / np.asarray(done[f"damping {b} | {r:.4g}"]["limit"]) for r, b in cases]
        guesses = [damped_prediction(r, b, done) for r, b in cases]
        for (r, b), limit, guess in zip(cases, limits, guesses, strict=True):
            rows.append([title, f"{r:.4g}", str(b), cell(guess), cell(limit), gap(limit / guess)])
        along = [c[title.startswith("B")] for c in cases]
        small = sum(b < 200 for _, b in cases)  # below b*·m
        fits = [slope(along[:small], v[:small]) for v in (guesses, limits)]
        exponents.append([title, *fits, slope(along, limits)])
    return "\n".join([
        "Smallest stable ε of Adam. Predicted: rate / bound of ε ≫ √v̂.\n",
        markdown("along | rate | B | predicted | measured | log₂ ratio", rows),
        markdown("exponent along | predicted, B < 200 | measured, B < 200 | all", exponents),
    ])  # fmt: skip


def points(axes: Axes, limits: dict[int, Any], colour: str, marker: str, label: str) -> None:
    logs = np.log2(np.asarray(list(limits.values()), float)).reshape(-1, len(SEEDS))
    means, errors = logs.mean(1), logs.std(1, ddof=1) / len(SEEDS) ** 0.5
    bars = 2.0**means - 2.0 ** (means - errors), 2.0 ** (means + errors) - 2.0**means
    look = dict(color=colour, marker=marker, markersize=5, linewidth=1.2, capsize=2, label=label)
    axes.errorbar(list(limits), 2.0**means, bars, **look)


def draw_figure(done: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(12.0, 8.4), dpi=130, facecolor="white", layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    looks = {"frozen": (GREEN, "s"), "local": (BLUE, "o"), "global": (ORANGE, "^")}
    titles = ("SGD", "SGD, momentum 0.9", "Adam", "Adam: the smallest stable ε (dashed: predicted)")
    for axes, title in zip(panels, titles, strict=True):
        dress(axes, title)
        axes.set(xscale="log", yscale="log", xlabel="batch size")
        axes.set_xticks(SIZES["local"], [str(b) for b in SIZES["local"]])
        axes.minorticks_off()
    for axes, name in zip(panels, METHODS, strict=False):
        sizes = list(limits_of(done, "local", name))
        for form, style, label in (("", "-", "formula"), ("without m", "--", "without m")):
            if form == "" or name != "sgd":
                means = [predicted(name, b, done, form).mean() for b in sizes]
                axes.plot(sizes, means, style, color=INK, linewidth=1.4, label=label)
        for kind, look in looks.items():
            limits = {b: r["limit"] for b, r in limits_of(done, kind, name).items()}
            points(axes, limits, *look, kind)
        axes.set_ylabel("largest stable rate")
    for (title, cases), colour in zip(damped_cases().items(), (PURPLE, GREEN), strict=False):
        found = {b: (r, k) for r, b in cases if (k := f"damping {b} | {r:.4g}") in done}
        limits = {b: 1.0 / np.asarray(done[k]["limit"]) for b, (_, k) in found.items()}
        points(axes := panels[3], limits, colour, "o", title.split(", ")[1])
        means = [damped_prediction(r, b, done).mean() for b, (r, _) in found.items()]
        axes.plot(list(found), means, "--", color=colour, linewidth=1.2)
    for axes in panels:
        axes.legend(frameon=False, fontsize=9, labelcolor=TICKS)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path("runs/stable-learning-rate"))
    parser.add_argument("--csv", **CSV_OPTION)
    options = parser.parse_args()
    store = options.out / "runs.json"
    done = run_all(store, lambda done: wanted(done, options.parts))
    result = rate_tables(done) + "\n" + damping_tables(done)
    save_tables(result, options.out, options.csv)
    draw_figure(done, options.out / "figure.png")
    print(result)


if __name__ == "__main__":
    main()
