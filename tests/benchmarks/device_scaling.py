"""The fused step on 1, 2, 4 and 8 CPU devices: what each of them computes, holds and exchanges.

    pip install ".[train]"
    python tests/benchmarks/device_scaling.py

The step of `adabatch-jax train` (MLP 784-1024-1024-10, momentum, norm test) on a batch of 1024 examples in
32 groups, spread by shard_map. From the compiled program: FLOPs of a group (XLA counts one turn of a loop),
groups of a device, MB that it holds beside the arguments, all-reduces and the MB that go through them; the
same for a plain data-parallel step on 1024 examples at once. Then milliseconds a step, in turns: eight
devices share the cores that are there, so this shows the overhead, not the gain. About a minute.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from noise_estimators import WideMLP

import adabatch_jax as adabatch
from adabatch_jax.training import make_step
from adabatch_jax.training._files import write_json
from adabatch_jax.training.devices import AXIS, Devices
from adabatch_jax.training.models import losses_and_logits

NUMBERS = (1, 2, 4, 8)
BATCH, GROUPS = 1024, 32


NET = WideMLP()


def ours(devices: Devices) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    optimizer = optax.chain(
        adabatch.adapt_batch_size(
            adabatch.norm_test(1e6), initial_batch_size=BATCH, max_batch_size=2 * BATCH
        ),
        optax.sgd(1e-3, momentum=0.9),
    )
    step = devices.mapped(make_step(NET.apply, optimizer, axis_name=devices.axis_name))
    x, y, params = problem()
    size = BATCH // GROUPS
    rows = np.arange(BATCH, dtype=np.int32).reshape(GROUPS, size)
    sizes = np.full(GROUPS, size, np.int32)
    given = devices.replicate((params, optimizer.init(params), (x, y)))
    return step, (*given, devices.spread(rows), devices.spread(sizes), devices.loops(GROUPS))


def plain(devices: Devices) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Each device the gradient of its share, the mean of them, one update."""
    optimizer = optax.sgd(1e-3, momentum=0.9)

    def step(params: Any, state: Any, data: Any, rows: Any, sizes: Any, loops: Any) -> Any:
        del sizes, loops

        def loss(params: Any) -> jax.Array:
            taken = rows.reshape(-1)
            value = jnp.mean(
                losses_and_logits(NET.apply, params, data[0][taken], data[1][taken])[0]
            )
            return value if devices.number == 1 else jax.lax.pmean(value, AXIS)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    _, given = ours(devices)
    params = given[0]
    return devices.mapped(step), (params, devices.replicate(optimizer.init(params)), *given[2:])


def problem() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, 784)).astype(np.float32)
    y = rng.integers(0, 10, BATCH).astype(np.int32)
    return x, y, NET.init(jax.random.key(0), x[:1])


def all_reduces(text: str) -> tuple[int, float]:
    """How many there are, and the MB that a device hands to them."""
    number, total = 0, 0
    text = re.sub(r"/\*.*?\*/", "", text)
    for line in re.findall(r"= (\(?[^=]*?\)?) all-reduce(?:-start)?\(", text):
        shapes = re.findall(r"\w(\d+)\[([\d,]*)\]", line)
        sizes = [int(b) // 8 * math.prod(int(d) for d in s.split(",") if d) for b, s in shapes]
        number, total = number + 1, total + sum(sizes)
    return number, total / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/device_scaling.json"))
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(NUMBERS))
    runs, rows = {}, {}
    for number in NUMBERS:
        for name, made in (("ours", ours), ("plain", plain)):
            step, given = made(Devices(number))
            run = jax.jit(step).lower(*given).compile()
            reduces, megabytes = all_reduces(run.as_text())
            rows[f"{name}, {number}"] = {
                "MFLOP": run.cost_analysis()["flops"] / 1e6,
                "groups": GROUPS // number if name == "ours" else 1,
                "MB": run.memory_analysis().temp_size_in_bytes / 2**20,
                "all-reduces": reduces,
                "MB exchanged": megabytes,
            }
            runs[f"{name}, {number}"] = run, given
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.turns + 1):
        for name, (run, given) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*given))
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - start))
    print(
        "| step, devices | MFLOP of a group | groups of a device | MB held | all-reduces | "
        "MB exchanged | ms: min / median / max |\n|---|---|---|---|---|---|---|"
    )
    for name, row in rows.items():
        row["ms"] = taken[name]
        spread = " / ".join(f"{f(taken[name]):.0f}" for f in (min, statistics.median, max))
        print(
            f"| {name} | {row['MFLOP']:.0f} | {row['groups']} | {row['MB']:.1f} | "
            f"{row['all-reduces']} | {row['MB exchanged']:.2f} | {spread} |"
        )
    write_json(options.out, rows)


if __name__ == "__main__":
    main()
