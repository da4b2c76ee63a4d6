"""A run that is killed twenty times and resumed ends in the same bits as one that is left alone.

    python tests/experiments/kill_and_resume.py

About ten minutes on two cores. The run is `adabatch-jax train --auto` on the digits: the batch grows and
AutoWU finds the rate. It is killed by SIGKILL while a checkpoint is being written, while a step is
compiled, right after a decision to grow, in the warm-up, and at random moments, always before 90 % of
its examples; each time `--resume auto` goes on. Whether a kill met what it aimed at is seen afterwards:
in a folder that Orbax had not finished, in a compilation that never ended.

Expected: 0 differences in the parameters and in metrics.csv, its column of seconds excepted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

AIMS = {"warm-up": 3, "growth": 3, "save": 5, "compilation": 3, "any moment": 6}
LATEST = 0.9  # of the run


def child(out: Path, epochs: int, every: int) -> None:
    """The run itself, which says on standard output what it is doing."""
    import jax

    from adabatch_jax.training import TrainConfig, train
    from adabatch_jax.training.checkpoint import _run_checkpoints
    from adabatch_jax.training.record import _rows
    from adabatch_jax.training.step import _compile_ahead

    def say(*words: Any) -> None:
        os.write(1, (" ".join(map(str, words)) + "\n").encode())

    compile_, save, read = (
        _compile_ahead._compile,
        _run_checkpoints.Checkpoints.save,
        _rows.RowReader.__call__,
    )

    def noted_compilation(lowered: Any) -> Any:
        say("compiling")
        result = compile_(lowered)
        say("compiled")
        return result

    def noted_save(self: Any, state: Any) -> None:
        say("saving", state.step)
        save(self, state)

    def noted_read(self: Any, row: Any, report: Any, seconds: float) -> int:
        after = read(self, row, report, seconds)
        say("step", row["step"], row["examples"], row["batch_size"], after, int(report["phase"]))
        return after

    _compile_ahead._compile, _run_checkpoints.Checkpoints.save = noted_compilation, noted_save
    _rows.RowReader.__call__ = noted_read
    config = TrainConfig(auto=True, epochs=epochs, out=out, checkpoint_every=every, resume="auto")
    result = train(config)
    np.savez(out / "params.npz", *jax.tree.leaves(result.params))


class Killer:
    """Starts the run, waits for what it aims at, and kills it there."""

    def __init__(self, arguments: list[str], out: Path, examples: int, seed: int) -> None:
        self.arguments, self.out, self.examples = arguments, out, examples
        self.rng = np.random.default_rng(seed)
        self.met: Counter[str] = Counter()
        self.done = 0.0  # of the run, when it was last heard of

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, "--child", *self.arguments, "--out", str(self.out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def unfinished(self) -> bool:
        """Whether Orbax has begun to write a checkpoint and not put it in place."""
        state = self.out / "state"
        return state.is_dir() and not all(name.isdecimal() for name in os.listdir(state))

    def run_until(self, aim: str, least: float) -> tuple[str, float]:
        """Kills at the first moment that `aim` names, once `least` of the run is done."""
        process = self.start()
        assert process.stdout
        warm, wait = False, 0
        for line in process.stdout:
            word, *numbers = line.split()
            if word == "step":
                _, examples, size, after, phase = map(int, numbers)
                self.done, warm, wait = examples / self.examples, phase == 0, wait + 1
                grows = after > size
            hit = {
                "warm-up": word == "step" and warm and wait > 5 and self.rng.random() < 0.05,
                "save": word == "saving" and self.rng.random() < 0.3,
                "compilation": word == "compiling",
                "growth": word == "step" and grows,
                "any moment": word == "step" and self.rng.random() < 0.05,
            }[aim]
            if (hit and self.done >= least) or self.done > LATEST - 0.02:
                break
        else:
            raise SystemExit(f"the run ended before it could be killed ({aim}, {least:.2f})")
        if aim == "save":  # until the folder is there; then it takes some milliseconds
            patience = time.monotonic() + 1.0
            while not self.unfinished() and time.monotonic() < patience:
                pass
        longest = {"save": 0.005, "compilation": 0.5, "growth": 0.003}.get(aim, 0.01)
        time.sleep(self.rng.uniform(0, longest))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")
        process.wait()
        met = {
            "warm-up": warm,
            "save": self.unfinished(),
            "compilation": "compiled" not in rest,
            "growth": len([line for line in rest if line.startswith("step")]) <= 1,
            "any moment": True,
        }[aim]
        self.met[aim if met else "any moment"] += 1
        return ("" if met else "aimed at ") + aim, self.done


def compare(one: Path, other: Path) -> int:
    """The number of differences between what two runs left."""
    count = 0
    with np.load(one / "params.npz") as a, np.load(other / "params.npz") as b:
        count += len(set(a.files) ^ set(b.files))
        count += sum(a[name].tobytes() != b[name].tobytes() for name in a.files)
    rows = [
        [line.rsplit(",", 1)[0] for line in (run / "metrics.csv").read_text().splitlines()]
        for run in (one, other)
    ]
    return (
        count + abs(len(rows[0]) - len(rows[1])) + sum(a != b for a, b in zip(*rows, strict=False))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/kill-and-resume"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.out, options.epochs, options.every)
    shutil.rmtree(options.out, ignore_errors=True)
    arguments = [f"--epochs={options.epochs}", f"--every={options.every}"]
    examples = options.epochs * 1437
    alone = Killer(arguments, options.out / "alone", examples, options.seed)
    process = alone.start()
    lines = process.communicate()[0].splitlines()
    assert process.returncode == 0
    grown = [line.split() for line in lines if line.startswith("step")]
    print(f"left alone: {len(grown)} steps, batch size {grown[0][3]} → {grown[-1][3]}", flush=True)

    killer = Killer(arguments, options.out / "killed", examples, options.seed)
    number = 0
    while missing := [aim for aim, wanted in AIMS.items() if killer.met[aim] < wanted]:
        aim = missing[0]
        least = 0.8 * killer.met[aim] / AIMS[aim] if aim in ("any moment", "save") else 0.0
        what, done = killer.run_until(aim, least)
        number += 1
        print(f"kill {number:2d}: {what:24s} at {100 * done:4.1f} %", flush=True)
    process = killer.start()
    process.communicate()
    assert process.returncode == 0
    print(f"{number} kills: " + ", ".join(f"{count} {aim}" for aim, count in killer.met.items()))
    differences = compare(options.out / "alone", options.out / "killed")
    print(f"{differences} differences")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
