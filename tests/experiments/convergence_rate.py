"""Do the gradients of AdAdaGrad fall like 1/K, as its theory says?

    python tests/experiments/convergence_rate.py            # about two minutes on two CPU cores

Robust regression, smooth and not convex: F(w) = mean of ρ(⟨x_i, w⟩ − y_i), ρ(r) = r²/(2 + 2r²) (Geman and
McClure), on 512 examples with 50 features whose sizes fall like 1/j, a fifth of the targets outliers. Its
gradient is known exactly at every step. Batches are drawn with replacement; to make one of 100,000
examples as cheap as one of 16, its size is Poisson around what was asked for, which makes the counts of
the examples independent. AdaGrad and AdaGrad-Norm from 16 examples on: with the norm test, with constant
batches, and with the exact gradient.

For every row, over eight seeds, two numbers against the optimizer steps K: the smallest ‖∇F‖² of the first
K, and their mean, which is what the theorems bound (the smallest is no larger). For each the slope of a
log-log fit from K = 200 on, with its standard error. The mean cannot fall faster than 1/K, and does fall so
where the sum of all ‖∇F‖² is finite. Saved as table.csv and table.md in runs/convergence-rate.

Expected: with the norm test the mean falls like 1/K, slope −1.00 with AdaGrad and −0.94 with AdaGrad-Norm,
whose first steps still weigh, as with the exact gradient; with a constant batch the noise stops it, −0.62
and −0.61 at 16 examples, −0.78 and −0.79 at 256. The price is a batch that ends at some 200,000 examples or
at the cap, 2²⁴. The smallest ‖∇F‖² tells less: with AdaGrad-Norm it falls faster than 1/K whatever the
batch, with AdaGrad it reaches the floor of that cap or of float32 within the fit.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adabatch_jax as adabatch
from adabatch_jax.training._files import atomic_path

EXAMPLES, FEATURES, SEEDS = 512, 50, 8
FIRST, LARGEST, FIT_FROM = 16, 2**24, 200
RECIPES = {"adagrad": (adabatch.adadagrad, 0.3), "adagrad-norm": (adabatch.adadagrad_norm, 2.0)}
POLICIES = ("norm 1", "norm 0.5", "constant 16", "constant 256", "exact gradient")


def problem(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inputs [N, d] and targets [N]."""
    keys = jax.random.split(key, 5)
    scales = 1 / jnp.arange(1.0, FEATURES + 1)
    x = jax.random.normal(keys[0], (EXAMPLES, FEATURES)) * scales[None]
    y = x @ jax.random.normal(keys[1], (FEATURES,)) + 0.1 * jax.random.normal(keys[2], (EXAMPLES,))
    wild = jax.random.uniform(keys[3], (EXAMPLES,), minval=-10.0, maxval=10.0)
    return x, jnp.where(jax.random.uniform(keys[4], (EXAMPLES,)) < 0.2, wild, y)


def gradients(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Of every example, [N, d]."""
    r = x @ w - y
    return (r / (1 + r**2) ** 2)[:, None] * x


def of_batch(each: jax.Array, counts: jax.Array) -> adabatch.GradientNoise:
    """Gradient and noise of a batch in which example i is `counts[i]` times."""
    examples = jnp.sum(counts)
    mean = counts @ each / jnp.maximum(examples, 1)
    scatter = jnp.sum(counts * jnp.sum((each - mean[None]) ** 2, axis=1))
    whole = examples.astype(jnp.int32)
    return adabatch.GradientNoise(mean, scatter, whole, whole)


def make_optimizer(recipe: str, policy: str) -> optax.GradientTransformationExtraArgs:
    made, rate = RECIPES[recipe]
    kind, _, number = policy.partition(" ")
    first = int(number) if kind == "constant" else FIRST
    criterion = adabatch.norm_test(float(number)) if kind == "norm" else lambda noise: 0.0
    largest = LARGEST if kind == "norm" else first
    return made(rate, criterion=criterion, initial_batch_size=first, max_batch_size=largest)


def run(recipe: str, policy: str, steps: int) -> dict[str, np.ndarray]:
    """‖∇F‖² before every step and the batch size, [seeds, steps]; problem and start are of the seed."""
    optimizer = make_optimizer(recipe, policy)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        x, y = problem(key)

        def step(carry, key):
            w, state = carry
            each, size = gradients(w, x, y), adabatch.get_batch_size(state)
            counts = jnp.ones(EXAMPLES)
            if policy != "exact gradient":
                drawn = jax.random.poisson(key, size / EXAMPLES, (EXAMPLES,))
                counts = drawn.astype(jnp.float32)
            noise = of_batch(each, counts)
            updates, state = optimizer.update(noise.mean, state, w, noise=noise)
            square = jnp.sum(jnp.mean(each, axis=0) ** 2)
            return (optax.apply_updates(w, updates), state), {"square": square, "size": size}

        w = jnp.zeros(FEATURES)
        keys = jax.random.split(jax.random.fold_in(key, 1), steps)
        return jax.lax.scan(step, (w, optimizer.init(w)), keys)[1]

    keys = jax.random.split(jax.random.key(0), SEEDS)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(keys))


def slopes(curves: np.ndarray) -> np.ndarray:
    """Of the logarithm of each curve against that of K, at equal steps of it."""
    steps = np.unique(np.geomspace(FIT_FROM, curves.shape[1], 60).astype(int))
    return np.polyfit(np.log(steps), np.log(curves[:, steps - 1]).T, 1)[0]


def row_of(recipe: str, policy: str, steps: int) -> dict[str, Any]:
    found = run(recipe, policy, steps)
    square = found["square"].astype(np.float64)
    curves = {
        "mean": np.cumsum(square, axis=1) / np.arange(1, steps + 1),
        "smallest": np.minimum.accumulate(square, axis=1),
    }
    row: dict[str, Any] = {"optimizer": recipe, "policy": policy, "steps": steps, "seeds": SEEDS}
    for name, curve in curves.items():
        slope = slopes(curve)
        row[f"slope_of_{name}"] = f"{slope.mean():.3f}"
        row[f"standard_error_of_{name}"] = f"{slope.std(ddof=1) / np.sqrt(SEEDS):.3f}"
    for name, curve in curves.items():
        for k in (100, steps):  # the geometric mean of the seeds
            row[f"{name}_{k}"] = f"{np.exp(np.log(curve[:, k - 1]).mean()):.1e}"
    exact = policy == "exact gradient"
    row["last_batch"] = EXAMPLES if exact else f"{np.median(found['size'][:, -1]):.0f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("runs/convergence-rate"))
    parser.add_argument("--csv", type=Path, help="write the table here as well")
    options = parser.parse_args()
    if options.steps <= 2 * FIT_FROM:
        parser.error(f"--steps must exceed {2 * FIT_FROM}, got {options.steps}")
    rows = []
    for recipe in RECIPES:
        for policy in POLICIES:
            rows.append(row_of(recipe, policy, options.steps))
            print("  ".join(str(v) for v in rows[-1].values()), flush=True)
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(str(v) for v in row.values()) + " |" for row in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for path in (options.out / "table.csv", options.csv):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
