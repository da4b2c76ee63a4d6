"""What a loop pays for taking an optimizer of ours: compilation, memory, time of a call.

    pip install ".[train]"
    python tests/benchmarks/adoption_cost.py

A causal transformer of two blocks over bytes (`--width` channels, 28 arrays), micro-batches of 16 windows
of 64 bytes, Adam, float32; all in one process, in turns:

* bare gradient: loss and gradient alone;
* optax.adam: a step in every call;
* track_noise_scale: the same, with the noise scale measured in every tenth call;
* optax.MultiSteps: eight micro-batches a step;
* adaptive_multi_steps: around the norm test and Adam, from 128 examples on;
* grow_batch_size: around Adam with a schedule, which reads it by examples;
* automatic: `adaptive_multi_steps` around `automatic(scale_by_adam())`, in its warm-up, tests included.

First compile: `init`, tracing, lowering and compilation of the first call, with empty caches, in seconds
of the wall clock and of the processor. State: bytes of the optimizer's state over those of the parameters.
A call: milliseconds, and the ratio to the bare gradient, of a few calls each by turns. Medians.
Five minutes on two cores.

Expected, one turn of `--width 64` on two cores, beside other work (the processor's seconds say more):

| | first compile, s (processor) | state / parameters | over bare |
|---|---|---|---|
| bare gradient | 2.4 (3.0) | 0.00 | 1.00 |
| optax.adam | 3.6 (4.4) | 2.00 | 1.02 |
| track_noise_scale | 6.5 (7.4) | 3.00 | 1.06 |
| optax.MultiSteps | 5.9 (6.9) | 3.00 | 1.02 |
| adaptive_multi_steps | 11.0 (9.1) | 3.00 | 1.04 |
| grow_batch_size | 8.9 (10.3) | 3.00 | 1.07 |
| automatic | 21.6 (25.4) | 6.07 | 1.11 |
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adabatch_jax as adabatch
from adabatch_jax.training._files import write_json
from adabatch_jax.training.models import Transformer

PyTree = Any
MICRO, GROUPS, LENGTH = 16, 8, 64
FEW = 16  # calls in a row, of which one or two complete a batch


def of_ours(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return adabatch.adaptive_multi_steps(optimizer, micro_batch_size=MICRO)


def multi_steps() -> optax.GradientTransformation:
    return optax.MultiSteps(optax.adam(1e-3), GROUPS).gradient_transformation()


def drop_in() -> optax.GradientTransformation:
    sizes = dict(initial_batch_size=GROUPS * MICRO, max_batch_size=4096)
    controller = adabatch.adapt_batch_size(adabatch.norm_test(1.0), **sizes)
    return of_ours(optax.chain(controller, optax.adam(1e-3)))


def plain() -> optax.GradientTransformation:
    return optax.adam(1e-3)


def tracked() -> optax.GradientTransformation:
    return optax.chain(adabatch.track_noise_scale(batch_size=MICRO), optax.adam(1e-3))


def grown() -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 1000)
    sizes = dict(base_batch_size=GROUPS * MICRO, max_batch_size=4096, micro_batch_size=MICRO)
    return adabatch.grow_batch_size(optax.adam, learning_rate=schedule, **sizes)


def automatic() -> optax.GradientTransformation:
    sizes = dict(initial_batch_size=GROUPS * MICRO, max_batch_size=4096)
    return of_ours(adabatch.automatic(optax.scale_by_adam(), total_examples=1_000_000, **sizes))


ROWS: dict[str, Callable[[], optax.GradientTransformation] | None] = {
    "bare gradient": None,
    "optax.adam": plain,
    "track_noise_scale": tracked,
    "optax.MultiSteps": multi_steps,
    "adaptive_multi_steps": drop_in,
    "grow_batch_size": grown,
    "automatic": automatic,
}


class Loop:
    """One row: its first call, and the calls after."""

    def __init__(
        self, make: Callable[[], optax.GradientTransformation] | None, net: Transformer
    ) -> None:
        text = np.random.default_rng(0).integers(0, 256, (MICRO, LENGTH + 1), dtype=np.int32)
        self.batch = jnp.asarray(text)
        self.params = jax.jit(net.init)(jax.random.key(0), self.batch[:, :-1])
        jax.block_until_ready(self.params)
        self.state: PyTree = ()
        wall, processor = time.perf_counter(), time.process_time()
        optimizer = None if make is None else optax.with_extra_args_support(make())
        if optimizer is not None:
            self.state = optimizer.init(self.params)

        def loss_fn(params: PyTree, batch: jax.Array) -> jax.Array:
            logits = net.apply(params, batch[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
            return jnp.mean(losses)

        def step(params: PyTree, state: PyTree, batch: jax.Array) -> tuple[PyTree, PyTree, Any]:
            value, gradient = jax.value_and_grad(loss_fn)(params, batch)
            if optimizer is None:
                return params, state, gradient
            updates, state = optimizer.update(gradient, state, params, value=value)
            return optax.apply_updates(params, updates), state, value

        given = (self.params, self.state, self.batch)
        self.step = jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile()
        self.compile_seconds = time.perf_counter() - wall
        self.compile_processor_seconds = time.process_time() - processor

    @property
    def state_ratio(self) -> float:
        sizes = [sum(x.nbytes for x in jax.tree.leaves(t)) for t in (self.state, self.params)]
        return sizes[0] / sizes[1]

    def milliseconds(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self.params, self.state, last = self.step(self.params, self.state, self.batch)
        jax.block_until_ready((self.params, last))
        return 1e3 * (time.perf_counter() - start) / calls


def measure(net: Transformer, turns: int, calls: int) -> dict[str, dict[str, float]]:
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    for _ in range(turns):
        loops = {}
        for name, make in ROWS.items():
            jax.clear_caches()
            loops[name] = Loop(make, net)
        for loop in loops.values():
            loop.milliseconds(2)
        # A few calls of each by turns: a machine that drifts is then the same for all.
        rounds = [
            {name: loop.milliseconds(FEW) for name, loop in loops.items()}
            for _ in range(max(1, calls // FEW))
        ]
        for name, loop in loops.items():
            taken = statistics.median(row[name] for row in rounds)
            ratios = [row[name] / row["bare gradient"] for row in rounds]
            seen[name].append(
                {
                    "compile_seconds": loop.compile_seconds,
                    "compile_processor_seconds": loop.compile_processor_seconds,
                    "state_ratio": loop.state_ratio,
                    "milliseconds": taken,
                    "time_ratio": statistics.median(ratios),
                }
            )
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in seen.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--calls", type=int, default=320)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/adoption_cost.json"))
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    found = measure(Transformer(256, width=options.width), options.turns, options.calls)
    write_json(options.out, found)
    print("| | first compile, s (processor) | state / parameters | ms a call | over bare |")
    print("|---|---|---|---|---|")
    for name, row in found.items():
        seconds = f"{row['compile_seconds']:.1f} ({row['compile_processor_seconds']:.1f})"
        times = f"{row['milliseconds']:.1f} | {row['time_ratio']:.2f}"
        print(f"| {name} | {seconds} | {row['state_ratio']:.2f} | {times} |")


if __name__ == "__main__":
    main()
