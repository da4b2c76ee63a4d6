"""What measuring the noise costs, and what it is worth: groups, random signs, single examples.

    pip install ".[train]"
    python tests/benchmarks/noise_estimators.py

Three networks, random data, float32, two cores: an MLP (784-1024-1024-10) with a batch of 256, the CNN
of the command with 128 images of 28 × 28, its transformer with 32 windows of 64 bytes. Plain is
`jax.value_and_grad` of the mean loss of the same batch. All take turns in one process; the ratio is that
of one turn, and its minimum, median and maximum are shown. Then the times once more for larger batches of
the MLP. About three minutes a network, the MLP five; problems done are kept in
runs/benchmarks/noise_estimators.json. `--only time` takes the times alone.

* in 8 parts: gradients of 8 groups, added up in a loop, no noise measured: no group can cost less;
* groups: `value_and_grad_noise` over 2, 8 or 16 groups, one after the other, or 8 at once under `vmap`;
* signs: `value_and_grad_signs` with one or two sign vectors;
* structured: the same over single examples, by `noise/_structured/`, which is not public;
* per example: the same, one after the other.

The relative standard error is the deviation of tr Σ over 200 draws of the batch (with replacement, from
1,024 examples, and new signs), over its mean; of single examples over 20. Beside it stands what the
degrees of freedom say at worst, √(2/ν). Memory is what XLA allots beyond arguments and results.

Expected, medians over plain and relative standard error:

| | MLP | CNN | transformer |
|---|---|---|---|
| in 8 parts | 1.6 | 0.67 | 0.93 |
| groups, 2 | 1.2, .234 | 0.82, .355 | 0.73, .061 |
| groups, 8 | 1.9, .082 | 0.55, .147 | 0.91, .032 |
| groups, 8 at once | 9.4, .082 | 1.2, .147 | 0.97, .032 |
| groups, 16 | 2.6, .059 | 0.53, .101 | 0.87, .028 |
| signs, 1 | 1.7, .210 | 1.3, .408 | 1.3, .065 |
| signs, 2 | 2.4, .148 | 1.8, .286 | 2.1, .046 |
| structured | 1.1, .011 | 1.1, .016 | 1.2, .023 |
| per example | 12, .011 | 0.91, .017 | 1.2, .027 |

A group of the MLP costs as much as 20 to 30 examples more, since all weights are moved for it; on the CNN
the activations of a group stay in the cache. A sign vector is one more backward pass, two thirds of a
gradient where there are many layers; 1.61 in all by counting for this MLP. Both pulled back at once, under
`vmap`: 2.1 (MLP), 1.6 (CNN).

Larger batches of the MLP, two runs:

| | 256 | 1024 | 2048 | 8192 |
|---|---|---|---|---|
| in 8 parts | 1.7, 1.6 | 1.17, 1.18 | 1.00, 1.04 | 0.82, 0.86 |
| groups, 2 | 1.2, 1.2 | 1.06, 1.06 | 0.89, 0.97 | 0.93, 0.93 |
| groups, 8 | 2.0, 1.9 | 1.21, 1.24 | 0.94, 1.03 | 0.84, 0.86 |
| signs, 1 | 1.7, 1.7 | 1.65, 1.64 | 1.54, 1.68 | 1.51, 1.53 |
| structured | 1.1, 1.1 | 1.12, 1.13 | 1.18, 1.26 | 1.22, 1.21 |
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import adabatch_jax as adabatch
from adabatch_jax.noise._structured._estimate import value_and_grad_structured
from adabatch_jax.training._files import write_json
from adabatch_jax.training.models import CNN, Transformer

DRAWS, POOL, PARTS = 200, 1024, 8
SIZES = {"mlp": 256, "cnn": 128, "transformer": 32}
PROBLEMS = tuple(SIZES)
NO_NOISE = ("plain", "in 8 parts")
LARGER = (4, 8, 32)  # times the MLP's batch
CHEAP = (*NO_NOISE, "groups, 2", "groups, 8", "signs, 1", "structured")
PyTree = Any


class WideMLP(nn.Module):
    """784-1024-…-1024-10."""

    hidden: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.hidden):
            x = nn.relu(nn.Dense(1024)(x))
        return nn.Dense(10)(x)


def problem(name: str, scale: int = 1) -> tuple[nn.Module, int, jax.Array, jax.Array]:
    """The network, its batch size times `scale`, and a pool of inputs and labels."""
    rng, size = np.random.default_rng(0), SIZES[name] * scale
    pool = max(POOL, size)
    if name == "transformer":
        text = jnp.asarray(rng.integers(0, 256, (pool, 65)))
        return Transformer(256), size, text[:, :-1], text[:, 1:]
    labels = rng.integers(0, 10, pool)
    shape = (784,) if name == "mlp" else (28, 28)
    # Classes differ in their mean, as images do.
    x = (rng.normal(size=(10, *shape))[labels] + rng.normal(size=(pool, *shape))).astype(np.float32)
    return WideMLP() if name == "mlp" else CNN(10), size, jnp.asarray(x), jnp.asarray(labels)


def added_up(loss_fn: Callable[..., jax.Array], params: PyTree, groups: PyTree, count: Any) -> Any:
    """Losses and gradients of the first `count` groups, in a loop; no noise is measured."""

    def add(i: jax.Array, so_far: Any) -> Any:
        group = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, 0, False), groups)
        return jax.tree.map(jnp.add, so_far, jax.value_and_grad(loss_fn)(params, group))

    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.fori_loop(0, count, add, zeros)


def methods(net: nn.Module, size: int) -> dict[str, tuple[Callable[..., Any], int]]:
    """Of each, a function of parameters, batch and key, and its degrees of freedom."""

    def losses_fn(params: PyTree, batch: PyTree) -> jax.Array:
        x, y = batch
        loss = optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y)
        return loss if loss.ndim == 1 else jnp.mean(loss, axis=-1)

    def mean_loss(params: PyTree, batch: PyTree) -> jax.Array:
        return jnp.mean(losses_fn(params, batch))

    def plain(params: PyTree, batch: PyTree, key: jax.Array) -> Any:
        return jax.value_and_grad(mean_loss)(params, batch)

    def parts(params: PyTree, batch: PyTree, key: jax.Array) -> Any:
        return added_up(mean_loss, params, adabatch.split_groups(batch, PARTS), PARTS)

    def groups(number: int, at_once: int = 1) -> Callable[..., Any]:
        fn = adabatch.value_and_grad_noise(mean_loss, vectorize=at_once)
        return lambda params, batch, key: fn(params, adabatch.split_groups(batch, number))

    def signs(number: int) -> Callable[..., Any]:
        fn = adabatch.noise.value_and_grad_signs(losses_fn, num_signs=number)
        return lambda params, batch, key: fn(params, adabatch.split_groups(batch, 1), key)

    def structured(params: PyTree, batch: PyTree, key: jax.Array) -> Any:
        fn = value_and_grad_structured(mean_loss)
        return fn(params, adabatch.split_groups(batch, size))

    return {
        "plain": (plain, 0),
        "in 8 parts": (parts, 0),
        "groups, 2": (groups(2), 1),
        "groups, 8": (groups(8), 7),
        "groups, 8 at once": (groups(8, 8), 7),
        "groups, 16": (groups(16), 15),
        "signs, 1": (signs(1), 1),
        "signs, 2": (signs(2), 2),
        "structured": (structured, size - 1),
        "per example": (groups(size), size - 1),
    }


def prepare(
    name: str, scale: int, only: tuple[str, ...] = ()
) -> tuple[dict[str, Any], PyTree, int, jax.Array, jax.Array]:
    net, size, x, y = problem(name, scale)
    params = net.init(jax.random.key(0), x[:1])
    given = (params, (x[:size], y[:size]), jax.random.key(1))
    compiled = {
        method: jax.jit(fn).lower(*given).compile()
        for method, (fn, _) in methods(net, size).items()
        if not only or method in only
    }
    return compiled, params, size, x, y


def times(
    name: str, scale: int, seconds: float, only: tuple[str, ...] = ()
) -> dict[str, dict[str, Any]]:
    """Ratios to plain within a turn; single examples, which take long, in every eighth turn."""
    compiled, params, size, x, y = prepare(name, scale, only)
    given = (params, (x[:size], y[:size]), jax.random.key(1))
    taken: dict[str, list[tuple[float, float]]] = {method: [] for method in compiled}
    for run in compiled.values():
        jax.block_until_ready(run(*given))
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        base = 0.0
        for method, run in compiled.items():
            if method == "per example" and turn % 8:
                continue
            start = time.perf_counter()
            jax.block_until_ready(run(*given))
            passed = time.perf_counter() - start
            base = passed if method == "plain" else base
            taken[method].append((passed, passed / base))
        turn += 1
    return {
        method: {
            "ms": float(1e3 * np.median([t for t, _ in pairs])),
            "ratio": [float(f([r for _, r in pairs])) for f in (np.min, np.median, np.max)],
            "turns": len(pairs),
            "MB": compiled[method].memory_analysis().temp_size_in_bytes / 2**20,
        }
        for method, pairs in taken.items()
    }


def errors(name: str, scale: int, draws: int) -> dict[str, dict[str, Any]]:
    """The relative standard error of tr Σ over batches and signs, and the mean of all."""
    compiled, params, size, x, y = prepare(name, scale)
    found = {}
    for method, run in compiled.items():
        if method in NO_NOISE:
            continue
        traces = []
        for draw in range(draws if method != "per example" else max(draws // 10, 2)):
            rows = np.random.default_rng(draw).integers(0, len(x), size)
            traces.append(float(run(params, (x[rows], y[rows]), jax.random.key(draw))[1].trace))
        mean = float(np.mean(traces))
        found[method] = {"trace": mean, "error": float(np.std(traces, ddof=1)) / mean}
    return found


def show(results: dict[str, Any], scale: int) -> None:
    print(
        "| problem | method | ms | over plain: min / median / max | MB | degrees of freedom | "
        "√(2/ν) | standard error | tr Σ |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        net, size, _, _ = problem(name, scale)
        for method, (_, freedom) in methods(net, size).items():
            row = result.get("time", {}).get(method)
            timed = "– | – | –"
            if row:
                ratios = " / ".join(f"{r:.2f}" for r in row["ratio"])
                timed = f"{row['ms']:.1f} | {ratios} | {row['MB']:.1f}"
            row, exact = result.get("error", {}).get(method), "– | – | – | –"
            if row:
                worst = (2 / freedom) ** 0.5
                exact = f"{freedom} | {worst:.2f} | {row['error']:.3f} | {row['trace']:.4g}"
            print(f"| {name} | {method} | {timed} | {exact} |")
    larger = results.get("mlp", {}).get("larger", {})
    if not larger:
        return
    print(
        "\n| MLP, batch | method | ms | over plain: min / median / max | MB |\n|---|---|---|---|---|"
    )
    for size, rows in larger.items():
        for method, row in rows.items():
            ratios = " / ".join(f"{r:.2f}" for r in row["ratio"])
            print(f"| {size} | {method} | {row['ms']:.1f} | {ratios} | {row['MB']:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, help="one of them; all if left out")
    parser.add_argument("--only", choices=("time", "error"), help="one part; both if left out")
    parser.add_argument("--seconds", type=float, default=30.0, help="of turns")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--scale", type=int, default=1, help="batches so many times as large")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/noise_estimators.json"))
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in [options.problem] if options.problem else PROBLEMS:
        result = results.setdefault(name, {})
        if options.only != "error" and "time" not in result:
            result["time"] = times(name, options.scale, options.seconds)
        if options.only != "time" and "error" not in result:
            result["error"] = errors(name, options.scale, options.draws)
        for times_larger in LARGER if name == "mlp" and options.only != "error" else ():
            size = str(SIZES[name] * options.scale * times_larger)
            larger = result.setdefault("larger", {})
            if size not in larger:
                larger[size] = times(name, options.scale * times_larger, options.seconds, CHEAP)
        write_json(options.out, results)
    show(results, options.scale)


if __name__ == "__main__":
    main()
