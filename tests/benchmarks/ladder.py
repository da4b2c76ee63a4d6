"""What a growing batch costs in compilations: the ladder against none, and against a naive loop.

    python tests/benchmarks/ladder.py
    python tests/benchmarks/ladder.py --model cnn --smoothing 0.9 --epochs 6 --repeats 1

A run on Fashion-MNIST whose batch grows from 64 to at most 8192, by momentum and the norm test, in four
ways, in turns, `--repeats` times; seconds of the steps, compilations included:

* ladder: as `adabatch-jax train` does it, the next rung's gradient compiled in the background;
* in the foreground: each rung compiled when it is first needed;
* all before: every rung compiled before the clock starts;
* naive: a plain step that `jax.jit` compiles anew for each batch size that the first way decided.

Then the time of an example at the largest rung, over that of a plain step with the same batch. The first
command, the MLP, takes two minutes on two cores; the second, a run of minutes whose test is smoothed, as
the README advises, twenty.

Expected, medians of three runs for the MLP, 386 steps and 28 batch sizes: ladder 7.0, 5.6 and 7.6 s, in the
foreground 6.7, 5.6 and 8.5, all before 2.2, 2.0 and 3.1, naive 9.7, 8.6 and 12.4; an example at the largest
rung 0.76 to 0.83 of a plain step's. Eight gradients and an update take 6 to 8 s to compile, which cannot
hide behind two seconds of steps. CNN, two runs: ladder 149 and 136, in the foreground 156 and 141, all
before 151 and 144, naive 324 and 264; with 3 epochs, which end at a batch of 5000, 76, 74, 66, 156.
MLP, `--epochs 30`, to a batch of 8192: 19.1, 18.5, 13.9, 22.3.

Rungs that grow by four instead of two were tried: MLP 5.7, 5.9, 3.1, 12.2 in the hour of the third run
above, CNN (once) 93, 79, 69, 153. They were left, since up to twice as many groups share a batch then: by
the model of `recommend_estimator` an MLP's step just before the next rung takes up to 1.6 times as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adabatch_jax.training import Dataset, Feed, TrainConfig, load_dataset, resolve
from adabatch_jax.training._files import write_json
from adabatch_jax.training._loop import Run
from adabatch_jax.training.data import Ladder
from adabatch_jax.training.models import losses_and_logits
from adabatch_jax.training.step import CompiledSteps

SIZES = dict(initial_batch_size=64, max_batch_size=8192)
LADDER = Ladder(**SIZES, max_micro_batch_size=1024, noise_groups=8)


class Foreground(CompiledSteps):
    """Nothing is compiled ahead: every rung is said to be there."""

    def __contains__(self, rung: Any) -> bool:
        return True


def rungs() -> Iterator[Any]:
    rung: Any = LADDER.rung(64)
    while rung is not None:
        yield rung
        rung = LADDER.after(rung)


def ours(way: str, config: TrainConfig, dataset: Dataset) -> tuple[float, float, list[int]]:
    """Seconds, of them waiting for the compiler, and the batch sizes."""
    run, rows = Run(resolve(config, len(dataset.train_labels)), dataset), []
    state = run.first
    if way != "ladder":
        run._step.__class__ = Foreground
    if way == "all before":
        data = run._devices.replicate(run._data)
        for rung in rungs():
            run._step.prepare(rung, *state[:2], data, *run._batch(rung, 0, 0))
        for compiled in run._step._compiled.values():
            compiled.result()
    start, before = time.perf_counter(), run.seconds_waited
    run(state, rows.append)
    waited = run.seconds_waited - before
    return time.perf_counter() - start, waited, [row["batch_size"] for row in rows]


def plain_step(run: Run, optimizer: Any) -> Callable[..., Any]:
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        loss = lambda p: jnp.mean(losses_and_logits(run.apply, p, x, y)[0])
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def naive(sizes: list[int], config: TrainConfig, dataset: Dataset) -> float:
    """Seconds of plain steps with these batch sizes."""
    run, optimizer = (
        Run(resolve(config, len(dataset.train_labels)), dataset),
        optax.sgd(0.02, momentum=0.9),
    )
    step, feed = plain_step(run, optimizer), Feed(len(dataset.train_labels), 0)
    params, position = run.first.params, 0
    state = optimizer.init(params)
    start = time.perf_counter()
    for size in sizes:
        rows = feed.indices(position, size)
        x, y = dataset.train_inputs[rows], dataset.train_labels[rows]
        params, state, _ = step(params, state, x, y)
        position += size
    jax.block_until_ready(params)
    return time.perf_counter() - start


def per_example(config: TrainConfig, dataset: Dataset, repeats: int) -> list[float]:
    """Ratios, ours over plain, of a step with 8192 examples."""
    run, optimizer = (
        Run(resolve(config, len(dataset.train_labels)), dataset),
        optax.sgd(0.02, momentum=0.9),
    )
    (*_, top), plain = rungs(), plain_step(run, optimizer)
    data, batch = run._devices.replicate(run._data), run._batch(list(rungs())[-1], 0, 8192)
    rows = run._feed.indices(0, 8192)
    x, y = (jnp.asarray(v[rows]) for v in (dataset.train_inputs, dataset.train_labels))
    mine = jax.tree.map(jnp.array, (run.first.params, run.first.opt_state))
    theirs = jax.tree.map(jnp.array, (run.first.params, optimizer.init(run.first.params)))
    ratios = []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        mine = jax.block_until_ready(run._step(top, *mine, data, *batch))[:2]
        middle = time.perf_counter()
        theirs = jax.block_until_ready(plain(*theirs, x, y))[:2]
        if turn:  # the first compiles
            ratios.append((middle - start) / (time.perf_counter() - middle))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--smoothing", type=float, help="of the test; left out: none")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ladder.json"))
    options = parser.parse_args()
    dataset = load_dataset("fashion-mnist")
    config = TrainConfig(
        dataset="fashion-mnist",
        model=options.model,
        optimizer="momentum",
        learning_rate=0.02,
        epochs=options.epochs,
        smoothing=options.smoothing,
        debias=options.smoothing is not None,
        **SIZES,
    )
    taken: dict[str, list[float]] = {}
    waited: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for way in ("ladder", "in the foreground", "all before"):
            seconds, waiting, sizes = ours(way, config, dataset)
            taken.setdefault(way, []).append(seconds)
            waited.setdefault(way, []).append(waiting)
        taken.setdefault("naive", []).append(naive(sizes, config, dataset))
    print(f"{len(sizes)} steps, {len(set(sizes))} batch sizes, {sizes[0]} → {max(sizes)}")
    print("| way | seconds: min / median / max | of them waiting | over all before | over naive |")
    print("|---|---|---|---|---|")
    for way, times in taken.items():
        over = [
            statistics.median(a / b for a, b in zip(times, taken[other], strict=True))
            for other in ("all before", "naive")
        ]
        spread = " / ".join(f"{f(times):.1f}" for f in (min, statistics.median, max))
        wait = f"{np.median(waited[way]):.1f}" if way in waited else "–"
        print(f"| {way} | {spread} | {wait} | {over[0]:.2f} | {over[1]:.2f} |")
    ratios = per_example(config, dataset, 20)
    spread = " / ".join(f"{f(ratios):.2f}" for f in (min, statistics.median, max))
    print(f"time of an example at the largest rung over a plain step: {spread}")
    found = dict(seconds=taken, waited=waited, batch_sizes=sizes, per_example_over_plain=ratios)
    others = json.loads(options.out.read_text()) if options.out.exists() else {}
    write_json(options.out, others | {options.model: found})


if __name__ == "__main__":
    main()
