"""Four ways in which the learning rate may follow a batch that grows.

    python tests/experiments/scaling_rules.py            # about a quarter of an hour on two CPU cores

Fashion-MNIST, MLP, the de-biased and smoothed norm test from 64 examples on, cosine decay over five
epochs of examples; momentum and Adam at the rate that suits 64 examples. For each rule three seeds:
test accuracy, optimizer steps, the largest batch size and factor, and for random-matrix the
transition batch size that it measured. Every run is kept in runs/scaling-rules/runs.json: an
interrupted command goes on where it stopped. The table is printed, and saved as table.md and table.csv.

Expected: the larger the factor, the smaller the batch that the test asks for, the more steps, and the
better the accuracy, on one curve for all rules: momentum 0.846 in 205 steps with none, 0.868 in 312 with
random-matrix (b* about 300), 0.875 in 384 with sqrt, 0.885 in 547 with linear; Adam 0.856, 0.870 (b* about
200), 0.881, 0.888 in 267, 375, 474, 597. Nothing diverges under linear: at these rates the largest stable
one is not reached, and the rule that keeps its share of it gives accuracy away.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from common import CSV_OPTION, run_all, save_tables

import adabatch_jax as adabatch
from adabatch_jax.training import TrainConfig, load_dataset, run_steps
from adabatch_jax.training.step import make_evaluation

RATES = {"momentum": 0.02, "adam": 0.001}  # at the first batch size
RULES = ("none", "sqrt", "linear", "random-matrix")
SEEDS = (0, 1, 2)


def run(optimizer: str, rule: str, seed: int, epochs: int) -> dict[str, Any]:
    config = TrainConfig(
        dataset="fashion-mnist",
        optimizer=optimizer,
        scaling=rule,
        learning_rate=RATES[optimizer],
        debias=True,
        ema_decay=0.9,
        initial_batch_size=64,
        max_batch_size=8192,
        epochs=epochs,
        seed=seed,
    )
    dataset = load_dataset("fashion-mnist")
    rows: list[dict[str, Any]] = []
    done = run_steps(config, dataset, rows.append)
    inputs, labels = jnp.asarray(dataset.test_inputs), jnp.asarray(dataset.test_labels)
    _, accuracy = make_evaluation(done.apply)(done.params, inputs, labels)
    shown = adabatch.metrics(done.opt_state)
    return {
        "accuracy": float(accuracy),
        "steps": len(rows),
        "batch_size": int(max(row["batch_size"] for row in rows)),
        "transition": float(shown.get("transition_batch_size", np.nan)),
        "largest_rate": float(max(row["learning_rate"] for row in rows)) / RATES[optimizer],
        "skipped": int(sum(row["skipped"] for row in rows)),
    }


def key(optimizer: str, rule: str, seed: int) -> str:
    return f"{optimizer} | {rule} | seed {seed}"


def table(done: dict[str, Any]) -> str:
    lines = [
        "| optimizer | rule | test accuracy | optimizer steps | largest batch | largest factor | b* |",
        "|---|---|---|---|---|---|---|",
    ]
    for optimizer in RATES:
        for rule in RULES:
            runs = [done[key(optimizer, rule, seed)] for seed in SEEDS]

            def cell(name: str, form: str, runs: list[dict[str, Any]] = runs) -> str:
                values = [r[name] for r in runs]
                low, mean, high = min(values), np.mean(values), max(values)
                return f"{mean:{form}} ({low:{form}} – {high:{form}})"

            transition = cell("transition", ".0f") if rule == "random-matrix" else "–"
            lines.append(
                f"| {optimizer} | {rule} | {cell('accuracy', '.4f')} | {cell('steps', '.0f')} | "
                f"{cell('batch_size', '.0f')} | {cell('largest_rate', '.1f')} | {transition} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling-rules"))
    parser.add_argument("--csv", **CSV_OPTION)
    options = parser.parse_args()

    def wanted(done: dict[str, Any]) -> list[tuple[str, Any]]:
        return [
            (
                key(optimizer, rule, seed),
                functools.partial(run, optimizer, rule, seed, options.epochs),
            )
            for seed in SEEDS
            for optimizer in RATES
            for rule in RULES
        ]

    result = table(run_all(options.out / "runs.json", wanted))
    save_tables(result, options.out, options.csv)
    print(result)


if __name__ == "__main__":
    main()
