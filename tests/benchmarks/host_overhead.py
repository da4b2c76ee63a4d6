"""What the host costs a step: one call for each step, against many steps in one call on the device.

    pip install ".[train]"
    python tests/benchmarks/host_overhead.py

`adabatch-jax train`'s own loop with AdaGrad and the norm test, on small models, with `--steps-per-call 1`
(and a lag of 0, or of 4 steps, which lets the host run ahead) and with 200, in turns. Microseconds a step
are taken after the first fifth of the steps, so without compilation; overhead is the difference to 200
steps in one call, whose numbers are read together. Two cores: about two minutes.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from adabatch_jax.training import Dataset, TrainConfig, load_dataset, resolve
from adabatch_jax.training._files import write_json
from adabatch_jax.training._loop import Run

PROBLEMS: dict[str, dict[str, Any]] = {
    "digits, logistic, batch 16": dict(model="logistic", initial_batch_size=16, epochs=40),
    "digits, MLP, batch 16": dict(initial_batch_size=16, epochs=40),
    "digits, MLP, batch 128": dict(initial_batch_size=128, epochs=150),
    "Fashion-MNIST, MLP, batch 64": dict(dataset="fashion-mnist", initial_batch_size=64, epochs=1),
}
WAYS = {
    "a call each": dict(steps_per_call=1),
    "a call each, lag 4": dict(steps_per_call=1, lag=4),
    "200 in a call": dict(steps_per_call=200),
}


def microseconds(config: TrainConfig, dataset: Dataset) -> float:
    """Of a step, once everything is compiled."""
    run, rows = Run(resolve(config, len(dataset.train_labels)), dataset), []
    run(run.first, rows.append)
    first = rows[len(rows) // 5]["seconds"]
    after = [row["seconds"] for row in rows if row["seconds"] > first]
    return 1e6 * (after[-1] - first) / len(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/host_overhead.json"))
    options = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {}
    print("| run | way | µs a step: min / median / max | overhead, µs | over 200 in a call |")
    print("|---|---|---|---|---|")
    for name, problem in PROBLEMS.items():
        dataset = load_dataset(problem.get("dataset", "digits"))
        size = problem["initial_batch_size"]
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options.repeats):
            for way, given in WAYS.items():
                # η so large that the batch stays, but is tested in every step.
                config = TrainConfig(**problem, max_batch_size=2 * size, eta=1e6, **given)
                taken[way].append(microseconds(config, dataset))
        results[name] = taken
        write_json(options.out, results)
        base = statistics.median(taken["200 in a call"])
        for way, times in taken.items():
            middle = statistics.median(times)
            spread = " / ".join(f"{f(times):.0f}" for f in (min, statistics.median, max))
            print(f"| {name} | {way} | {spread} | {middle - base:.0f} | {middle / base:.2f} |")


if __name__ == "__main__":
    main()
