"""What gathering micro-batches costs: the fused step and the drop-in against optax.MultiSteps.

    pip install ".[train]"
    python tests/benchmarks/accumulation.py

Adam; k micro-batches make one optimizer step, k = 1 … 64; random data, float32. Three networks: an MLP
(784-1024-1024-1024-10, micro-batches of 32), the CNN of the command (32 images of 28 × 28), its
transformer (8 windows of 64 bytes). In one process, in turns; the ratio is that of one turn, and parameters
and state are donated everywhere:

* bare: `jax.value_and_grad` of a micro-batch, k calls, nothing added up;
* MultiSteps: `optax.MultiSteps(adam, k)`, k calls of gradient and update;
* MultiSteps, guarded: the same with `optax.skip_not_finite`, since ours skips such gradients, too;
* drop-in: `adaptive_multi_steps` around the norm test and Adam, k calls;
* loop: what one would write by hand: a loop that adds up k gradients and one update, one call;
* fused: `value_and_grad_noise` over the first k of 64 groups and one update, one call.

Then a controller that has nothing to do, in fused steps of 16 micro-batches, over the loop by hand: at its
largest batch size, and between two tests (`test_interval`); and one that tests. "Known": `measure` is given
while compiling, not read from the state. Memory is what is alive during a call, parameters and optimizer
state among it, without the examples. Last, both once more for the MLP and 16 micro-batches of 64, 128 and
256: the larger, the less it matters that all weights are read again.
About five minutes a network, the MLP nine; those done are kept in runs/benchmarks/accumulation.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from noise_estimators import WideMLP, added_up

import adabatch_jax as adabatch
from adabatch_jax.training._files import write_json
from adabatch_jax.training.models import CNN, Transformer

PyTree = Any
Way = Callable[[PyTree], PyTree]  # one optimizer step: what it was given before, what it leaves
GROUPS = 64
COUNTS = (1, 2, 4, 8, 16, 32, 64)
LARGER = (2, 4, 8)  # times the MLP's micro-batch
GUARD = {"should_skip_update_fn": optax.skip_not_finite}
RATE = 1e-6  # the parameters hardly move, so every turn computes the same


SIZES = {"mlp": 32, "cnn": 32, "transformer": 8}  # of a micro-batch
PROBLEMS = tuple(SIZES)


def problem(name: str, scale: int = 1) -> tuple[Callable[..., jax.Array], PyTree, PyTree]:
    """The mean loss, parameters, and groups of examples [GROUPS, micro-batch size, …]."""
    rng, size = np.random.default_rng(0), scale * SIZES[name]
    net: nn.Module
    if name == "transformer":
        text = rng.integers(0, 256, (GROUPS, size, 65))
        net, x, y = Transformer(256), jnp.asarray(text[..., :-1], jnp.int32), text[..., 1:]
    else:
        shape = (784,) if name == "mlp" else (28, 28)
        net = WideMLP(hidden=3) if name == "mlp" else CNN(10)
        x = jnp.asarray(rng.normal(size=(GROUPS, size, *shape)), jnp.float32)
        y = rng.integers(0, 10, (GROUPS, size))

    def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
        logits = net.apply(params, batch[0])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    return loss_fn, net.init(jax.random.key(0), x[0]), (x, jnp.asarray(y))


def controlled(size: int, largest: int, **more: Any) -> optax.GradientTransformation:
    adapt = adabatch.adapt_batch_size(
        adabatch.norm_test(1e6), initial_batch_size=size, max_batch_size=largest, **more
    )
    return optax.chain(adapt, optax.adam(RATE))


def by_hand(loss_fn: Callable[..., jax.Array], optimizer: Any) -> Callable[..., Any]:
    def step(params: PyTree, state: PyTree, groups: PyTree, count: jax.Array) -> Any:
        sums = added_up(loss_fn, params, groups, count)
        value, gradient = jax.tree.map(lambda x: x / count, sums)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def fused(
    loss_fn: Callable[..., jax.Array],
    optimizer: Any,
    wanted: Callable[[PyTree], Any] = adabatch.needs_noise,
) -> Callable[..., Any]:
    """`wanted` tells of the optimizer state whether to measure the noise; None means always."""
    value_and_grad = adabatch.value_and_grad_noise(loss_fn)
    update = optax.with_extra_args_support(optimizer).update

    def step(params: PyTree, state: PyTree, groups: PyTree, count: jax.Array) -> Any:
        value, noise = value_and_grad(params, groups, count=count, measure=wanted(state))
        updates, state = update(noise.mean, state, params, value=value, noise=noise)
        return optax.apply_updates(params, updates), state, value

    return step


def one_call(loss_fn: Callable[..., jax.Array], optimizer: Any) -> Callable[..., Any]:
    def step(params: PyTree, state: PyTree, batch: PyTree) -> Any:
        value, gradient = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = optimizer.update(gradient, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    return step


def copied(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.array, tree)


def compiled(
    step: Callable[..., Any], *arguments: Any, donated: tuple[int, ...] = (0, 1)
) -> tuple[Callable[..., Any], float]:
    """The step, and the MB that are alive while it runs without the examples.

    The examples are the argument after the donated ones, or after the parameters.
    """
    run = jax.jit(step, donate_argnums=donated).lower(*arguments).compile()
    memory = run.memory_analysis()
    examples = sum(x.nbytes for x in jax.tree.leaves(arguments[len(donated) or 1]))
    beyond = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = memory.argument_size_in_bytes - examples + memory.temp_size_in_bytes + beyond
    return run, total / 2**20


def whole(
    step: Callable[..., Any], optimizer: Any, params: PyTree, groups: PyTree, count: jax.Array
) -> tuple[Way, PyTree, float]:
    """A way of one call for all micro-batches."""
    state = optimizer.init(params)
    run, megabytes = compiled(step, params, state, groups, count)
    return lambda given: run(*given[:2], groups, count), copied((params, state)), megabytes


def ways(name: str, scale: int, count: int) -> dict[str, tuple[Way, PyTree, float]]:
    """Of each: the optimizer step, what it starts from, and MB."""
    loss_fn, params, groups = problem(name, scale)
    size = groups[1].shape[1]
    batches = [jax.tree.map(lambda a, i=i: a[i], groups) for i in range(count)]
    found: dict[str, tuple[Way, PyTree, float]] = {}

    bare, megabytes = compiled(jax.value_and_grad(loss_fn), params, batches[0], donated=())

    def plain(given: PyTree) -> PyTree:
        for batch in batches:
            value, gradient = bare(given[0], batch)
        return given[0], gradient, value

    found["bare"] = plain, (params,), megabytes

    def add(name: str, optimizer: Any) -> None:
        state = optimizer.init(params)
        run, megabytes = compiled(one_call(loss_fn, optimizer), params, state, batches[0])

        def way(given: PyTree) -> PyTree:
            for batch in batches:
                given = run(*given[:2], batch)
            return given

        found[name] = way, copied((params, state)), megabytes

    inner = optax.with_extra_args_support(optax.adam(RATE))
    for title, skip in (("MultiSteps", {}), ("MultiSteps, guarded", GUARD)):
        add(title, optax.MultiSteps(inner, count, **skip).gradient_transformation())
    if count > 1:  # noise shows only between two
        controller = controlled(count * size, count * size * 2)
        add("drop-in", adabatch.adaptive_multi_steps(controller, micro_batch_size=size))

    number = jnp.int32(count)
    always = partial(fused, wanted=lambda state: None)
    for title, made, optimizer in (
        ("loop", by_hand, optax.adam(RATE)),
        ("fused", always, controlled(count * size, count * size * 2)),
    ):
        found[title] = whole(made(loss_fn, optimizer), optimizer, params, groups, number)
    return found


def idle(name: str, scale: int) -> dict[str, tuple[Way, PyTree, float]]:
    """Steps of 16 micro-batches: by hand, with a controller that rests, with one that tests."""
    loss_fn, params, groups = problem(name, scale)
    batch, count = 16 * groups[1].shape[1], jnp.int32(16)
    steps = {
        "none, loop by hand": (by_hand, optax.adam(RATE)),
        "at the maximum": (fused, controlled(batch, batch)),
        "at the maximum, known": (
            partial(fused, wanted=lambda state: False),
            controlled(batch, batch),
        ),
        "between tests": (fused, controlled(batch, 2 * batch, test_interval=1_000_000)),
        "testing": (fused, controlled(batch, 2 * batch)),
        "testing, known": (partial(fused, wanted=lambda state: True), controlled(batch, 2 * batch)),
    }
    return {
        title: whole(made(loss_fn, optimizer), optimizer, params, groups, count)
        for title, (made, optimizer) in steps.items()
    }


def measure(found: dict[str, tuple[Way, PyTree, float]], seconds: float) -> dict[str, Any]:
    """Milliseconds an optimizer step in turns, and the ratios to the first way and to MultiSteps."""
    given = {title: start for title, (_, start, _) in found.items()}
    taken: dict[str, list[float]] = {title: [] for title in found}
    end, turn = time.perf_counter() + seconds, 0
    while turn < 4 or time.perf_counter() < end:
        for title, (way, _, _) in found.items():
            start = time.perf_counter()
            left = jax.block_until_ready(way(given[title]))
            passed = time.perf_counter() - start
            given[title] = given[title] if title == "bare" else left
            if turn:  # the first warms up
                taken[title].append(passed)
        turn += 1
    arrays = {title: np.array(values) for title, values in taken.items()}

    def over(title: str, other: str) -> list[float]:
        ratio = arrays[title] / arrays[other]
        return [float(f(ratio)) for f in (np.min, np.median, np.max)]

    base = next(iter(found))
    return {
        title: {
            "ms": float(1e3 * np.median(arrays[title])),
            "over first": over(title, base),
            "over MultiSteps": over(title, "MultiSteps") if "MultiSteps" in arrays else None,
            "MB": megabytes,
            "turns": len(arrays[title]),
        }
        for title, (_, _, megabytes) in found.items()
    }


def show(results: dict[str, Any]) -> None:
    def spread(ratios: list[float] | None) -> str:
        return " / ".join(f"{r:.2f}" for r in ratios) if ratios else "–"

    print(
        "| network | size | k | way | ms | over bare: min / median / max | over MultiSteps | MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        for case, rows in result.items():
            for title, row in rows.items() if case.split()[1] != "idle" else ():
                print(
                    f"| {name} | {case.replace(' ', ' | ')} | {title} | {row['ms']:.1f} | "
                    f"{spread(row['over first'])} | {spread(row['over MultiSteps'])} | {row['MB']:.1f} |"
                )
    print(
        "\n| network | size | controller | ms | over none: min / median / max |\n|---|---|---|---|---|"
    )
    for name, result in results.items():
        for case, rows in result.items():
            for title, row in rows.items() if case.split()[1] == "idle" else ():
                ratios = spread(row["over first"])
                print(f"| {name} | {case.split()[0]} | {title} | {row['ms']:.1f} | {ratios} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, help="one of them; all if left out")
    parser.add_argument("--count", type=int, help="this k alone, or 0: only the idle controller")
    parser.add_argument("--scale", type=int, default=1, help="batches so many times as large")
    parser.add_argument("--seconds", type=float, default=25.0, help="of turns, for each k")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/accumulation.json"))
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in [options.problem] if options.problem else PROBLEMS:
        result = results.setdefault(name, {})
        cases = [(options.scale, count) for count in (*COUNTS, 0)]
        if name == "mlp":
            cases += [(options.scale * n, count) for n in LARGER for count in (16, 0)]
        for scale, count in cases:
            size = scale * SIZES[name]
            case = f"{size} {count or 'idle'}"  # micro-batch size, and how many make a step
            if case in result or options.count not in (None, count):
                continue
            found = ways(name, scale, count) if count else idle(name, scale)
            result[case] = measure(found, options.seconds)
            write_json(options.out, results)
    show(results)


if __name__ == "__main__":
    main()
