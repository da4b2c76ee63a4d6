"""AdAdaGrad's experiment again: every policy for the batch size against constant batches.

    python tests/experiments/batch_policies.py            # about an hour on one CPU core
    python tests/experiments/batch_policies.py --tasks "fashion-mnist mlp adagrad"    # 20 minutes
    python tests/experiments/batch_policies.py --choices  # the norm test's η, rule, estimator: 20 minutes
    python tests/experiments/batch_policies.py --full     # CNN and residual network, for a GPU
    python tests/experiments/batch_policies.py --full --epochs 2 --tasks "fashion-mnist cnn adagrad"

Fashion-MNIST and MNIST (`--mnist FOLDER`, where its IDX files lie elsewhere), MLP and logistic regression,
AdaGrad and AdaGrad-Norm at a constant rate, from 64 examples to 4096 at most, three epochs of the first
50,000 training images. The last 10,000 choose the learning rate, for every policy by itself, with one
seed: a grid of factors of two that grows until its best lies inside. Then three seeds at that rate.
Every run is kept in runs/batch-policies/runs.json: an interrupted command goes on where it stopped.
Printed, and saved beside it: table.md, table.csv and for every task a picture of accuracy against optimizer
steps. Every point has used the same examples, but for a part of a batch, so the line through the constant
batches is the frontier: a policy is worth its trouble where it lies above, and the last table says by how
much. Seconds are those of the compiled loop, and depend on what else the machine does.

Expected: constant batches of 64, 256, 1024, 4096 (2344, 586, 147, 37 steps) give 0.867, 0.861, 0.839, 0.811
on Fashion-MNIST with the MLP and AdaGrad, 0.920, 0.921, 0.914, 0.905 on MNIST with logistic regression. The
norm test at η = 1 moves along this line, to 160 to 430 steps, and at η = 0.5 to 50 to 140, or stays up to a
point below it; so do the augmented and, in 830 to 1790 steps, the inner-product test. With the rate × √b it
is 0.5 to 1.0 points above the line on the four MLPs, and up to 1.2 below it with logistic
regression. A fixed ramp is on it or just above, CABS between +0.7 and −0.5. Below it: the noise scale (up
to 3.5 points) and the coordinate test (up to 2.3).

CNN and residual network, AdaGrad, two epochs: the norm test with rate × √b +0.7 and +0.9, at a constant
rate between −1.3 and +0.5, the augmented test −0.4 and +0.5; seeds differ by up to 6 points. An hour on
one core, and half an hour.

Of the norm test's choices, first task: at a constant rate η = 0.25, 0.5, 1 lie −0.6, −0.4, 0.0 points
above the line in 50, 74, 183 steps; with the rate × √b +0.2, +0.3, +0.6 in 59, 107, 364; with the rate × b
−0.6. At η = 2 and 4 the batch never grows, since noise inflates the gradient's own length. The estimator
matters little: single examples, 64, 16 and 4 groups, one sign vector lie 0.5 to 0.9 above in about 330
steps, seeds differ by 0.4; with 2 groups only 0.1. Smoothed, 4 groups take 486 steps, for +0.6.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
from batch_policies_report import COLUMNS, Done, distances, draw, markdown, names_of
from batch_policies_runs import CHOICES, POLICIES, Task, run
from common import run_all, save_table

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, help="3, or 20 with --full")
    parser.add_argument("--tasks", nargs="+", help='such as "mnist mlp adagrad"; default: all')
    parser.add_argument("--policies", nargs="+", choices=POLICIES, help="default: all")
    parser.add_argument("--choices", action="store_true", help="the norm test's, on one task")
    parser.add_argument("--full", action="store_true", help="CNN and residual network: for a GPU")
    parser.add_argument("--mnist", metavar="FOLDER", help="where the IDX files of MNIST lie")
    parser.add_argument(
        "--csv", type=Path, help="write the table here as well, beside other tasks'"
    )
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
    table = "\n\n".join(filter(None, (markdown(found), distances(found))))
    task_columns = ("dataset", "model", "optimizer", "epochs")
    save_table(found, table, options.out, options.csv, task_columns)
    for task in tasks:
        names = (task.dataset, task.model, task.optimizer)
        of_task = [row for row in found if names_of(row) == names]
        if any(r["policy"].startswith("constant") for r in of_task):
            draw(str(task), of_task, options.out / f"{'-'.join(names)}.png")
    print(table)


if __name__ == "__main__":
    main()
