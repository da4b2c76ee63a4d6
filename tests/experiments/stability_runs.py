"""The runs behind `stable_learning_rate.py`: what is stable, and the bisection that finds the limit."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import cross_entropy, data

import adabatch_jax as adabatch
from adabatch_jax.curvature import lanczos, random_unit
from adabatch_jax.training.models import MLP

SEEDS = (0, 1, 2)
SIZES = {
    "local": (1, 4, 16, 64, 256, 1024, 4096),
    "frozen": (1, 4, 16, 64, 256, 1024),
    "global": (4, 16, 64, 256, 1024, 4096),
    "damping": (1, 4, 16, 64, 256, 1024),
}
RATES = 8  # tried at once
STEPS, PROBES = 128, 16
MARGIN = {"local": 1.5, "frozen": 1.0, "global": 1.0, "damping": 1.5}
GROUPS = (128, 32)  # of examples, for the curvature
DAMPED = (0.01, 16)  # rate and batch size from which ε is followed


class Method(NamedTuple):
    make: Callable[[Any], optax.GradientTransformation]
    momentum: float
    adaptive: bool
    frozen: optax.GradientTransformation


METHODS = {
    "sgd": Method(lambda eps: optax.identity(), 0.0, False, optax.identity()),
    "momentum": Method(lambda eps: optax.trace(0.9), 0.9, False, optax.trace(0.9)),
    "adam": Method(
        lambda eps: optax.scale_by_adam(eps=eps), 0.9, True, optax.ema(0.9, debias=False)
    ),
}
MODEL = MLP(10, width=64)


def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return cross_entropy(MODEL.apply(params, batch[0]), batch[1])


def draw(key: jax.Array, size: int, examples: Any) -> Any:
    index = jax.random.randint(key, (size,), 0, len(examples[1]))
    return jax.tree.map(lambda a: a[index], examples)


@functools.partial(jax.jit, static_argnames=("name", "size", "steps"))
def rollout(params, state, key, rates, eps, examples, *, name: str, size: int, steps: int):
    """Trains at every rate of a vector with the same batches: losses [rate, probe], parameters."""
    held_out = jax.tree.map(lambda a: a[:2048], examples)

    def one(params, state, rate, eps, batch):
        updates, state = METHODS[name].make(eps).update(jax.grad(loss_fn)(params, batch), state)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state

    def step(carry, key):
        batch = draw(key, size, examples)
        return jax.vmap(one, in_axes=(0, 0, 0, 0, None))(*carry, rates, eps, batch), None

    def probe(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, jax.vmap(loss_fn, in_axes=(0, None))(carry[0], held_out)

    copies = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(rates), *a.shape)), (params, state))
    keys = jax.random.split(key, steps).reshape(PROBES, -1)
    (params, _), losses = jax.lax.scan(probe, copies, keys)
    return losses.T, params


@functools.partial(jax.jit, static_argnames=("name", "size"))
def frozen_growth(point, root, vector, key, rates, examples, *, name: str, size: int):
    """log(|v| after all steps / after half of them) of v ← v − α D^-½ G_b D^-½ v, [rate]."""
    direction = METHODS[name].frozen

    def one(v, state, rate, batch):
        product = adabatch.curvature.gauss_newton_vector_product(
            MODEL.apply, cross_entropy, point, *batch
        )
        image = product.linear()(jax.tree.map(jnp.divide, v, root))
        updates, state = direction.update(jax.tree.map(jnp.divide, image, root), state)
        return jax.tree.map(lambda a, u: a - rate * u, v, updates), state

    def step(carry, key):
        batch = draw(key, size, examples)
        return jax.vmap(one, in_axes=(0, 0, 0, None))(*carry, rates, batch), None

    def run(key):
        copies = (vector, direction.init(vector))
        copies = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(rates), *a.shape)), copies)
        first, second = jax.random.split(key, STEPS).reshape(2, -1)
        half, _ = jax.lax.scan(step, copies, first)
        end, _ = jax.lax.scan(step, half, second)
        norm = jax.vmap(optax.tree.norm)
        return jnp.log(norm(end[0]) / norm(half[0]))

    return jax.lax.map(run, jax.random.split(key, 2 if size < 256 else 1)).mean(0)


@functools.cache
def start(seed: int) -> tuple[Any, Any]:
    """The initialisation of a seed and its θ₀."""
    examples = data("fashion-mnist")["train"]
    params = MODEL.init(jax.random.key(seed), examples[0][:1])
    rate, eps = jnp.full(1, 0.02), jnp.full(1, 1e-8)
    key = jax.random.key(100 + seed)
    _, trained = rollout(
        params, optax.EmptyState(), key, rate, eps, examples, name="sgd", size=64, steps=928
    )
    return params, jax.tree.map(lambda a: a[0], trained)


@functools.partial(jax.jit, static_argnames=("size", "count"))
def averages(params, key, examples, *, size: int, count: int = 200):
    """Adam's state after steps of rate 0."""
    adam = optax.scale_by_adam()

    def step(state, key):
        batch = draw(key, size, examples)
        return adam.update(jax.grad(loss_fn)(params, batch), state)[1], None

    return jax.lax.scan(step, adam.init(params), jax.random.split(key, count))[0]


@functools.cache
def prepared(name: str, size: int, seed: int) -> tuple[Any, Any]:
    """State of the optimizer at θ₀, and the square root of D."""
    point, examples = start(seed)[1], data("fashion-mnist")["train"]
    if name != "adam":
        return METHODS[name].make(0.0).init(point), jax.tree.map(jnp.ones_like, point)
    state = averages(point, jax.random.key(200 + seed), examples, size=size)
    fill = 1.0 - 0.999 ** state.count.astype(jnp.float32)
    return state, jax.tree.map(lambda v: jnp.sqrt(jnp.sqrt(v / fill) + 1e-8), state.nu)


def scaled_loss(move: Any, batch: Any, point: Any, root: Any) -> jax.Array:
    """The loss at θ₀ + D^-½ u; its Hessian in u is D^-½ H D^-½."""
    return loss_fn(jax.tree.map(lambda p, u, d: p + u / d, point, move, root), batch)


@jax.jit
def top(point, root, groups, key):
    """λ₁ of D^-½ H D^-½, and its eigenvector."""
    zero = jax.tree.map(jnp.zeros_like, point)
    whole = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), groups)
    product = adabatch.curvature.hessian_vector_product(scaled_loss, zero, whole, point, root)
    spectrum, vector = lanczos(product.linear(), random_unit(key, zero), 30)
    return jnp.max(spectrum.eigenvalues), vector


@jax.jit
def noise(point, root, groups, key):
    """ν² of the same matrix."""
    loss = lambda u, batch: scaled_loss(u, batch, point, root)
    zero = jax.tree.map(jnp.zeros_like, point)
    return adabatch.curvature.hessian_noise(loss, zero, groups, key, num_steps=20)


def curvature_arguments(name: str, size: int, seed: int, point: Any = None) -> Any:
    """Arguments of `top` and `noise`; every seed has examples of its own."""
    stop = (seed + 1) * GROUPS[0] * GROUPS[1]
    groups = jax.tree.map(
        lambda a: a[stop - GROUPS[0] * GROUPS[1] : stop].reshape(*GROUPS, *a.shape[1:]),
        data("fashion-mnist")["train"],
    )
    point = start(seed)[1] if point is None else point
    return point, prepared(name, size, seed)[1], groups, jax.random.key(300 + seed)


def measure_curvature(name: str, size: int) -> dict[str, Any]:
    """λ₁ and ν² of every seed."""
    arguments = [curvature_arguments(name, size, seed) for seed in SEEDS]
    largest, level = [float(top(*a)[0]) for a in arguments], [float(noise(*a)) for a in arguments]
    return {"l1": largest, "nu2": level}


def severity(kind: str, name: str, size: int, seed: int, rate: float) -> Callable[[Any], Any]:
    """A function of rates (kind "damping": of 1/ε, at `rate`): how bad, and the last parameters."""
    examples = data("fashion-mnist")["train"]
    params, point = start(seed)
    key = jax.random.key(400 + seed)
    if kind == "frozen":
        root, vector = prepared(name, size, seed)[1], top(*curvature_arguments(name, size, seed))[1]
        grow = functools.partial(frozen_growth, name=name, size=size)
        return lambda rates: (grow(point, root, vector, key, rates, examples) / np.log(2.0), None)
    if kind == "global":
        state, origin = METHODS[name].make(1e-8).init(params), params
        steps = min(max(30_000 // size, 32), 2048)
    else:
        state, origin = prepared(name, size, seed)[0], point
        steps = min(STEPS, 2**17 // size)
    before = loss_fn(origin, jax.tree.map(lambda a: a[:2048], examples))

    def run(values: jax.Array) -> tuple[jax.Array, Any]:
        rates, eps = values, jnp.full(len(values), 1e-8)
        if kind == "damping":
            rates, eps = jnp.full(len(values), rate), 1.0 / values
        sizes = dict(name=name, size=size, steps=steps // PROBES * PROBES)
        losses, last = rollout(origin, state, key, rates, eps, examples, **sizes)
        if kind == "global":
            return losses[:, -1] / (0.5 * np.log(10.0)), last
        return losses.max(-1) / before, last

    return run


def bisect(run: Callable[[Any], Any], guess: float, margin: float) -> tuple[float, list[Any]]:
    """Where the severity first exceeds `margin`, to 1/9 of an octave; all that was tried."""
    tried: list[Any] = []

    def bad(grid: np.ndarray) -> np.ndarray:
        found = np.nan_to_num(np.asarray(run(jnp.asarray(grid, jnp.float32))[0]), nan=np.inf)
        tried.extend(zip(grid.tolist(), np.minimum(found, 1e9).tolist(), strict=True))
        return ~(found <= margin)

    low = guess * 2.0 ** -(RATES // 2)
    for _ in range(5):
        grid = low * 2.0 ** np.arange(RATES)
        now = bad(grid)
        if now[0]:
            low /= 2.0 ** (RATES - 1)
        elif not now.any():
            low *= 2.0 ** (RATES - 1)
        else:
            break
    else:
        return float("nan"), tried
    low = grid[np.argmax(now) - 1]
    now = bad(low * 2.0 ** (np.arange(1, RATES + 1) / (RATES + 1)))
    first = np.argmax(now) if now.any() else RATES
    return float(low * 2.0 ** ((first + 0.5) / (RATES + 1))), tried


def measure(kind: str, name: str, size: int, guesses: Any, rate: float = 0.0) -> dict[str, Any]:
    """The limit of every seed; kind "local": λ₁ at the end of a run a little below it, too."""
    limits, curves, ends = [], [], []
    for seed, guess in zip(SEEDS, guesses, strict=True):
        run = severity(kind, name, size, seed, rate)
        limit, tried = bisect(run, float(guess), MARGIN[kind])
        limits.append(limit)
        curves.append(tried)
        if kind == "local":
            last = jax.tree.map(lambda a: a[0], run(jnp.full(1, limit / 1.1))[1])
            ends.append(float(top(*curvature_arguments(name, size, seed, last))[0]))
    return {"limit": limits, "tried": curves, "end": ends, "mean": float(np.mean(limits))}


def predicted(name: str, size: int, done: dict[str, Any], form: str = "") -> Any:
    """The formula, [seed]. Form "without m": its noise over (1 + β)/(1 − β); "piecewise"."""
    beta, adaptive = METHODS[name].momentum, METHODS[name].adaptive
    found = done[f"curvature | adam {size}" if adaptive else "curvature | plain"]
    largest, noise = np.asarray(found["l1"]), np.asarray(found["nu2"])
    if form == "without m":
        noise = noise * (1 - beta) / (1 + beta)
    kind = dict(momentum=beta, adaptive=adaptive, piecewise=form == "piecewise")
    bound = adabatch.curvature.max_stable_learning_rate(
        largest, noise=noise, batch_size=size, **kind
    )
    return np.asarray(bound)


def damped_prediction(rate: float, size: int, done: dict[str, Any]) -> Any:
    """ε ≫ √v̂ makes Adam SGD of rate α/ε with averaged momentum: ε = α / its bound, [seed]."""
    largest, noise = (np.asarray(done["curvature | plain"][k]) for k in ("l1", "nu2"))
    kind = dict(momentum=0.9, adaptive=True, batch_size=size)
    return rate / np.asarray(
        adabatch.curvature.max_stable_learning_rate(largest, noise=noise, **kind)
    )


def damped_cases() -> dict[str, list[tuple[float, int]]]:
    rate, base = DAMPED
    return {
        "B, rate fixed": [(rate, b) for b in SIZES["damping"]],
        "B, rate ∝ √B": [(rate * (b / base) ** 0.5, b) for b in SIZES["damping"]],
        "rate, B fixed": [(rate * 2.0**k, base) for k in (-2, 0, 2, 4)],
    }


def wanted(done: dict[str, Any], parts: list[str]) -> list[tuple[str, Any]]:
    """Curvatures first: what is predicted from them is where the search begins."""
    run: Any = functools.partial
    runs = [("curvature | plain", run(measure_curvature, "sgd", 0))]
    runs += [(f"curvature | adam {b}", run(measure_curvature, "adam", b)) for b in SIZES["local"]]
    if any(key not in done for key, _ in runs):
        return runs
    runs = []
    above = {"sgd": 8.0, "momentum": 4.0, "adam": 16.0}  # of the global limit, roughly
    for b, kind, name in itertools.product(SIZES["local"], parts, METHODS):
        if kind != "damping" and b in SIZES[kind]:
            guess = predicted(name, b, done) * (above[name] if kind == "global" else 1)
            runs.append((f"{kind} {b} | {name}", run(measure, kind, name, b, guess)))
    for rate, b in itertools.chain(*damped_cases().values()) if "damping" in parts else ():
        guess = 1 / damped_prediction(rate, b, done)
        runs.append((f"damping {b} | {rate:.4g}", run(measure, "damping", "adam", b, guess, rate)))
    return sorted(runs, key=lambda run: int(run[0].split()[1]))  # small batches are quick
