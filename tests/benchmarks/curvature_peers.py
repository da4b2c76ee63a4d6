"""Time to 1 % of the largest eigenvalue of a Hessian: ours, matfree and PyHessian.

    python -m venv .venv && .venv/bin/pip install ".[test]"
    python -m venv .peer && .peer/bin/pip install pyhessian==0.1 torch==2.13.0
    .venv/bin/python tests/benchmarks/curvature_peers.py --pyhessian-python .peer/bin/python

PyHessian has an environment of its own, since it is old. Without the option it is left out. Half an
hour on two cores; the problems done are kept in runs/benchmarks/curvature_peers.json, and an
interrupted command goes on with the next.

Two networks (784-256-10, and a CNN with 8 and 16 channels) on 1,024 images of Fashion-MNIST, at
initialisation and after an epoch of Adam; everybody gets the same weights and batch, and two threads.
The true λ₁ is from 60 Lanczos steps, and again from ARPACK on products in float64.

* ours: `lanczos_spectrum` of `hessian_vector_product`;
* ours, from the gradient: the same, `start=` the gradient of the batch;
* ours, from an eighth: `start=` the `top_eigenvector` of an eighth of the batch, after six steps from that
  eighth's gradient. The time contains them. A single product with the whole batch is summed over eighths;
* matfree: `tridiag_sym` with full re-orthogonalisation of the product `jax.jvp(jax.grad(…))`;
* PyHessian: `eigenvalues`, a power iteration; and `density`, Lanczos with re-orthogonalisation, for which
  the worker puts back the function that new versions of torch lack (torch.eig).

Each does the fewest steps that bring the error below 1 % for all start vectors: five of them, where
the start is random, the same for ours and matfree; five eighths, drawn by the same keys. PyHessian's
search ends at 64 steps ("> 64"): each candidate takes up to five runs, and its power iteration is slow
where two eigenvalues are close. Times are of these steps, in turns, without compiling. A start
is no property of a library: matfree would take one as well, by hand. Memory is at 20 steps: what XLA
allots beyond arguments and results; for PyHessian what the process grows by.

Expected. Steps from random starts, the gradient, an eighth: MLP 9, 4, 2, trained 7, 4, 4; CNN 4, 4, 1,
trained 6, 5, 4, since its two largest eigenvalues, 75.1 and 68.6, are close. The fastest of ours over the
best peer, with medians in ms: MLP 21 / 76, trained 40 / 52; CNN 329 / 526, trained 557 / 620. With the
same start, products of ours and matfree cost the same on the CNN.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from matfree import decomp
from scipy.sparse.linalg import LinearOperator, eigsh

import adabatch_jax as adabatch
from adabatch_jax.training import load_dataset
from adabatch_jax.training._files import write_json
from adabatch_jax.training.models import CNN, MLP

NETWORKS = {"mlp": MLP(10), "cnn": CNN(10, channels=(8, 16), width=64)}
BATCH, LONG, LIMIT, SEEDS = 1024, 60, 0.01, range(5)
COARSE = 6  # steps on an eighth of the batch
LONGEST = 20  # steps that are tried from each start
MOST = 64  # steps of PyHessian: a product takes it twice as long as XLA
PyTree = Any
Calls = dict[str, Callable[[], float]]  # each gives the seconds that it took


def data() -> tuple[jax.Array, jax.Array]:
    d = load_dataset("fashion-mnist")
    x = d.train_inputs / np.float32(255.0)
    return jnp.asarray((x - x.mean()) / x.std(), jnp.float32), jnp.asarray(d.train_labels)


def loss_of(net: Any) -> Callable[..., jax.Array]:
    def loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y).mean()

    return loss


def trained(loss: Callable, params: PyTree, x: jax.Array, y: jax.Array) -> PyTree:
    """One epoch of Adam, batch 128."""
    adam, order = optax.adam(1e-3), jax.random.permutation(jax.random.key(5), len(x))

    def step(carry: Any, chosen: jax.Array) -> Any:
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params, x[chosen], y[chosen]), state)
        return (optax.apply_updates(params, updates), state), None

    batches = order[: len(x) // 128 * 128].reshape(-1, 128)
    run = jax.jit(lambda p: jax.lax.scan(step, (p, adam.init(p)), batches)[0][0])
    return jax.block_until_ready(run(params))


def ours(loss: Callable, steps: int) -> Callable[..., jax.Array]:
    def run(params: PyTree, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        product = adabatch.curvature.hessian_vector_product(loss, params, x, y)
        flat, unravel = ravel_pytree(params)
        # The start that matfree gets, so that both need the same number of steps.
        start = unravel(jax.random.normal(key, flat.shape))
        spectrum = adabatch.curvature.lanczos_spectrum(
            product, params, key, num_steps=steps, start=start
        )
        return spectrum.largest

    return run


def ours_from_gradient(loss: Callable, steps: int) -> Callable[..., jax.Array]:
    def run(params: PyTree, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        product = adabatch.curvature.hessian_vector_product(loss, params, x, y)
        start = jax.grad(loss)(params, x, y)
        spectrum = adabatch.curvature.lanczos_spectrum(
            product, params, key, num_steps=steps, start=start
        )
        return spectrum.largest

    return run


def an_eighth(loss: Callable, params: PyTree, x: Any, y: Any, key: jax.Array) -> PyTree:
    """The top Ritz vector of an eighth of the batch, which the key chooses, from its gradient."""
    eighths = jax.tree.map(lambda a: a.reshape(8, -1, *a.shape[1:]), (x, y))
    part = jax.tree.map(lambda a: a[jax.random.randint(key, (), 0, 8)], eighths)
    product, start = (
        adabatch.curvature.hessian_vector_product(loss, params, *part),
        jax.grad(loss)(params, *part),
    )
    return adabatch.curvature.top_eigenvector(product, params, key, num_steps=COARSE, start=start)[
        1
    ]


def ours_from_an_eighth(loss: Callable, steps: int) -> Callable[..., jax.Array]:
    def run(params: PyTree, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        start = an_eighth(loss, params, x, y, key)
        # Several products share what does not depend on the vector. One alone is faster in parts, whose
        # activations stay in the cache.
        count = 8 if steps == 1 else None
        if count:
            x, y = x.reshape(count, -1, *x.shape[1:]), y.reshape(count, -1)
        product = adabatch.curvature.hessian_vector_product(loss, params, x, y, count=count)
        spectrum = adabatch.curvature.lanczos_spectrum(
            product, params, key, num_steps=steps, start=start
        )
        return spectrum.largest

    return run


def tridiagonal(loss: Callable, steps: int) -> Callable[..., jax.Array]:
    """Lanczos' T as a user of matfree has it."""

    def run(params: PyTree, x: jax.Array, y: jax.Array, start: jax.Array) -> jax.Array:
        flat, unravel = ravel_pytree(params)

        def product(v: jax.Array, at: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
            gradient = jax.grad(lambda p: loss(unravel(p), x, y))
            return jax.jvp(gradient, (at,), (v,))[1]

        start = start / jnp.linalg.norm(start)
        return decomp.tridiag_sym(steps)(product, start, flat, x, y).J_small

    return run


def matfree(loss: Callable, steps: int) -> Callable[..., jax.Array]:
    def run(params: PyTree, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        start = jax.random.normal(key, ravel_pytree(params)[0].shape)
        return jnp.linalg.eigvalsh(tridiagonal(loss, steps)(params, x, y, start))[-1]

    return run


def in_float64(loss: Callable, params: PyTree, x: jax.Array, y: jax.Array) -> float:
    """λ₁ by ARPACK on products in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), params)
        x = jnp.asarray(np.asarray(x, np.float64))
        flat, unravel = ravel_pytree(wide)
        product = jax.jit(
            lambda at, x, y, v: jax.jvp(jax.grad(lambda p: loss(unravel(p), x, y)), (at,), (v,))[1]
        )
        operator = LinearOperator(
            (flat.size, flat.size),
            matvec=lambda v: np.asarray(product(flat, x, y, v.ravel())),
            dtype=np.float64,
        )
        start = np.random.default_rng(0).normal(size=flat.size)
        top = eigsh(
            operator, k=1, which="LA", v0=start, ncv=12, tol=1e-6, return_eigenvectors=False
        )
    return float(top[0])


def fewest_of_lanczos(
    loss: Callable, exact: float, params: PyTree, x: Any, y: Any, keys: list[jax.Array]
) -> list[int]:
    """Steps from random starts, the gradient and an eighth (the worst of each), by blocks of a longer T."""
    run, flat = jax.jit(tridiagonal(loss, LONGEST)), ravel_pytree(params)[0]
    gradient, eighth = jax.jit(jax.grad(loss)), jax.jit(partial(an_eighth, loss))

    def worst(starts: list[jax.Array]) -> int:
        found = []
        for start in starts:
            t = np.asarray(run(params, x, y, start), np.float64)
            errors = [
                abs(np.linalg.eigvalsh(t[:k, :k])[-1] / exact - 1) for k in range(1, LONGEST + 1)
            ]
            found.append(next(k for k in range(1, LONGEST + 1) if errors[k - 1] <= LIMIT))
        return max(found)

    return [
        worst([jax.random.normal(key, flat.shape) for key in keys]),
        worst([ravel_pytree(gradient(params, x, y))[0]]),
        worst([ravel_pytree(eighth(params, x, y, key))[0] for key in keys]),
    ]


def fewest(enough: Callable[[int], bool]) -> int:
    """The first number of steps that are enough, by doubling and halving; at most MOST."""
    high = 2
    while high < MOST and not enough(high):
        high = min(2 * high, MOST)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


class Worker:
    """PyHessian in a process of its own; one request at a time."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("pyhessian_worker.py")
        # Threads that wait would spin otherwise, and take the processor from whoever else is on it.
        self.process = subprocess.Popen(
            [python, "-W", "ignore", str(script), "2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )

    def __call__(self, **request: Any) -> dict[str, float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def save_arrays(path: str, params: PyTree, x: jax.Array, y: jax.Array) -> None:
    layers = [params["params"][f"Dense_{i}"] for i in range(len(params["params"]))]
    arrays = {f"{k}{i}": np.asarray(v) for i, layer in enumerate(layers) for k, v in layer.items()}
    np.savez(path, x=np.asarray(x), y=np.asarray(y), layers=len(layers), **arrays)


def prepare(
    network: str, state: str, python: str | None, rows: int = BATCH
) -> tuple[dict[str, Any], Calls, Calls]:
    """What is known before times are taken, and what to time: the fewest steps, and 20 of them."""
    inputs, labels = data()
    x, y, net = inputs[:rows], labels[:rows], NETWORKS[network]
    loss, params = loss_of(net), net.init(jax.random.key(0), x[:1])
    if state == "trained":
        params = trained(loss, params, inputs, labels)
    keys = [jax.random.key(seed) for seed in SEEDS]
    exact = float(jax.jit(ours(loss, LONG))(params, x, y, keys[0]))
    result: dict[str, Any] = {
        "parameters": sum(a.size for a in jax.tree.leaves(params)),
        "largest": exact,
        "ARPACK, float64": in_float64(loss, params, x, y),
        "methods": {},
    }
    fewest_steps: Calls = {}
    twenty_steps: Calls = {}

    random, gradient, eighth = fewest_of_lanczos(loss, exact, params, x, y, keys)
    makers = {
        "ours": (ours, random),
        "ours, from the gradient": (ours_from_gradient, gradient),
        "ours, from an eighth": (ours_from_an_eighth, eighth),
        "matfree": (matfree, random),
    }
    for name, (make, steps) in makers.items():

        def compiled(steps: int, make: Callable = make) -> Any:
            return jax.jit(make(loss, steps)).lower(params, x, y, keys[0]).compile()

        def timed(run: Any) -> Callable[[], float]:
            def call() -> float:
                start = time.perf_counter()
                jax.block_until_ready(run(params, x, y, keys[1]))
                return time.perf_counter() - start

            return call

        start = time.perf_counter()
        run = compiled(steps)
        seconds, twenty = time.perf_counter() - start, compiled(20)
        fewest_steps[name], twenty_steps[name] = timed(run), timed(twenty)
        result["methods"][name] = {
            "steps": steps,
            "error": max(abs(float(run(params, x, y, key)) / exact - 1) for key in keys),
            "compiling": seconds,
            "MB": twenty.memory_analysis().temp_size_in_bytes / 2**20,
        }

    if python:
        worker, path = Worker(python), tempfile.mkdtemp() + "/arrays.npz"
        save_arrays(path, params, x, y)
        for method, name in (
            ("eigenvalues", "PyHessian, power iteration"), ("density", "PyHessian, Lanczos")
        ):  # fmt: skip

            def ask(steps: int, seed: int = 1, method: str = method) -> dict[str, float]:
                return worker(path=path, method=method, steps=steps, seed=seed)

            def error(steps: int, seed: int, ask: Callable = ask) -> float:
                return abs(ask(steps, seed)["largest"] / exact - 1)

            megabytes = ask(20)["MB"]
            # `all` stops at the first start vector that needs more.
            steps = fewest(lambda n, error=error: all(error(n, seed) <= LIMIT for seed in SEEDS))
            fewest_steps[name] = lambda ask=ask, steps=steps: ask(steps)["seconds"]
            twenty_steps[name] = lambda ask=ask: ask(20)["seconds"]
            worst = max(error(steps, seed) for seed in SEEDS)
            result["methods"][name] = {"steps": steps, "error": worst, "MB": megabytes}
    return result, fewest_steps, twenty_steps


def in_turns(calls: Calls, turns: int) -> dict[str, list[float]]:
    """Minimum, median and maximum of the seconds of every call, one after the other."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            seconds = call()
            if turn:  # the first is to warm up
                taken[name].append(seconds)
    return {name: [min(t), float(np.median(t)), max(t)] for name, t in taken.items()}


def measure(network: str, state: str, repeats: int, python: str | None) -> dict[str, Any]:
    result, fewest_steps, twenty_steps = prepare(network, state, python)
    for key, calls, turns in (
        ("seconds", fewest_steps, repeats),
        ("seconds, 20 steps", twenty_steps, repeats // 2),
    ):
        for name, taken in in_turns(calls, turns).items():
            result["methods"][name][key] = taken
    return result


def show(results: dict[str, Any]) -> None:
    print(
        "| problem | method | steps | error, % | ms: min / median / max | over ours | 20 steps, ms | MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for problem, result in results.items():
        first = result["methods"]["ours"]["seconds"][1]
        for name, row in result["methods"].items():
            steps = f"{'> ' if row['error'] > LIMIT else ''}{row['steps']}"
            spread = " / ".join(f"{1e3 * t:.0f}" for t in row["seconds"])
            print(
                f"| {problem} | {name} | {steps} | {100 * row['error']:.2f} | {spread} | "
                f"{row['seconds'][1] / first:.2f} | {1e3 * row['seconds, 20 steps'][1]:.0f} | "
                f"{row['MB']:.0f} |"
            )
    for problem, result in results.items():
        compiling = ", ".join(
            f"{name} {row['compiling']:.1f} s"
            for name, row in result["methods"].items()
            if "compiling" in row
        )
        print(
            f"\n{problem}: {result['parameters']} parameters, λ₁ {result['largest']:.5f} (ARPACK "
            f"in float64 {result['ARPACK, float64']:.5f}); tracing and compiling: {compiling}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pyhessian-python", help="the Python of an environment with PyHessian")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--problems", nargs="*", help="such as 'mlp, trained'; all if left out")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/curvature_peers.json"))
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    every = [f"{network}, {state}" for network in NETWORKS for state in ("initial", "trained")]
    for problem in options.problems or every:
        if problem not in results:
            network, state = problem.split(", ")
            results[problem] = measure(network, state, options.repeats, options.pyhessian_python)
            write_json(options.out, results)
    show(results)


if __name__ == "__main__":
    main()
