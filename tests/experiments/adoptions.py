"""Three training scripts before and after the one line `grow_batch_size`, at equal examples.

    PYTHONPATH=. python tests/experiments/adoptions.py       # about eight minutes on two CPU cores

The scripts are in tests/dropin/scripts/: a residual network with batch normalisation under `pmap`
(momentum), a small GPT (clipping, AdamW with a mask, tokens, an average of the parameters), a trainer
class that knew `optax.MultiSteps` (Adam). Before: their constant batch. After: `grow_batch_size` with the
norm test at η of 1, 1.5, 2 and 3. Three seeds each, mean ± standard deviation. The first table compares
the test data before and after at the default η; the second shows the validation data, from which that
default was chosen.

Every run is kept in runs/adoptions/runs.json: an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from common import CSV_OPTION, Result, run_all, save_tables

import adabatch_jax as adabatch
from adabatch_jax.optimizers._grow_batch_size import ETA
from tests.dropin.scripts import gpt, resnet, trainer

SCRIPTS = {"trainer": trainer, "resnet": resnet, "gpt": gpt}
ETAS = (1.0, 1.5, 2.0, 3.0)
SEEDS = (0, 1, 2)
KEPT = ("loss", "accuracy", "loss_of_last", "validation_loss", "steps")


@functools.cache
def optimizer(script: ModuleType, eta: float | None) -> Any:
    """One for all seeds, so that the script is compiled once."""
    if eta is None:
        return script.before(script.EXAMPLES)
    return script.after(script.EXAMPLES, criterion=adabatch.norm_test(eta))


def run(name: str, eta: float | None, seed: int) -> Result:
    script = SCRIPTS[name]
    handed_in = script.HANDED_IN["before" if eta is None else "after"]
    result = script.run(optimizer(script, eta), handed_in, seed, script.EXAMPLES)
    kept = {key: result[key] for key in KEPT if key in result}
    if eta is not None:
        kept["batch_size"] = int(adabatch.metrics(result["opt_state"])["next_batch_size"])
    return kept


def key(name: str, eta: float | None, seed: int) -> str:
    return f"{name} | {'before' if eta is None else f'η = {eta:g}'} | seed {seed}"


def changed(script: ModuleType) -> int:
    """Lines of the script that say that they were changed."""
    return sum(line.endswith("# changed") for line in inspect.getsource(script).splitlines())


def tables(done: dict[str, Result]) -> str:
    def mean(name: str, eta: float | None, column: str, form: str) -> str:
        runs = [done[key(name, eta, seed)] for seed in SEEDS]
        values = [r[column] for r in runs if column in r]
        if not values:
            return "–"
        return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}"

    lines = [
        f"Before and after at η = {ETA:g}",
        "",
        "| script | lines changed | loss before | loss after | accuracy before | accuracy after | "
        "steps before | steps after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, script in SCRIPTS.items():
        cells = [
            mean(name, eta, column, form)
            for column, form in (("loss", ".4f"), ("accuracy", ".4f"), ("steps", ".0f"))
            for eta in (None, ETA)
        ]
        lines.append(f"| {name} | {changed(script)} | {' | '.join(cells)} |")
    choices = (None, *ETAS)
    header = " | ".join("constant" if eta is None else f"η = {eta:g}" for eta in choices)
    lines += ["", "Loss on validation data by η", "", f"| script | {header} |"]
    lines += ["|---" * (1 + len(choices)) + "|"]
    for name in SCRIPTS:
        losses = " | ".join(mean(name, eta, "validation_loss", ".4f") for eta in choices)
        steps = " | ".join(mean(name, eta, "steps", ".0f") for eta in choices)
        lines += [f"| {name}, loss | {losses} |", f"| {name}, steps | {steps} |"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/adoptions"))
    parser.add_argument("--csv", **CSV_OPTION)
    options = parser.parse_args()

    def wanted(done: dict[str, Result]) -> list[tuple[str, Any]]:
        return [
            (key(name, eta, seed), functools.partial(run, name, eta, seed))
            for name in SCRIPTS
            for eta in (None, *ETAS)
            for seed in SEEDS
        ]

    result = tables(run_all(options.out / "runs.json", wanted))
    save_tables(result, options.out, options.csv)
    print(result)


if __name__ == "__main__":
    main()
