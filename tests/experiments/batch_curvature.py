"""Predicted against measured extreme eigenvalues of batch curvature matrices, on Fashion-MNIST.

    python tests/experiments/batch_curvature.py             # both networks
    python tests/experiments/batch_curvature.py --nets mlp  # without the slow convolutions

The full matrix is that of N = 8192 training examples, the batches are drawn from them without
replacement. Two networks, at initialisation and after three epochs of Adam; Hessian and Gauss-Newton
matrix. ν² and σ² come from probes and from fits at batch sizes 32, 128, 512, which are not judged.
λ₁′ is measured with a control variate: uᵀ H_b u of the full top vector u, whose mean is known.

Probes of the library: "ritz", "random", "fit". For comparison: "across" is "ritz" without the variance
of uᵀ H_i u itself, which moves λ₁′ up and down but not its mean; "gaps" divides what the noise carries
from u to each known Ritz vector by the gap λ₁ − λ_j instead of λ₁ (second order), "gaps, own λ′" by
λ₁′ − λ_j. "own across" is "across" along the vector of λ_P. "probe" takes σ² from products along u.

Expected, of the MLP: "ritz" within 2 % of λ₁′ at initialisation and 7 % after training; "random" sees
no rise at all; "fit" within 5 %, with an error of 3 % and more. Of λ₁′ − λ₁ alone "ritz" gives 1.1 to
1.3 times as much at initialisation and half to nine tenths after training, since two errors nearly
cancel: a third of ν² does not count, and λ₂ is close to λ₁. |λ_P′| is up to 22 times too large with the
noise along u, and within 16 % with that along its own vector. b* is 4 and 9: no size is below it.

Every run is kept in runs/batch-curvature/runs.json, arrays beside it: an interrupted command goes on
where it stopped. The tables are printed and saved as table.md, the picture as batch-curvature.png. The
MLP takes about eight minutes on two busy cores; the CNN's products cost ten times as much.
"""

from __future__ import annotations

import argparse
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import data, run_all
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

import adabatch_jax as adabatch
from adabatch_jax.curvature._spectrum import lanczos, random_unit
from adabatch_jax.training import Feed
from adabatch_jax.training._models import CNN, MLP
from adabatch_jax.training._plot_style import BLUE, GREEN, INK, ORANGE, PURPLE, SOFT, dress

N = 8192
GROUP = 16
TOP, BOTTOM = 10, 4  # Ritz vectors of the full matrix that the diagnostics know
SINGLE = 512  # examples whose products are kept one by one
JUDGED, FITTED = (16, 64, 256, 1024, 4096), (32, 128, 512)
SAMPLES = {16: 16, 32: 16, 64: 16, 128: 8, 256: 8, 512: 6, 1024: 5, 4096: 5}
STEPS = {"mlp": 40, "cnn": 20}
KEYS = range(5)
NETS, STATES, MATRICES = ("mlp", "cnn"), ("init", "trained"), ("hessian", "gauss-newton")
Result = dict[str, Any]


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.cache
def network(net: str) -> tuple[Any, Any, Any]:
    """The model as a function, its loss, and initial parameters."""
    model = MLP(10) if net == "mlp" else CNN(10, channels=(8, 16), width=64)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(model.apply(params, x), y)

    return model.apply, loss_fn, model.init(jax.random.key(0), jnp.zeros((1, 28, 28)))


@functools.cache
def examples() -> tuple[jax.Array, jax.Array]:
    x, y = data("fashion-mnist")["train"]
    chosen = np.random.default_rng(0).permutation(len(y))[:N]
    return x[chosen], y[chosen]


def product(net: str, matrix: str, params: Any, x: jax.Array, y: jax.Array, count: Any) -> Any:
    apply, loss_fn, _ = network(net)
    if matrix == "hessian":
        return adabatch.hessian_vector_product(loss_fn, params, x, y, count=count)
    return adabatch.gauss_newton_vector_product(apply, cross_entropy, params, x, y, count=count)


def train(net: str, out: Path) -> Result:
    """Three epochs of Adam at 256 under cosine decay; both states of the parameters are kept."""
    apply, loss_fn, first = network(net)
    found = data("fashion-mnist")
    x, y = found["train"]
    per_epoch = len(y) // 256
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, 3 * per_epoch))

    @jax.jit
    def epoch(params: Any, state: Any, x: jax.Array, y: jax.Array, order: jax.Array) -> Any:
        def step(carry: Any, index: jax.Array) -> Any:
            params, state = carry
            updates, state = optimizer.update(
                jax.grad(loss_fn)(params, x[index], y[index]), state, params
            )
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    params, state, feed = first, optimizer.init(first), Feed(len(y), 0)
    for number in range(3):
        order = feed.indices(number * len(y), per_epoch * 256).reshape(per_epoch, 256)
        params, state = epoch(params, state, x, y, jnp.asarray(order))
    x, y = found["test"]
    accuracy = float(jnp.mean(jnp.argmax(apply(params, x), axis=-1) == y))
    flat = {"init": ravel_pytree(first)[0], "trained": ravel_pytree(params)[0]}
    np.savez(out / f"{net}.npz", **flat)
    return {"accuracy": accuracy, "parameters": flat["init"].size}


def parameters(net: str, state: str, out: Path) -> Any:
    flat, unravel = ravel_pytree(network(net)[2])
    return unravel(jnp.asarray(np.load(out / f"{net}.npz")[state], flat.dtype))


def full(net: str, state: str, matrix: str, out: Path) -> Result:
    """Ends of the full matrix with their vectors U, and of every group Uᵀ H U and (H U)ᵀ H U."""
    params, (x, y) = parameters(net, state, out), examples()
    flat, unravel = ravel_pytree(params)
    micro = (x.reshape(-1, 256, 28, 28), y.reshape(-1, 256))
    operator = product(net, matrix, params, *micro, N // 256)
    values, vectors, residuals = ritz_pairs(operator, flat, unravel, STEPS[net])
    chosen = [*range(-1, -TOP - 1, -1), *range(BOTTOM)]

    @functools.partial(jax.jit, static_argnames="whole")
    def images(params: Any, x: jax.Array, y: jax.Array, u: jax.Array, whole: bool) -> Any:
        def one(group: Any) -> Any:
            linear = product(net, matrix, params, *group, None).linear()
            image = jax.vmap(lambda v: ravel_pytree(linear(unravel(v)))[0])(u)
            return image if whole else (image @ u.T, image @ image.T)

        return jax.lax.map(one, (x, y))

    u = jnp.asarray(vectors[chosen])
    inside, square = images(
        params, x.reshape(-1, GROUP, 28, 28), y.reshape(-1, GROUP), u, whole=False
    )
    one_by_one = images(params, x[:SINGLE, None], y[:SINGLE, None], u[:1], whole=True)
    away = np.asarray(one_by_one)[:, 0] - values[-1] * vectors[-1]
    np.savez(
        out / f"{net}-{state}-{matrix}.npz", values=values[chosen], vectors=np.asarray(u),
        inside=np.asarray(inside), square=np.asarray(square), gram=away @ away.T,
    )  # fmt: skip
    ends = {"largest": float(values[-1]), "smallest": float(values[0])}
    return ends | {"residuals": [float(r) for r in residuals[chosen]]}


def ritz_pairs(operator: Any, flat: jax.Array, unravel: Any, steps: int) -> Any:
    """All Ritz values, vectors and residuals: the library's Lanczos returns only the top vector."""
    basis, tridiagonal = np.zeros((steps, flat.size), np.float32), np.zeros((steps + 1, steps + 1))
    vector = np.random.default_rng(1).normal(size=flat.size)
    for i in range(steps):
        basis[i] = vector / np.linalg.norm(vector)
        vector = np.array(ravel_pytree(operator(unravel(jnp.asarray(basis[i]))))[0])
        tridiagonal[i, i] = basis[i] @ vector
        for _ in range(2):
            vector -= (basis[: i + 1] @ vector) @ basis[: i + 1]
        tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = np.linalg.norm(vector)
    values, coefficients = np.linalg.eigh(tridiagonal[:steps, :steps])
    residuals = np.abs(tridiagonal[steps, steps - 1] * coefficients[-1])
    return values, (coefficients.T @ basis).astype(np.float32), residuals


def noise(net: str, state: str, out: Path) -> Result:
    """ν² by the library's two probes."""
    params, (x, y) = parameters(net, state, out), examples()
    groups = (x.reshape(-1, GROUP, 28, 28), y.reshape(-1, GROUP))
    loss_fn = lambda p, group: network(net)[1](p, *group)  # noqa: E731
    probe = jax.jit(
        lambda params, key, groups, name: adabatch.hessian_noise(
            loss_fn, params, groups, key, probe=name
        ),
        static_argnums=3,
    )
    random = [float(probe(params, jax.random.key(k), groups, "random")) for k in KEYS]
    return {"ritz": float(probe(params, jax.random.key(0), groups, "ritz")), "random": random}


def subsamples(size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(size)
    return [rng.choice(N, size, replace=False) for _ in range(SAMPLES[size])]


def along(net: str, state: str, matrix: str, out: Path) -> Result:
    """u₁ᵀ H_i u₁ of every example: its mean over a batch is a control variate for λ₁′."""
    (apply, _, _), params = network(net), parameters(net, state, out)
    unravel = ravel_pytree(params)[1]
    u = unravel(jnp.load(out / f"{net}-{state}-{matrix}.npz")["vectors"][0])

    @jax.jit
    def second(params: Any, u: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits, slope = jax.jvp(lambda p: apply(p, x), (params,), (u,))
        if matrix == "gauss-newton":
            chance = jax.nn.softmax(logits)
            return (chance * slope**2).sum(-1) - (chance * slope).sum(-1) ** 2

        def losses(step: jax.Array) -> jax.Array:
            moved = jax.tree.map(lambda p, v: p + step * v, params, u)
            return optax.losses.softmax_cross_entropy_with_integer_labels(apply(moved, x), y)

        return jax.jvp(lambda t: jax.jvp(losses, (t,), (1.0,))[1], (0.0,), (1.0,))[1]

    parts = [jnp.reshape(a, (-1, 512, *a.shape[1:])) for a in examples()]
    values = np.concatenate([second(params, u, x, y) for x, y in zip(*parts, strict=True)])
    return {"along": values.astype(float).round(5).tolist()}


@functools.partial(jax.jit, static_argnames="steps")
def ends(operator: Any, params: Any, key: jax.Array, directions: jax.Array, steps: int) -> Any:
    spectrum, top = lanczos(operator.linear(), random_unit(key, params), steps)
    high, low = jnp.argmax(spectrum.eigenvalues), jnp.argmin(spectrum.eigenvalues)
    overlaps = jnp.square(directions @ ravel_pytree(top)[0])
    at = lambda i: (spectrum.eigenvalues[i], spectrum.residuals[i])  # noqa: E731
    return (*at(high), *at(low), overlaps)


def batches(net: str, state: str, matrix: str, size: int, out: Path) -> Result:
    """Extremes of batches of one size, and how far their top eigenvectors are the full ones."""
    params, (x, y) = parameters(net, state, out), examples()
    directions = jnp.asarray(np.load(out / f"{net}-{state}-{matrix}.npz")["vectors"][:TOP])
    # Two sizes of micro-batches, hence two compilations: the rest is a matter of the count.
    micro, allocated = (16, 4) if size <= 64 else (128, 32)
    draws = subsamples(size)

    def one(number: int) -> Any:
        index = np.resize(draws[number], micro * allocated).reshape(allocated, micro)
        operator = product(net, matrix, params, x[index], y[index], jnp.int32(size // micro))
        return jax.device_get(
            ends(operator, params, jax.random.key(number), directions, STEPS[net])
        )

    results = [one(0)]  # compiles before two threads share the cores
    with ThreadPoolExecutor(2) as pool:
        results += pool.map(one, range(1, len(draws)))
    names = ("largest", "largest_residual", "smallest", "smallest_residual")
    found: Result = {name: [float(r[i]) for r in results] for i, name in enumerate(names)}
    overlaps = np.array([r[4] for r in results])
    return found | {"overlap": overlaps[:, 0].tolist(), "inside": overlaps.sum(1).tolist()}


def key(net: str, state: str, matrix: str, size: int) -> str:
    return f"{net} batches of {size} | {state} | {matrix}"


def inverse(size: Any) -> np.ndarray:
    return np.asarray(adabatch.inverse_effective_batch_size(size, N))


def mean_error(sample: np.ndarray) -> tuple[Any, Any]:
    return sample.mean(0), sample.std(0, ddof=1) / np.sqrt(len(sample))


class Case:
    """What is known of one matrix: measurements, and statistics of its noise."""

    def __init__(self, net: str, state: str, matrix: str, done: dict[str, Result], out: Path):
        self.name = (net, state, matrix)
        stored = np.load(out / f"{net}-{state}-{matrix}.npz")
        self.values, self.gram = stored["values"].astype(float), stored["gram"].astype(float)
        self.inside, self.square = (stored[k].astype(float) for k in ("inside", "square"))
        self.runs = {size: done[key(*self.name, size)] for size in SAMPLES}
        self.along = np.array(done[f"{net} along | {state} | {matrix}"]["along"])
        self.probes = done[f"{net} noise | {state}"]
        self.count = done[f"{net} train"]["parameters"]
        self.largest, self.smallest = self.values[0], self.values[TOP]

    def sample(self, size: int, what: str = "largest") -> np.ndarray:
        return np.array(self.runs[size][what])

    def controlled(self, size: int) -> np.ndarray:
        """λ₁′ without the chance by which the curvature of a batch along u₁ differs from λ₁."""
        excess = [self.along[index].mean() - self.along.mean() for index in subsamples(size)]
        return self.sample(size) - np.array(excess)

    def noise(self, at: int = 0, keep: Any = slice(None)) -> tuple[float, np.ndarray]:
        """ν² along Ritz vector number `at`, and its parts along every one that is known."""
        inside, square = self.inside[keep, at], self.square[keep, at, at]
        scale = GROUP / (len(square) - 1)
        parts = np.square(inside - inside.mean(0)).sum(0) * scale
        return (square.sum() - len(square) * np.square(inside.mean(0)).sum()) * scale, parts

    def across(self, at: int = 0, keep: Any = slice(None)) -> float:
        """ν² along a Ritz vector u without the variance of uᵀ H_i u."""
        level, parts = self.noise(at, keep)
        return level - parts[at]

    def rank(self) -> tuple[float, float]:
        """Effective rank tr(C)²/tr(C²) of C = Cov(H_i u₁), and the share of ν² of 1 % of examples."""
        own, n = np.diag(self.gram), len(self.gram)
        squared = (np.square(self.gram).sum() - np.square(own).sum()) / (n * (n - 1))
        return own.mean() ** 2 / squared, np.sort(own)[-(n // 100) :].sum() / own.sum()

    def with_error(self, estimate: Any) -> tuple[Any, Any]:
        """An estimate from groups of examples, and its standard error: 16 blocks, each left out."""
        number = np.arange(len(self.square))
        parts = np.array([estimate(number % 16 != block) for block in range(16)])
        return estimate(slice(None)), np.sqrt(15 * parts.var(0))

    def fitted(self, predict: Any) -> tuple[np.ndarray, np.ndarray]:
        """A prediction from λ₁′ at the sizes of the fit, and its bootstrapped standard error."""
        rng, samples = np.random.default_rng(0), [self.sample(size) for size in FITTED]
        again = [[rng.choice(s, len(s)).mean() for s in samples] for _ in range(200)]
        tops = np.array([[s.mean() for s in samples], *again], np.float32)
        values = np.asarray(jax.vmap(predict)(jnp.asarray(tops)))
        return values[0], values[1:].std(0)


def hessian_predictions(case: Case, sizes: np.ndarray) -> dict[str, Any]:
    """λ₁′ and ("low …") λ_P′ at all sizes by every probe: name → (value, standard error)."""

    def extremes(level: Any, low: bool = False) -> np.ndarray:
        batch = adabatch.batch_hessian_extremes(case.largest, case.smallest, level, sizes, N)
        return np.asarray(batch.smallest if low else batch.largest)

    def fit(tops: jax.Array) -> jax.Array:
        found = adabatch.fit_hessian_noise(1 / inverse(np.array(FITTED)), tops)
        return adabatch.batch_hessian_extremes(found.largest, 0.0, found.noise, sizes, N).largest

    def gaps(keep: Any, own: bool = False) -> np.ndarray:
        level, parts = case.noise(0, keep)
        top = np.full(sizes.shape, case.largest)
        for _ in range(200 if own else 1):
            rise = (parts[1:] / (top[:, None] - case.values[1:])).sum(1)
            rise = rise + (level - parts.sum()) / top
            step = case.largest + inverse(sizes) * rise - top
            top = top + (0.1 if own else 1.0) * step
        return top

    found = {
        "fit": case.fitted(fit),
        "across": case.with_error(lambda keep: extremes(case.across(0, keep))),
        "gaps": case.with_error(gaps),
        "gaps, own λ′": case.with_error(lambda keep: gaps(keep, own=True)),
        "low own across": case.with_error(lambda keep: extremes(case.across(TOP, keep), low=True)),
    }
    for low, prefix in ((False, ""), (True, "low ")):
        error = case.with_error(lambda keep, low=low: extremes(case.noise(0, keep)[0], low))[1]
        random = np.array([extremes(level, low) for level in case.probes["random"]])
        found[prefix + "ritz"] = (extremes(case.probes["ritz"], low), error)
        found[prefix + "random"] = mean_error(random)
    return found


def gauss_newton_predictions(case: Case, sizes: np.ndarray) -> dict[str, Any]:
    """λ₁′ at all sizes: σ² fitted, with two meanings of P, and from products along u₁."""
    effective = adabatch.effective_batch_size(jnp.array(FITTED), N)

    def top(level: Any, count: float) -> Any:
        ratio = jnp.asarray(count * inverse(sizes))
        return adabatch.batch_gauss_newton_extremes(case.largest, level, ratio).largest

    def fit(count: float) -> Any:
        def predict(tops: jax.Array) -> Any:
            largest = jnp.float32(case.largest)
            level = adabatch.gauss_newton_noise(effective, tops, largest, num_parameters=count)
            return top(level, count)

        return case.fitted(predict)

    def probe(level: float) -> np.ndarray:
        # Of Gaussian vectors with a spike, the part of E‖(G_i − G)u₁‖² across u₁ is P σ² λ₁.
        return np.asarray(top(level / (case.count * case.largest), case.count))

    return {
        "fit, P": fit(case.count),
        "fit, P = 1": fit(1.0),
        "probe": case.with_error(lambda keep: probe(case.noise(0, keep)[0])),
        "probe, across": case.with_error(lambda keep: probe(case.across(0, keep))),
    }


def predictions(case: Case, sizes: Any) -> dict[str, Any]:
    make = hessian_predictions if case.name[2] == "hessian" else gauss_newton_predictions
    return make(case, np.asarray(sizes))


def show(mean: float, error: float) -> str:
    return f"{mean:.3g} ± {error:.1g}"


def ratio_table(cases: list[Case], what: str, names: list[str], found: dict[Any, Any]) -> list[Any]:
    """`what` as measured, and predicted over measured for every probe and batch size."""
    low, rise = what == "λ_P′", what == "λ₁′ − λ₁"
    lines = [["net", "B", what, *([] if rise else ["over the full"]), *names]]
    for case in cases:
        full = case.smallest if low else case.largest
        base = full if rise else 0.0
        for i, size in enumerate(JUDGED):
            sample = case.sample(size, "smallest") if low else case.controlled(size)
            mean, error = mean_error(sample - base)
            cells = [" ".join(case.name[:2]), size, show(mean, error)]
            cells += [] if rise else [f"{mean / full:.3f}"]
            for name in names:
                value, own = (part[i] for part in found[case.name]["low " * low + name])
                ratio = (value - base) / mean
                cells.append(show(ratio, np.hypot(own, ratio * error) / abs(mean)))
            lines.append(cells)
    return lines


def noise_table(cases: list[Case]) -> list[Any]:
    """What the noise along u₁ is made of."""
    lines = [
        ["matrix", "λ₁", "λ₂/λ₁", "λ_P", "ν² ritz", "ν² random", "along u₁ itself", "along u₂ … u₁₀",
         "effective rank", "1 % of examples hold", "b*", "b* across", "ν² across u_P"],
    ]  # fmt: skip
    for case in cases:
        level, error = case.with_error(lambda keep, c=case: c.noise(0, keep)[0])
        parts, (rank, share) = case.noise()[1] / level, case.rank()
        random = show(*mean_error(np.array(case.probes["random"])))
        star = float(adabatch.transition_batch_size(case.largest, level))
        lines.append([
            " ".join(case.name), f"{case.largest:.4g}", f"{case.values[1] / case.largest:.2f}",
            f"{case.smallest:.3g}", show(level, error), random if "hessian" in case.name else "",
            f"{parts[0]:.0%}", f"{parts[1:TOP].sum():.0%}", f"{rank:.1f}", f"{share:.0%}",
            show(star, star * error / level), f"{star * (1 - parts[0]):.3g}",
            f"{case.across(TOP):.3g}" if "hessian" in case.name else "",
        ])  # fmt: skip
    return lines


def overlap_table(cases: list[Case]) -> list[Any]:
    """The batch's top eigenvector against the full ones, and the spread of λ₁′ between batches."""
    lines = [
        ["matrix", "B", "λ₁′ uncontrolled", "its sd / mean", "⟨batch's, u₁⟩²", "1 − b*/𝔟",
         "inside u₁ … u₁₀", "residual / λ₁′", "residual / λ_P′"],
    ]  # fmt: skip
    for case in cases:
        for size in JUDGED:
            expected = max(0.0, 1 - case.noise()[0] * float(inverse(size)) / case.largest**2)
            tops = case.sample(size)
            worst = [
                f"{np.max(np.abs(case.sample(size, f'{end}_residual') / case.sample(size, end))):.0e}"
                for end in ("largest", "smallest")
            ]
            lines.append([
                " ".join(case.name), size, show(*mean_error(tops)),
                f"{tops.std(ddof=1) / tops.mean():.2f}",
                show(*mean_error(case.sample(size, "overlap"))), f"{expected:.3f}",
                f"{case.sample(size, 'inside').mean():.3f}", *worst,
            ])  # fmt: skip
    return lines


def markdown(title: str, lines: list[Any]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join([title, "", *(f"| {' | '.join(map(str, cells))} |" for cells in lines)])


def plot(cases: list[Case], path: Path) -> None:
    """A column for a network's state; λ₁′ and |λ_P′| of the Hessian, λ₁′ of the Gauss-Newton matrix."""
    rows = [
        ("hessian", "λ₁", {"ritz": BLUE, "random": SOFT, "fit": ORANGE, "gaps, own λ′": GREEN}),
        ("hessian", "|λ_P|", {"ritz": BLUE, "random": SOFT, "own across": GREEN}),
        ("gauss-newton", "λ₁", {"fit, P": ORANGE, "fit, P = 1": PURPLE, "probe": BLUE}),
    ]
    columns, sizes = len(cases) // 2, np.geomspace(JUDGED[0], JUDGED[-1], 60)
    figure = Figure(figsize=(3.6 * columns, 9.5), layout="constrained")  # no window, no backend
    for row, (matrix, what, colours) in zip(figure.subplots(3, columns), rows, strict=True):
        low = what != "λ₁"
        for axes, case in zip(row, [c for c in cases if c.name[2] == matrix], strict=True):
            dress(axes, f"{' '.join(case.name[:2])}, {matrix}: {what}")
            found = predictions(case, sizes)
            for name, colour in colours.items():
                curve = np.abs(found["low " * low + name][0])
                axes.plot(sizes, curve, color=colour, label=name)
            full = abs(case.smallest if low else case.largest)
            axes.axhline(full, color=INK, linewidth=0.8, linestyle="--", label="full matrix")
            for chosen, face, label in ((JUDGED, INK, "judged"), (FITTED, "white", "fitted")):
                samples = [
                    case.sample(b, "smallest") if low else case.controlled(b) for b in chosen
                ]
                means, errors = zip(*(mean_error(np.abs(x)) for x in samples), strict=True)
                axes.errorbar(
                    chosen, means, errors, fmt="o", color=INK, markersize=4,
                    markerfacecolor=INK if low else face, label=None if low and face != INK else label,
                )  # fmt: skip
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(JUDGED, [str(size) for size in JUDGED])
            bottom, top = axes.get_ylim()
            steps = (1, 2, 5) if top / bottom > 5 else (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
            ticks = [m * 10.0**e for e in range(-3, 5) for m in steps]
            axes.set_yticks([t for t in ticks if bottom <= t <= top])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(NullLocator())
        row[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("batch size", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--out", type=Path, default=Path("runs/batch-curvature"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    keys = [(net, state, matrix) for matrix in MATRICES for net in options.nets for state in STATES]

    def wanted(done: dict[str, Any]) -> list[tuple[str, Any]]:
        later = functools.partial
        runs: list[tuple[str, Any]] = []
        for net in options.nets:
            runs.append((f"{net} train", later(train, net, options.out)))
            own = [at for at in keys if at[0] == net]
            for at in own:
                name = " | ".join(at[1:])
                runs.append((f"{net} full | {name}", later(full, *at, options.out)))
                runs.append((f"{net} along | {name}", later(along, *at, options.out)))
            for size in SAMPLES:  # what takes longest comes last
                runs += [(key(*at, size), later(batches, *at, size, options.out)) for at in own]
                if size == 256:
                    runs += [
                        (f"{net} noise | {s}", later(noise, net, s, options.out)) for s in STATES
                    ]
        return runs

    done = run_all(options.out / "runs.json", wanted)
    cases = [Case(*at, done, options.out) for at in keys]
    hessian, gauss_newton = ([c for c in cases if c.name[2] == matrix] for matrix in MATRICES)
    found = {case.name: predictions(case, JUDGED) for case in cases}
    tops = ["ritz", "random", "fit", "across", "gaps", "gaps, own λ′"]
    levels = ["fit, P", "fit, P = 1", "probe", "probe, across"]
    judged = [
        ("Hessian", hessian, "λ₁′", tops),
        ("Hessian", hessian, "λ₁′ − λ₁", tops),
        ("Hessian", hessian, "λ_P′", ["ritz", "random", "own across"]),
        ("Gauss-Newton", gauss_newton, "λ₁′", levels),
        ("Gauss-Newton", gauss_newton, "λ₁′ − λ₁", levels),
    ]
    tables = {
        f"{name}: predicted / measured {what}": ratio_table(own, what, probes, found)
        for name, own, what, probes in judged
    }
    tables["The noise"] = noise_table(cases)
    tables["Eigenvectors, spread, residuals of Lanczos"] = overlap_table(cases)
    text = "\n\n".join(markdown(*table) for table in tables.items())
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    plot(cases, options.out / "batch-curvature.png")


if __name__ == "__main__":
    main()
