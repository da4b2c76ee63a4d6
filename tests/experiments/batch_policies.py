"""AdAdaGrad's experiment again: every policy for the batch size against constant batches.

    python tests/experiments/batch_policies.py            # about three hours on two CPU cores
    python tests/experiments/batch_policies.py --tasks "fashion-mnist mlp adagrad"    # a quarter of an hour
    python tests/experiments/batch_policies.py --choices  # the norm test's η, rule, estimator: 20 minutes
    python tests/experiments/batch_policies.py --full     # CNN and residual network, for a GPU

Fashion-MNIST and MNIST (`--mnist FOLDER`, where its IDX files lie elsewhere), MLP and logistic regression,
AdaGrad and AdaGrad-Norm at a constant rate, from 64 examples to 4096 at most, three epochs of the first
50,000 training images. The last 10,000 choose the learning rate, for every policy by itself, with one
seed: a grid of factors of two that grows until its best lies inside. Then three seeds at that rate.
Every run is kept in runs/batch-policies/runs.json: an interrupted command goes on where it stopped.
Printed, and saved beside it: table.md, table.csv and for every task a picture of accuracy against optimizer
steps. Every point has used the same examples, but for a part of a batch, so the line through the constant
batches is the frontier: a policy is worth its trouble where it lies above. Seconds are those of the
compiled loop, and depend on what else the machine does.

Expected (Fashion-MNIST, MLP, AdaGrad): constant batches give 0.867, 0.861, 0.839 and 0.811 in 2344, 586,
147 and 37 steps. The norm test moves along this line, 0.843 in 183 steps at η = 1, or just below it, 0.821
in 74 at η = 0.5; so does the augmented test, 0.848 in 222. Above it lie, by half a point, the norm test
with the rate × √b, 0.860 in 364, and CABS, 0.861 in 367, and by a hair the inner-product test and a ramp,
0.865 in 1129 and 1027. Below it: the noise scale, 0.834 in 225, and the coordinate test, 0.859 in 2040.

Of the norm test's choices: η = 0.25, 0.5, 1 take 50, 74, 183 steps (0.811, 0.821, 0.843), with the rate
× √b 59, 107, 364 (0.823, 0.836, 0.860); at η = 2 and 4 the batch never grows, since noise inflates the
gradient's own length. The rest of the choices has not been run yet.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
from batch_policies_runs import CHOICES, POLICIES, Task, run
from common import run_all, save_table

from adabatch_jax.training._plot_style import BLUE, ORANGE, dress, finish, new_figure

SEEDS = (0, 1, 2)
GRIDS = {"adagrad": (0.01, 0.02, 0.04), "adagrad-norm": (1.0, 2.0, 4.0)}  # where they begin
MOST_RATES = 9
QUICK = [
    (dataset, model, optimizer)
    for dataset in ("fashion-mnist", "mnist")
    for model in ("mlp", "logistic")
    for optimizer in GRIDS
]
FULL = [("fashion-mnist", model, optimizer) for model in ("cnn", "resnet") for optimizer in GRIDS]
FULL_POLICIES = [p for p in POLICIES if p.startswith(("constant", "norm", "augmented"))]
BESIDE_CHOICES = [p for p in POLICIES if p.startswith("constant")]
COLUMNS = {  # of a result: its format, and what the table calls it
    "accuracy": (".4f", "test accuracy"),
    "steps": (".0f", "optimizer steps"),
    "average_batch": (".0f", "average batch"),
    "largest_batch": (".0f", "largest batch"),
    "train_loss": (".4f", "training loss"),
    "test_loss": (".4f", "test loss"),
    "train_seconds": (".1f", "seconds"),
}

Done = dict[str, Any]


def key(task: Task, policy: str, rate: float, seed: int) -> str:
    return f"{task} | {policy} | {rate:g} | seed {seed}"


def search(task: Task, policy: str, done: Done) -> tuple[list[float], float | None]:
    """The grid as far as it is known, and its best rate once that lies inside."""
    rates = list(GRIDS[task.optimizer])
    while all(key(task, policy, rate, SEEDS[0]) in done for rate in rates):
        values = [done[key(task, policy, rate, SEEDS[0])]["validation"] for rate in rates]
        best = int(np.argmax(np.nan_to_num(values)))
        if 0 < best < len(rates) - 1 or len(rates) >= MOST_RATES:
            return rates, rates[best]
        rates = [rates[0] / 2, *rates] if best == 0 else [*rates, rates[-1] * 2]
    return rates, None


def wanted_runs(tasks: list[Task], policies: list[str], folder: str | None, done: Done) -> Any:
    """Policy after policy: first the grid, then, once its best is known, the other seeds."""
    runs = []
    for task in tasks:
        for policy in policies:
            rates, best = search(task, policy, done)
            seeds = [(rate, SEEDS[0]) for rate in rates]
            seeds += [] if best is None else [(best, seed) for seed in SEEDS[1:]]
            for rate, seed in seeds:
                made = functools.partial(run, task, policy, rate, seed, folder)
                runs.append((key(task, policy, rate, seed), made))
    return runs


def finished(task: Task, policy: str, done: Done) -> tuple[float, list[Done]] | None:
    """The rate and the runs of all seeds; None as long as one is missing."""
    _, best = search(task, policy, done)
    keys = [] if best is None else [key(task, policy, best, seed) for seed in SEEDS]
    return (best, [done[k] for k in keys]) if keys and all(k in done for k in keys) else None


def rows(tasks: list[Task], policies: list[str], done: Done) -> list[Done]:
    """A row for every policy that is finished: mean, lowest and highest of the seeds."""
    found = []
    for task in tasks:
        for policy in policies:
            if (result := finished(task, policy, done)) is None:
                continue
            rate, runs = result
            row = {"dataset": task.dataset, "model": task.model, "optimizer": task.optimizer}
            row |= {"epochs": task.epochs, "policy": policy, "learning_rate": f"{rate:g}"}
            row |= {"seeds": len(runs)}
            for name, (form, _) in COLUMNS.items():
                values = [r[name] for r in runs]
                row[name] = f"{np.mean(values):{form}}"
                row[f"{name}_lowest"] = f"{min(values):{form}}"
                row[f"{name}_highest"] = f"{max(values):{form}}"
            found.append(row)
    return found


def markdown(found: list[Done]) -> str:
    names = ["data", "model", "optimizer", "policy", "learning rate"]
    names += [shown for _, shown in COLUMNS.values()]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in found:
        cells = [row[k] for k in ("dataset", "model", "optimizer", "policy", "learning_rate")]
        for name in COLUMNS:
            low, high = row[f"{name}_lowest"], row[f"{name}_highest"]
            cells.append(row[name] if low == high else f"{row[name]} ({low} – {high})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(task: Task, found: list[Done], path: Path) -> None:
    """Accuracy against optimizer steps, at equal examples; constant batches are joined by a line."""
    figure = new_figure()
    axes = figure.subplots()
    dress(axes, "test accuracy against optimizer steps")
    constant = [r for r in found if r["policy"].startswith("constant")]
    axes.plot(*coordinates(constant), "o-", color=BLUE, label="constant batches")
    others = [r for r in found if r not in constant]
    points = list(zip(*coordinates(others), strict=True))
    for row in found:
        steps, accuracy = (float(row[name]) for name in ("steps", "accuracy"))
        if row not in constant:
            low, high = (float(row[f"accuracy_{end}"]) for end in ("lowest", "highest"))
            axes.vlines(steps, low, high, color=ORANGE, linewidth=1)
            axes.plot([steps], [accuracy], "o", color=ORANGE)
        label = row["policy"].removeprefix("constant ")
        side: dict[str, Any] = {"xytext": (5, -9)}
        if row in constant:
            side = {"xytext": (-5, 5), "ha": "right"}
        elif any(0.7 < s / steps < 1.4 and 0.0 < accuracy - a < 2e-3 for s, a in points):
            side = {"xytext": (5, 5)}  # there is another just below
        axes.annotate(label, (steps, accuracy), textcoords="offset points", size=8, **side)
    axes.set_xscale("log")
    axes.legend(frameon=False, loc="lower right")
    finish(figure, f"{task}: equal examples, mean of {len(SEEDS)} seeds", path)


def coordinates(found: list[Done]) -> tuple[list[float], list[float]]:
    return [float(r["steps"]) for r in found], [float(r["accuracy"]) for r in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, help="3, or 20 with --full")
    parser.add_argument("--tasks", nargs="+", help='such as "mnist mlp adagrad"; default: all')
    parser.add_argument("--policies", nargs="+", choices=POLICIES, help="default: all")
    parser.add_argument("--choices", action="store_true", help="the norm test's, on one task")
    parser.add_argument("--full", action="store_true", help="CNN and residual network: for a GPU")
    parser.add_argument("--mnist", metavar="FOLDER", help="where the IDX files of MNIST lie")
    parser.add_argument("--csv", type=Path, help="write the table here as well")
    parser.add_argument("--only-report", action="store_true", help="of the runs that there are")
    parser.add_argument("--out", type=Path, default=Path("runs/batch-policies"))
    options = parser.parse_args()
    epochs = options.epochs or (20 if options.full else 3)
    tasks = [Task(*names, epochs) for names in (FULL if options.full else QUICK)]
    if options.tasks:
        known = {" ".join((t.dataset, t.model, t.optimizer)): t for t in tasks}
        if unknown := [name for name in options.tasks if name not in known]:
            parser.error(f"--tasks {unknown[0]!r} is none of {', '.join(known)}")
        tasks = [known[name] for name in options.tasks]
    policies = options.policies or (FULL_POLICIES if options.full else list(POLICIES))
    if options.choices:
        tasks, policies = tasks[:1], [*BESIDE_CHOICES, *CHOICES]
    wanted = functools.partial(wanted_runs, tasks, policies, options.mnist)
    options.out.mkdir(parents=True, exist_ok=True)
    done = run_all(options.out / "runs.json", (lambda done: []) if options.only_report else wanted)
    found = rows(tasks, policies, done)
    if not found:
        print("no policy is finished yet")
        return
    table = markdown(found)
    save_table(found, table, options.out, options.csv)
    for task in tasks:
        of_task = [r for r in found if (r["dataset"], r["model"], r["optimizer"]) == names_of(task)]
        if any(r["policy"].startswith("constant") for r in of_task):
            draw(task, of_task, options.out / f"{'-'.join(names_of(task))}.png")
    print(table)


def names_of(task: Task) -> tuple[str, str, str]:
    return task.dataset, task.model, task.optimizer


if __name__ == "__main__":
    main()
