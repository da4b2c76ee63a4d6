"""Predicted against measured extreme eigenvalues of batch curvature matrices, on Fashion-MNIST.

    python tests/experiments/batch_curvature.py             # both networks
    python tests/experiments/batch_curvature.py --nets mlp  # without the slow CNN

The full matrix is that of N = 8192 training examples, the batches are drawn from them without
replacement. Two networks, at initialisation and after three epochs of Adam; Hessian and Gauss-Newton
matrix. ν² and σ² come from probes and from fits at batch sizes 32, 128, 512, which are not judged.
λ₁′ is measured with a control variate: uᵀ H_b u of the full top vector u, whose mean is known.

Probes of the library: "ritz", "random", "fit". For comparison: "across" is "ritz" without the variance
of uᵀ H_i u itself, which moves λ₁′ up and down but not its mean; "gaps" divides what the noise carries
from u to each known Ritz vector by the gap λ₁ − λ_j instead of λ₁ (second order), "gaps, own λ′" by
λ₁′ − λ_j. "own across" is "across" along the vector of λ_P. "probe" takes σ² from products along u.

Expected: "ritz" within 3 % of λ₁′ at initialisation and 7 % after training, at every size; "random" sees
no rise at all (0.59 and 0.77 of λ₁′ at 16 after training); "fit" within 5 % for the MLP and 19 % for the
CNN, with errors of that size. Of λ₁′ − λ₁ alone "ritz" gives 1.1 to 1.9 times as much at initialisation
and 0.4 to 1.3 after training, since two errors nearly cancel: 33 to 61 % of ν² lies along u itself and does
not count, and λ₂ is close to λ₁ (0.5 to 0.9 of it). |λ_P′| is up to 39 times too large with the noise along
u, and within 26 % with that along its own vector. b* is 4 and 9 (MLP), 1 and 6 (CNN): no size is below it.

Every run is kept in runs/batch-curvature/runs.json, arrays beside it: an interrupted command goes on
where it stopped. The tables are printed and saved as table.md and table.csv, the picture as
batch-curvature.png. The MLP takes about eight minutes on two busy cores; the CNN's products cost ten times
as much.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
from batch_curvature_runs import (
    FITTED,
    JUDGED,
    MATRICES,
    NETS,
    SAMPLES,
    STATES,
    TOP,
    along,
    batches,
    full,
    key,
    noise,
    train,
)
from batch_curvature_theory import Case, inverse, mean_error, predictions
from common import CSV_OPTION, run_all, save_tables
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

import adabatch_jax as adabatch
from adabatch_jax.training.plot import BLUE, GREEN, INK, ORANGE, PURPLE, SOFT, dress


def show(mean: float, error: float) -> str:
    return f"{mean:.3g} ± {error:.1g}"


def ratio_table(cases: list[Case], what: str, names: list[str], found: dict[Any, Any]) -> list[Any]:
    """`what` as measured, and predicted over measured for every probe and batch size."""
    low, rise = what == "λ_P′", what == "λ₁′ − λ₁"
    lines = [["net", "B", what, *([] if rise else ["over the full"]), *names]]
    for case in cases:
        full = case.smallest if low else case.largest
        base = full if rise else 0.0
        for i, size in enumerate(JUDGED):
            sample = case.sample(size, "smallest") if low else case.controlled(size)
            mean, error = mean_error(sample - base)
            cells = [" ".join(case.name[:2]), size, show(mean, error)]
            cells += [] if rise else [f"{mean / full:.3f}"]
            for name in names:
                value, own = (part[i] for part in found[case.name]["low " * low + name])
                ratio = (value - base) / mean
                cells.append(show(ratio, np.hypot(own, ratio * error) / abs(mean)))
            lines.append(cells)
    return lines


def noise_table(cases: list[Case]) -> list[Any]:
    """What the noise along u₁ is made of."""
    lines = [
        ["matrix", "λ₁", "λ₂/λ₁", "λ_P", "ν² ritz", "ν² random", "along u₁ itself", "along u₂ … u₁₀",
         "effective rank", "1 % of examples hold", "b*", "b* across", "ν² across u_P"],
    ]  # fmt: skip
    for case in cases:
        level, error = case.with_error(lambda keep, c=case: c.noise(0, keep)[0])
        parts, (rank, share) = case.noise()[1] / level, case.rank()
        random = show(*mean_error(np.array(case.probes["random"])))
        star = float(adabatch.curvature.transition_batch_size(case.largest, level))
        lines.append([
            " ".join(case.name), f"{case.largest:.4g}", f"{case.values[1] / case.largest:.2f}",
            f"{case.smallest:.3g}", show(level, error), random if "hessian" in case.name else "",
            f"{parts[0]:.0%}", f"{parts[1:TOP].sum():.0%}", f"{rank:.1f}", f"{share:.0%}",
            show(star, star * error / level), f"{star * (1 - parts[0]):.3g}",
            f"{case.across(TOP):.3g}" if "hessian" in case.name else "",
        ])  # fmt: skip
    return lines


def overlap_table(cases: list[Case]) -> list[Any]:
    """The batch's top eigenvector against the full ones, and the spread of λ₁′ between batches."""
    lines = [
        ["matrix", "B", "λ₁′ uncontrolled", "its sd / mean", "⟨batch's, u₁⟩²", "1 − b*/𝔟",
         "inside u₁ … u₁₀", "residual / λ₁′", "residual / λ_P′"],
    ]  # fmt: skip
    for case in cases:
        for size in JUDGED:
            expected = max(0.0, 1 - case.noise()[0] * float(inverse(size)) / case.largest**2)
            tops = case.sample(size)
            worst = [
                f"{np.max(np.abs(case.sample(size, f'{end}_residual') / case.sample(size, end))):.0e}"
                for end in ("largest", "smallest")
            ]
            lines.append([
                " ".join(case.name), size, show(*mean_error(tops)),
                f"{tops.std(ddof=1) / tops.mean():.2f}",
                show(*mean_error(case.sample(size, "overlap"))), f"{expected:.3f}",
                f"{case.sample(size, 'inside').mean():.3f}", *worst,
            ])  # fmt: skip
    return lines


def markdown(title: str, lines: list[Any]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join([title, "", *(f"| {' | '.join(map(str, cells))} |" for cells in lines)])


def plot(cases: list[Case], path: Path) -> None:
    """A column for a network's state; λ₁′ and |λ_P′| of the Hessian, λ₁′ of the Gauss-Newton matrix."""
    rows = [
        ("hessian", "λ₁", {"ritz": BLUE, "random": SOFT, "fit": ORANGE, "gaps, own λ′": GREEN}),
        ("hessian", "|λ_P|", {"ritz": BLUE, "random": SOFT, "own across": GREEN}),
        ("gauss-newton", "λ₁", {"fit, P": ORANGE, "fit, P = 1": PURPLE, "probe": BLUE}),
    ]
    columns, sizes = len(cases) // 2, np.geomspace(JUDGED[0], JUDGED[-1], 60)
    figure = Figure(figsize=(3.6 * columns, 9.5), layout="constrained")  # no window, no backend
    for row, (matrix, what, colours) in zip(figure.subplots(3, columns), rows, strict=True):
        low = what != "λ₁"
        for axes, case in zip(row, [c for c in cases if c.name[2] == matrix], strict=True):
            dress(axes, f"{' '.join(case.name[:2])}, {matrix}: {what}")
            found = predictions(case, sizes)
            for name, colour in colours.items():
                curve = np.abs(found["low " * low + name][0])
                axes.plot(sizes, curve, color=colour, label=name)
            full = abs(case.smallest if low else case.largest)
            axes.axhline(full, color=INK, linewidth=0.8, linestyle="--", label="full matrix")
            for chosen, face, label in ((JUDGED, INK, "judged"), (FITTED, "white", "fitted")):
                samples = [
                    case.sample(b, "smallest") if low else case.controlled(b) for b in chosen
                ]
                means, errors = zip(*(mean_error(np.abs(x)) for x in samples), strict=True)
                axes.errorbar(
                    chosen, means, errors, fmt="o", color=INK, markersize=4,
                    markerfacecolor=INK if low else face, label=None if low and face != INK else label,
                )  # fmt: skip
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(JUDGED, [str(size) for size in JUDGED])
            bottom, top = axes.get_ylim()
            steps = (1, 2, 5) if top / bottom > 5 else (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
            ticks = [m * 10.0**e for e in range(-3, 5) for m in steps]
            axes.set_yticks([t for t in ticks if bottom <= t <= top])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(NullLocator())
        row[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("batch size", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--out", type=Path, default=Path("runs/batch-curvature"))
    parser.add_argument("--csv", **CSV_OPTION)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    keys = [(net, state, matrix) for matrix in MATRICES for net in options.nets for state in STATES]

    def wanted(done: dict[str, Any]) -> list[tuple[str, Any]]:
        later = functools.partial
        runs: list[tuple[str, Any]] = []
        for net in options.nets:
            runs.append((f"{net} train", later(train, net, options.out)))
            own = [at for at in keys if at[0] == net]
            for at in own:
                name = " | ".join(at[1:])
                runs.append((f"{net} full | {name}", later(full, *at, options.out)))
                runs.append((f"{net} along | {name}", later(along, *at, options.out)))
            for size in SAMPLES:  # what takes longest comes last
                runs += [(key(*at, size), later(batches, *at, size, options.out)) for at in own]
                if size == 256:
                    runs += [
                        (f"{net} noise | {s}", later(noise, net, s, options.out)) for s in STATES
                    ]
        return runs

    done = run_all(options.out / "runs.json", wanted)
    cases = [Case(*at, done, options.out) for at in keys]
    hessian, gauss_newton = ([c for c in cases if c.name[2] == matrix] for matrix in MATRICES)
    found = {case.name: predictions(case, JUDGED) for case in cases}
    tops = ["ritz", "random", "fit", "across", "gaps", "gaps, own λ′"]
    levels = ["fit, P", "fit, P = 1", "probe", "probe, across"]
    judged = [
        ("Hessian", hessian, "λ₁′", tops),
        ("Hessian", hessian, "λ₁′ − λ₁", tops),
        ("Hessian", hessian, "λ_P′", ["ritz", "random", "own across"]),
        ("Gauss-Newton", gauss_newton, "λ₁′", levels),
        ("Gauss-Newton", gauss_newton, "λ₁′ − λ₁", levels),
    ]
    tables = {
        f"{name}: predicted / measured {what}": ratio_table(own, what, probes, found)
        for name, own, what, probes in judged
    }
    tables["The noise"] = noise_table(cases)
    tables["Eigenvectors, spread, residuals of Lanczos"] = overlap_table(cases)
    text = "\n\n".join(markdown(*table) for table in tables.items())
    save_tables(text, options.out, options.csv)
    print(text)
    plot(cases, options.out / "batch-curvature.png")


if __name__ == "__main__":
    main()
