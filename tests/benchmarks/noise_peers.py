"""What the norm test and the inner product test need, ours and every peer's, over a plain step.

    pip install ".[train]"
    tests/benchmarks/peers.sh .peers
    python tests/benchmarks/noise_peers.py --peers-python .peers/bin/python

The norm test needs ‖ḡ‖² and tr Σ of one example, the other ‖ḡ‖² and the variance of ⟨gᵢ, ḡ⟩. Networks and
batches are those of noise_estimators.py, float32, two threads. PyTorch (eager) has the same parameters and
batch; its CNN is of convolutions, ours of matrix products. Without `--peers-python` its peers are left out.

Each time is over the plain step, value and gradient, of its own framework, in the same process and turn;
both processes take turns. What takes longer than 0.2 s runs in every eighth turn, four times at least.
Minimum, median and maximum. Errors are relative to single examples in float64, without our code. Those of
groups and signs are of sampling: they estimate with fewer degrees of freedom.

MB of JAX are what XLA allots beyond arguments and results; of PyTorch, what the peak of a fresh process
grows by, less the gradient. BackPACK 1.7.1 has no BatchDotGrad: its inner products are from BatchGrad.
Cockpit gives θ, from which the variance follows. Ghost norms are Opacus' for clipping, without gradients.

A problem takes two to five minutes, and is kept in runs/benchmarks/noise_peers.json. `--no-times` leaves
out what needs a machine of its own. Expected, medians of two runs:

| norm test, over plain | MLP | CNN | transformer |
|---|---|---|---|
| ours, 8 groups | 1.9, 1.9 | 0.55, 0.53 | 0.88, 1.3 |
| ours, 1 sign vector | 1.7, 1.7 | 1.3, 1.3 | 1.3, 2.0 |
| ours, examples, structured | 1.1, 1.1 | 1.1, 1.1 | 1.1, 1.1 |
| ours, examples one by one | 12, 12 | 0.94, 0.89 | 1.1, 1.7 |
| ours, examples, 16 at once | 226, 222 | 4.1, 4.2 | 0.91, 1.3 |
| Optax, micro_grad, the fastest | 20, 14 | 1.0, 1.0 | 0.77, 1.1 |
| JAX, vmap(grad) | 201, 201 | 5.3, 5.1 | 1.1, 1.1 |
| BackPACK, BatchL2Grad | 1.2, 1.2 | 2.2, 2.1 | no LayerNorm |
| BackPACK, Variance | 2.1, 2.2 | 5.9, 5.6 | no LayerNorm |
| Cockpit, NormTest | 39, 42 | 5.2, 5.0 | no LayerNorm |
| Opacus, GradSampleModule | 52, 42 | 5.2, 5.0 | 1.8, 1.8 |
| Opacus, ghost norms | 1.3, 1.3 | 1.6, 1.5 | no tied weights |
| torch.func, vmap(grad) | 24, 26 | 3.5, 3.6 | 2.0, 1.9 |

Our and PyTorch's plain steps take 14 and 17 ms there, 79 and 43 (CNN), 36 and 31 (transformer; 23 and 28
in the second run, and what needs little memory has larger ratios). Structured is `noise/_structured/`,
which is not public; its rows are from two runs without PyTorch: 1.11, 1.13 (MLP), 1.06, 1.11, 1.08, 1.09.
That is 180 times as fast as vmap(grad) on the MLP, 4.6 times on the CNN, and no faster on the transformer,
where vmap(grad) costs next to nothing.
Inner products: structured 1.5, 1.1, 1.1 to 1.2; 8 groups 3.1 to 3.2, 0.8, 1.6 to 2.2; examples one by one
14 to 17, 1.6, 2.0 to 2.9; vmap(grad) 166 to 266, 4.6, 1.0 to 1.3; the fastest of the peers in PyTorch 21
(BatchGrad), 3.4 to 3.7 and 1.7 to 1.9 (torch.func).
Memory on the MLP, in MB: structured 4, ours else 5 to 8 (16 at once 167), BackPACK's norms 12, vmap(grad)
1,027, Opacus 2,610; of the structured form on the CNN 101, plain 98, transformer 42, plain 42.
Exact methods agree to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from noise_estimators import PROBLEMS, methods, problem

import adabatch_jax as adabatch
from adabatch_jax.noise._structured._estimate import value_and_grad_structured
from adabatch_jax.training._files import write_json

AT_ONCE = 16  # examples whose gradients are held at once, where they are not all
SLOW, EVERY, FEWEST = 0.2, 8, 4  # from how many seconds; in which turn; how often at least
PLAIN = {"JAX": "plain: JAX", "PyTorch": "plain: PyTorch"}
PyTree = Any


def loss_of(net: nn.Module) -> Callable[..., jax.Array]:
    """The mean loss of a batch; its examples are of equal length."""

    def loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y).mean()

    return loss


def squared_norm(tree: PyTree) -> jax.Array:
    return sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree))


def product(a: PyTree, b: PyTree) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def by_jax(net: nn.Module, size: int) -> dict[str, Callable[..., Any]]:
    """Functions of parameters and batch: the mean gradient, ‖ḡ‖² and the variance that the test needs."""
    loss, known = loss_of(net), methods(net, size)
    key = jax.random.key(1)

    def plain(params: PyTree, x: jax.Array, y: jax.Array) -> Any:
        return known["plain"][0](params, (x, y), key)

    def norms(method: str) -> Callable[..., Any]:
        def run(params: PyTree, x: jax.Array, y: jax.Array) -> Any:
            noise = known[method][0](params, (x, y), key)[1]
            return noise.mean, noise.squared_norm, noise.trace

        return run

    def ours(
        groups: int,
        products: bool,
        measure: Callable[..., Any] = adabatch.value_and_grad_noise,
        **options: Any,
    ) -> Callable[..., Any]:
        fn = measure(lambda params, group: loss(params, *group), inner_products=products, **options)

        def run(params: PyTree, x: jax.Array, y: jax.Array) -> Any:
            noise = fn(params, adabatch.split_groups((x, y), groups))[1]
            scatter = noise.inner_product_scatter if products else noise.scatter
            return noise.mean, noise.squared_norm, noise.variance(scatter)

        return run

    def micro_grad(at_once: int | None) -> Callable[..., Any]:
        fn = optax.microbatching.micro_grad(
            loss,
            batch_argnums=(1, 2),
            microbatch_size=at_once,
            accumulator=optax.microbatching.AccumulationType.MEAN,
            metrics_fn=squared_norm,
        )

        def run(params: PyTree, x: jax.Array, y: jax.Array) -> Any:
            mean, each = fn(params, x, y)
            norm = squared_norm(mean)
            return mean, norm, (each.metrics.sum() - size * norm) / (size - 1)

        return run

    def vmap_grad(products: bool) -> Callable[..., Any]:
        each = jax.vmap(lambda params, x, y: jax.grad(loss)(params, x[None], y[None]), (None, 0, 0))

        def run(params: PyTree, x: jax.Array, y: jax.Array) -> Any:
            gradients = each(params, x, y)
            mean = jax.tree.map(lambda g: g.mean(0), gradients)
            if products:
                along = jax.vmap(product, (0, None))(gradients, mean)
                return mean, squared_norm(mean), along.var(ddof=1)
            apart = squared_norm(jax.tree.map(lambda g, m: g - m, gradients, mean))
            return mean, squared_norm(mean), apart / (size - 1)

        return run

    return {
        PLAIN["JAX"]: plain,
        "norm test: ours, 8 groups": norms("groups, 8"),
        "norm test: ours, 8 groups at once": norms("groups, 8 at once"),
        "norm test: ours, 1 sign vector": norms("signs, 1"),
        "norm test: ours, examples, structured": ours(size, False, value_and_grad_structured),
        "norm test: ours, examples one by one": ours(size, False),
        f"norm test: ours, examples, {AT_ONCE} at once": ours(size, False, vectorize=AT_ONCE),
        "norm test: Optax, micro_grad, one by one": micro_grad(1),
        f"norm test: Optax, micro_grad, {AT_ONCE} at once": micro_grad(AT_ONCE),
        "norm test: Optax, micro_grad, all at once": micro_grad(None),
        "norm test: JAX, vmap(grad)": vmap_grad(False),
        "inner products: ours, 8 groups": ours(8, True),
        "inner products: ours, examples, structured": ours(size, True, value_and_grad_structured),
        "inner products: ours, examples one by one": ours(size, True),
        f"inner products: ours, examples, {AT_ONCE} at once": ours(size, True, vectorize=AT_ONCE),
        "inner products: JAX, vmap(grad)": vmap_grad(True),
    }


def reference(net: nn.Module, params: PyTree, x: jax.Array, y: jax.Array) -> dict[str, float]:
    """‖ḡ‖², tr Σ and the variance of ⟨gᵢ, ḡ⟩ from single examples, in float64 and without our code."""
    loss = loss_of(net)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), params)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jnp.asarray(np.asarray(x, np.float64))

        def both(params: PyTree, x: jax.Array, y: jax.Array) -> Any:
            mean = jax.grad(loss)(params, x, y)

            def one(example: tuple[jax.Array, jax.Array]) -> Any:
                gradient = jax.grad(loss)(params, *(a[None] for a in example))
                apart = jax.tree.map(jnp.subtract, gradient, mean)
                return squared_norm(apart), product(apart, mean)

            apart, along = jax.lax.map(one, (x, y))
            freedom = len(x) - 1
            return squared_norm(mean), apart.sum() / freedom, jnp.square(along).sum() / freedom

        found = [float(a) for a in jax.jit(both)(params, x, y)]
    return dict(zip(("squared_norm", "norm test", "inner products"), found, strict=True))


def for_torch(name: str, params: PyTree) -> dict[str, np.ndarray]:
    """The parameters by the names and in the layout of torch_peers_worker.py."""
    tree, found = jax.tree.map(np.asarray, params["params"]), {}

    def dense(source: Any, target: str) -> None:
        bias = source["bias"].ravel()  # attention's have an axis of heads
        weight = source["kernel"].reshape(-1, len(bias)).T
        found.update({f"{target}.weight": weight, f"{target}.bias": bias})

    if name == "transformer":
        found |= {"embed.weight": tree["Embed_0"]["embedding"]}
        found |= {"positions.weight": tree["positions"]}
        norms = [f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)] + ["norm"]
        for i, target in enumerate(norms):
            norm = tree[f"LayerNorm_{i}"]
            found |= {f"{target}.weight": norm["scale"], f"{target}.bias": norm["bias"]}
        for i in range(2):
            for layer, source in tree[f"MultiHeadDotProductAttention_{i}"].items():
                dense(source, f"blocks.{i}.{layer}")
            dense(tree[f"Dense_{2 * i}"], f"blocks.{i}.wide")
            dense(tree[f"Dense_{2 * i + 1}"], f"blocks.{i}.narrow")
        return found
    # Where the layers with weights stand in nn.Sequential.
    for i, place in enumerate((0, 2, 4) if name == "mlp" else (0, 3, 7, 9)):
        dense(tree[f"Dense_{i}"], str(place))
    if name == "cnn":
        for place in ("0", "3"):  # [out, 9 · in], the neighbourhood first
            weight = found[f"{place}.weight"]
            found[f"{place}.weight"] = weight.reshape(len(weight), 3, 3, -1).transpose(0, 3, 1, 2)
        # Flattened here as [height, width, channels], there as [channels, height, width].
        weight = found["7.weight"].reshape(-1, 7, 7, 64).transpose(0, 3, 1, 2)
        found["7.weight"] = weight.reshape(len(weight), -1)
    return {key: np.ascontiguousarray(a) for key, a in found.items()}


class InJax:
    """Our process: compiled programs, and what they are given."""

    plain = PLAIN["JAX"]

    def __init__(self, name: str, scale: int) -> None:
        net, size, x, y = problem(name, scale)
        self.net, self.given = net, (net.init(jax.random.key(0), x[:1]), x[:size], y[:size])
        functions = by_jax(net, size)
        self.compiled = {m: jax.jit(f).lower(*self.given).compile() for m, f in functions.items()}
        self.names = list(self.compiled)

    def turn(self, names: list[str]) -> dict[str, Any]:
        """Seconds and values of each, after a plain step that warms the caches."""
        jax.block_until_ready(self.compiled[self.plain](*self.given))
        answer = {}
        for name in names:
            start = time.perf_counter()
            result = jax.block_until_ready(self.compiled[name](*self.given))
            seconds = time.perf_counter() - start
            values = None if name == self.plain else [float(a) for a in result[1:]]
            answer[name] = {"seconds": seconds, "values": values}
        return answer

    def megabytes(self, name: str) -> float:
        return self.compiled[name].memory_analysis().temp_size_in_bytes / 2**20


class InTorch:
    """The peers' process; one request at a time."""

    plain = PLAIN["PyTorch"]

    def __init__(self, python: str, name: str, ours: InJax) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = f"{self.folder.name}/arrays.npz"
        params, x, y = ours.given
        np.savez(path, x=np.asarray(x), y=np.asarray(y), **for_torch(name, params))
        script = str(Path(__file__).with_name("torch_peers_worker.py"))
        self.command = [python, "-W", "ignore", script, "2", name, path]
        self.process, self.names = self.started({})

    def started(self, extra: dict[str, str]) -> tuple[subprocess.Popen[str], list[str]]:
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Threads that wait would spin otherwise, and take the processor from us.
            env=os.environ | {"OMP_WAIT_POLICY": "passive"} | extra,
        )
        assert process.stdout
        return process, json.loads(process.stdout.readline())

    @staticmethod
    def ask(process: subprocess.Popen[str], request: Any) -> Any:
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def turn(self, names: list[str]) -> dict[str, Any]:
        return self.ask(self.process, names)

    def megabytes(self, name: str) -> float:
        """In a process of its own, whose allocator gives everything back at once; a GPU's tells."""
        if jax.default_backend() == "gpu":
            return self.ask(self.process, name)
        process, _ = self.started({"MALLOC_MMAP_THRESHOLD_": "65536"})
        with process:
            grown = self.ask(process, name)
            assert process.stdin
            process.stdin.close()
        return grown


Side = InJax | InTorch


def sides(name: str, scale: int, python: str | None) -> list[Side]:
    ours = InJax(name, scale)
    return [ours, InTorch(python, name, ours)] if python else [ours]


def values(both: list[Side]) -> dict[str, dict[str, Any]]:
    """Of every method what it gives and allots, or why there is nothing."""
    found: dict[str, dict[str, Any]] = {}
    for side in both:
        for name, answer in side.turn(side.names).items():
            if "failed" in answer:
                found[name] = {"failed": answer["failed"]}
            else:
                found[name] = {"values": answer["values"], "MB": side.megabytes(name)}
    return found


def times(both: list[Side], seconds: float) -> dict[str, dict[str, Any]]:
    """Ratios to the plain step of the same process and turn; slow methods in every eighth turn."""
    taken: dict[str, list[tuple[float, float]]] = {}
    able, fast = [], []
    for side in both:
        first = {n: a["seconds"] for n, a in side.turn(side.names).items() if "seconds" in a}
        able.append(list(first))
        fast.append([n for n, passed in first.items() if passed <= SLOW or n == side.plain])
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn <= EVERY * (FEWEST - 1):
        for side, names in zip(both, fast if turn % EVERY else able, strict=True):
            answers = side.turn(names)
            base = answers[side.plain]["seconds"]
            for name, answer in answers.items():
                taken.setdefault(name, []).append((answer["seconds"], answer["seconds"] / base))
        turn += 1
    return {
        name: {
            "ms": float(1e3 * np.median([t for t, _ in pairs])),
            "ratio": [float(f([r for _, r in pairs])) for f in (np.min, np.median, np.max)],
            "turns": len(pairs),
        }
        for name, pairs in taken.items()
    }


def show(results: dict[str, Any]) -> None:
    print(
        "| problem | test | method | ms | over plain: min / median / max | turns | MB | "
        "‖ḡ‖², error | variance, error |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        exact, timed = result["reference"], result.get("time", {})
        for row, found in result["values"].items():
            test, method = row.split(": ")
            start = f"| {name} | {test} | {method} |"
            if "failed" in found:
                print(f"{start} not supported: {found['failed']} | | | | | |")
                continue
            times = "– | – | –"
            if row in timed:
                ratios = " / ".join(f"{r:.2f}" for r in timed[row]["ratio"])
                times = f"{timed[row]['ms']:.1f} | {ratios} | {timed[row]['turns']}"
            errors = "– | –"
            if found["values"]:
                norm, variance = found["values"]
                errors = (
                    f"{norm / exact['squared_norm'] - 1:.1e} | {variance / exact[test] - 1:.1e}"
                )
            print(f"{start} {times} | {found['MB']:.0f} | {errors} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, help="one of them; all if left out")
    parser.add_argument("--no-times", action="store_true", help="values and memory alone")
    parser.add_argument("--seconds", type=float, default=60.0, help="of turns, at least")
    parser.add_argument("--scale", type=int, default=1, help="batches so many times as large")
    parser.add_argument("--peers-python", help="the Python of the environment of peers.sh")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/noise_peers.json"))
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in [options.problem] if options.problem else PROBLEMS:
        result = results.setdefault(name, {})
        both: list[Side] | None = None
        if "values" not in result:
            both = sides(name, options.scale, options.peers_python)
            net, (params, x, y) = both[0].net, both[0].given
            result["reference"] = reference(net, params, x, y)
            result["values"] = values(both)
            write_json(options.out, results)
        if not options.no_times and "time" not in result:
            both = both or sides(name, options.scale, options.peers_python)
            result["time"] = times(both, options.seconds)
            write_json(options.out, results)
    show(results)


if __name__ == "__main__":
    main()
