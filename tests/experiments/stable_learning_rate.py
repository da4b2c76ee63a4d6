"""The largest stable learning rate and the smallest stable ε against the batch size, by bisection.

    python tests/experiments/stable_learning_rate.py      # 20 to 25 minutes on two CPU cores
    python tests/experiments/stable_learning_rate.py --parts local frozen

Fashion-MNIST, an MLP of 51k parameters, three seeds (initialisation, batches with replacement, data of
the curvature). θ₀ is the point after 928 steps of SGD at rate 0.02 and batch 64. What is stable:

* local: from θ₀, 128 steps (at batch 4096: 32) at a constant rate never raise the loss on 2048 training
  examples above 1.5 times that of θ₀. Adam's averages are filled first, by 200 steps of rate 0. This is
  what the formula speaks of, as far as the curvature stays what it is at θ₀ and the noise of the
  gradient does not raise the loss by itself.
* frozen: the linear recursion alone, v ← v − α G_b v, with the Gauss-Newton matrices of batches at θ₀
  (their λ₁ and ν² are within 1 % of the Hessian's, and they have no negative curvature), from the top
  eigenvector; Adam with D frozen too. Unstable: |v| doubles in the second 64 of 128 steps (at batches
  below 256 the mean log of two runs). No gradient noise, no adaptation of the curvature.
* global: from the initialisation, 30,000 examples, but 32 to 2048 steps, end with a loss below half of
  log 10. (Below the initial loss would count networks that died: they reach log 10.)
* damping: local, for Adam's ε at a fixed rate.

Expected, in octaves of measured / predicted: the frozen limit of SGD is the formula's from batch 256 up
(within 0.1), and 0.3 to 0.9 above it below: the formula bounds the mean square, which rare runs
dominate. With momentum and under Adam the formula is right at batch 1024, and three octaves too high at
batches 1 and 4. A recursion with momentum remembers the noise: E x² of x ← x − α Σ βᵏ h x stops shrinking
at α = 2(1 + β)/(λ + m ν²/(b λ)), m = (1 + β)/(1 − β). With that m the frozen limit is 0.2 to 1.2 above
at every batch size, and the exponents are those of the abstract: 0.9 to 1.1 with momentum, 0.4 to 0.6 under
Adam. The local limit is one octave below the formula with m in the smallest batches, where the noise of
the gradient raises the loss by itself, and for SGD nearly two above in the largest, since λ₁ falls to a
third on the way. λ₁ at the end of the run explains that of SGD, not that with momentum. The global limit is
2 to 4.4 octaves above. The smallest ε goes as B to −1.1 at a fixed rate and to −0.5 at a rate ∝ √B, and as
the rate to 1.2; where Adam's rate is stable by itself there is none.

Every result is kept in runs.json: an interrupted command goes on where it stopped. The tables are
saved as table.md, the figure as figure.png.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import data, run_all
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import adabatch_jax as adabatch
from adabatch_jax.curvature._spectrum import lanczos, random_unit
from adabatch_jax.training._models import MLP
from adabatch_jax.training._plot_style import BLUE, GREEN, INK, ORANGE, PURPLE, TICKS, dress

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


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


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
        product = adabatch.gauss_newton_vector_product(MODEL.apply, cross_entropy, point, *batch)
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
    product = adabatch.hessian_vector_product(scaled_loss, zero, whole, point, root)
    spectrum, vector = lanczos(product.linear(), random_unit(key, zero), 30)
    return jnp.max(spectrum.eigenvalues), vector


@jax.jit
def noise(point, root, groups, key):
    """ν² of the same matrix."""
    loss = lambda u, batch: scaled_loss(u, batch, point, root)  # noqa: E731
    zero = jax.tree.map(jnp.zeros_like, point)
    return adabatch.hessian_noise(loss, zero, groups, key, num_steps=20)


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
    """The formula, [seed]. Form "momentum": its noise times (1 + β)/(1 − β); "piecewise"."""
    beta, adaptive = METHODS[name].momentum, METHODS[name].adaptive
    found = done[f"curvature | adam {size}" if adaptive else "curvature | plain"]
    largest, noise = np.asarray(found["l1"]), np.asarray(found["nu2"])
    if form == "momentum":
        noise = noise * (1 + beta) / (1 - beta)
    kind = dict(momentum=beta, adaptive=adaptive, piecewise=form == "piecewise")
    bound = adabatch.max_stable_learning_rate(largest, noise=noise, batch_size=size, **kind)
    return np.asarray(bound)


def damped_prediction(rate: float, size: int, done: dict[str, Any]) -> Any:
    """ε ≫ √v̂ makes Adam SGD of rate α/ε with averaged momentum: ε = α / its bound, [seed]."""
    largest, noise = (np.asarray(done["curvature | plain"][k]) for k in ("l1", "nu2"))
    kind = dict(momentum=0.9, adaptive=True, batch_size=size)  # noise times (1 + β)/(1 − β) = 19
    return rate / np.asarray(adabatch.max_stable_learning_rate(largest, noise=19 * noise, **kind))


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
            guess = predicted(name, b, done, "momentum") * (above[name] if kind == "global" else 1)
            runs.append((f"{kind} {b} | {name}", run(measure, kind, name, b, guess)))
    for rate, b in itertools.chain(*damped_cases().values()) if "damping" in parts else ():
        guess = 1 / damped_prediction(rate, b, done)
        runs.append((f"damping {b} | {rate:.4g}", run(measure, "damping", "adam", b, guess, rate)))
    return sorted(runs, key=lambda run: int(run[0].split()[1]))  # small batches are quick


def cell(values: Any, show: Callable[[float], str] = lambda mean: f"{2.0**mean:.3g}") -> str:
    """Geometric mean of the seeds, standard error in octaves."""
    logs = np.log2(np.asarray(values, float))
    if np.isnan(logs).any():
        return "–"
    return f"{show(logs.mean())} ± {logs.std(ddof=1) / len(logs) ** 0.5:.2f}"


def gap(values: Any) -> str:
    return cell(values, lambda mean: f"{mean:+.2f}")


def at_margin(result: dict[str, Any], margin: float) -> list[float]:
    """The limit at another margin, on a line through the logs of what was tried."""
    found = []
    for tried in result["tried"]:
        rates, losses = (np.log(x) for x in zip(*sorted(tried), strict=True))
        i = int(np.argmax(losses > np.log(margin)))
        if i == 0:  # outside what was tried
            found.append(float("nan"))
            continue
        share = (np.log(margin) - losses[i - 1]) / (losses[i] - losses[i - 1])
        found.append(float(np.exp(rates[i - 1] + share * (rates[i] - rates[i - 1]))))
    return found


def slope(along: list[Any], limits: list[Any]) -> str:
    """The exponent, mean ± standard error of the seeds' fits."""
    if len(along) < 2:
        return "–"
    fits = np.polyfit(np.log2(along), np.log2(np.asarray(limits, float)), 1)[0]
    return f"{fits.mean():.2f} ± {fits.std(ddof=1) / len(fits) ** 0.5:.2f}"


def markdown(head: str, rows: list[list[str]]) -> str:
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def limits_of(done: dict[str, Any], kind: str, name: str) -> dict[int, dict[str, Any]]:
    return {b: done[k] for b in SIZES[kind] if (k := f"{kind} {b} | {name}") in done}


def rate_tables(done: dict[str, Any]) -> str:
    rates, ratios, exponents = [], [], []
    for name, method in METHODS.items():
        got = {kind: limits_of(done, kind, name) for kind in ("frozen", "local", "global")}
        factor = (1 + method.momentum) / (1 - method.momentum)
        noisy, flat = [], []
        for b, result in got["local"].items():
            known = done[f"curvature | adam {b}" if method.adaptive else "curvature | plain"]
            largest, noise = np.asarray(known["l1"]), np.asarray(known["nu2"])
            transition = noise / largest**2
            noisy += [b] if b < factor * transition.mean() else []
            flat += [b] if b >= 4 * factor * transition.mean() else []
            forms = [predicted(name, b, done, form) for form in ("", "piecewise", "momentum")]
            cells = [cell(got[k][b]["limit"]) if b in got[k] else "–" for k in got]
            cells.insert(2, cell(at_margin(result, 3.0)))
            known = (largest, transition, *forms)
            rates.append([name, str(b), *(cell(v) for v in known), *cells])
            frozen = ["–", "–"]
            if b in got["frozen"]:
                frozen = [gap(got["frozen"][b]["limit"] / forms[i]) for i in (0, 2)]
            limit, fall = np.asarray(result["limit"]), np.asarray(result["end"]) / largest
            local = [gap(limit / forms[0]), gap(limit / forms[2])]
            ratios.append([name, str(b), *frozen, *local, cell(fall), gap(limit * fall / forms[2])])
        for regime, chosen in (("noise", noisy), ("saturated", flat)):
            forms = [[predicted(name, b, done, form) for b in chosen] for form in ("", "momentum")]
            fits = [slope(chosen, values) for values in forms]
            for found in got.values():
                use = [b for b in chosen if b in found]
                fits.append(slope(use, [found[b]["limit"] for b in use]))
            exponents.append([name, regime, ", ".join(map(str, chosen)), *fits])
    return "\n".join([
        "Largest stable rate, geometric mean of the seeds ± standard error in octaves. λ₁ and b* of the",
        "Hessian, Adam's of D⁻¹H. Noise × m: ν² times (1 + β)/(1 − β).\n",
        markdown(
            "method | B | λ₁ | b* | formula | piecewise | noise × m | frozen | local | "
            "local, margin 3 | global", rates),
        "log₂ of measured / predicted. Fall: λ₁ at the end of a run at the local limit / 1.1, over that "
        "at θ₀ (same D).",
        "Last column: the formula, noise × m, with that λ₁ and the same b*.\n",
        markdown(
            "method | B | frozen | frozen, noise × m | local | local, noise × m | fall | "
            "local, λ₁ at the end", ratios),
        "Exponent of the largest stable rate in B, ± standard error over seeds. Noise: B below b*·m;",
        "saturated: at least 4 times that. Global: of these, the B it was measured at.\n",
        markdown(
            "method | regime | B | formula | noise × m | frozen | local | global", exponents),
    ])  # fmt: skip


def damping_tables(done: dict[str, Any]) -> str:
    rows, exponents = [], []
    for title, cases in damped_cases().items():
        cases = [c for c in cases if f"damping {c[1]} | {c[0]:.4g}" in done]
        limits = [1.0 / np.asarray(done[f"damping {b} | {r:.4g}"]["limit"]) for r, b in cases]
        guesses = [damped_prediction(r, b, done) for r, b in cases]
        for (r, b), limit, guess in zip(cases, limits, guesses, strict=True):
            rows.append([title, f"{r:.4g}", str(b), cell(guess), cell(limit), gap(limit / guess)])
        along = [c[title.startswith("B")] for c in cases]
        small = sum(b < 200 for _, b in cases)  # below b*·m
        fits = [slope(along[:small], v[:small]) for v in (guesses, limits)]
        exponents.append([title, *fits, slope(along, limits)])
    return "\n".join([
        "Smallest stable ε of Adam. Predicted: rate / bound of ε ≫ √v̂, noise × m.\n",
        markdown("along | rate | B | predicted | measured | log₂ ratio", rows),
        markdown("exponent along | predicted, B < 200 | measured, B < 200 | all", exponents),
    ])  # fmt: skip


def points(axes: Axes, limits: dict[int, Any], colour: str, marker: str, label: str) -> None:
    logs = np.log2(np.asarray(list(limits.values()), float)).reshape(-1, len(SEEDS))
    means, errors = logs.mean(1), logs.std(1, ddof=1) / len(SEEDS) ** 0.5
    bars = 2.0**means - 2.0 ** (means - errors), 2.0 ** (means + errors) - 2.0**means
    look = dict(color=colour, marker=marker, markersize=5, linewidth=1.2, capsize=2, label=label)
    axes.errorbar(list(limits), 2.0**means, bars, **look)


def draw_figure(done: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(12.0, 8.4), dpi=130, facecolor="white", layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    looks = {"frozen": (GREEN, "s"), "local": (BLUE, "o"), "global": (ORANGE, "^")}
    titles = ("SGD", "SGD, momentum 0.9", "Adam", "Adam: the smallest stable ε (dashed: predicted)")
    for axes, title in zip(panels, titles, strict=True):
        dress(axes, title)
        axes.set(xscale="log", yscale="log", xlabel="batch size")
        axes.set_xticks(SIZES["local"], [str(b) for b in SIZES["local"]])
        axes.minorticks_off()
    for axes, name in zip(panels, METHODS, strict=False):
        sizes = list(limits_of(done, "local", name))
        for form, style, label in (("", "-", "formula"), ("momentum", "--", "noise × m")):
            if form == "" or name != "sgd":
                means = [predicted(name, b, done, form).mean() for b in sizes]
                axes.plot(sizes, means, style, color=INK, linewidth=1.4, label=label)
        for kind, look in looks.items():
            limits = {b: r["limit"] for b, r in limits_of(done, kind, name).items()}
            points(axes, limits, *look, kind)
        axes.set_ylabel("largest stable rate")
    for (title, cases), colour in zip(damped_cases().items(), (PURPLE, GREEN), strict=False):
        found = {b: (r, k) for r, b in cases if (k := f"damping {b} | {r:.4g}") in done}
        limits = {b: 1.0 / np.asarray(done[k]["limit"]) for b, (_, k) in found.items()}
        points(axes := panels[3], limits, colour, "o", title.split(", ")[1])
        means = [damped_prediction(r, b, done).mean() for b, (r, _) in found.items()]
        axes.plot(list(found), means, "--", color=colour, linewidth=1.2)
    for axes in panels:
        axes.legend(frameon=False, fontsize=9, labelcolor=TICKS)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path("runs/stable-learning-rate"))
    options = parser.parse_args()
    store = options.out / "runs.json"
    done = run_all(store, lambda done: wanted(done, options.parts))
    result = rate_tables(done) + "\n" + damping_tables(done)
    (options.out / "table.md").write_text(result, encoding="utf-8")
    draw_figure(done, options.out / "figure.png")
    print(result)


if __name__ == "__main__":
    main()
