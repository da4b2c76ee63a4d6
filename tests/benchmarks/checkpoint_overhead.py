"""What saving the whole state every 100 steps costs a run, in wall-clock time.

    python tests/benchmarks/checkpoint_overhead.py

`adabatch-jax train` with the CNN on Fashion-MNIST, from 64 examples on, without and with
`--checkpoint-every 100`, in turns; `--repeats` times each. About ten minutes on two cores.

Expected: a ratio within the spread of the runs, below 1.05.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from adabatch_jax.training import TrainConfig, train
from adabatch_jax.training._files import write_json


def seconds(every: int | None, epochs: int, examples_at_most: int) -> tuple[float, int, int]:
    """Seconds of training, steps, and checkpoints that were begun."""
    with tempfile.TemporaryDirectory() as out, open(Path(out, "said"), "w") as said:
        config = TrainConfig(
            dataset="fashion-mnist",
            model="cnn",
            optimizer="adam",
            learning_rate=0.001,
            initial_batch_size=64,
            max_batch_size=examples_at_most,
            epochs=epochs,
            checkpoint_every=every,
            out=Path(out, "run"),
        )
        summary = train(config, console=Console(file=said)).summary
    steps = summary["optimizer_steps"]
    return summary["seconds"], steps, steps // every + 1 if every else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-batch-size", type=int, default=128)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks/checkpoint_overhead.json")
    )
    options = parser.parse_args()
    taken: dict[int | None, list[float]] = {None: [], options.every: []}
    for _ in range(options.repeats):
        for every, times in taken.items():
            time, steps, saved = seconds(every, options.epochs, options.max_batch_size)
            times.append(time)
            print(f"every {every}: {time:.1f} s, {steps} steps, {saved} checkpoints", flush=True)
    without, with_them = taken.values()
    ratios = [b / a for a, b in zip(without, with_them, strict=True)]
    print(
        f"with over without: {min(ratios):.3f} / {statistics.median(ratios):.3f} / {max(ratios):.3f}"
    )
    write_json(options.out, dict(without=without, with_checkpoints=with_them, ratios=ratios))


if __name__ == "__main__":
    main()
