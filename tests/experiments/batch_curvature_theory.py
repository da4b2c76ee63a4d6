"""What the formulas, and some variants of them, say of the runs of `batch_curvature_runs.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from batch_curvature_runs import FITTED, GROUP, SAMPLES, TOP, N, Result, key, subsamples

import adabatch_jax as adabatch


def inverse(size: Any) -> np.ndarray:
    return np.asarray(adabatch.curvature.inverse_effective_batch_size(size, N))


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
        batch = adabatch.curvature.batch_hessian_extremes(
            case.largest, case.smallest, level, sizes, N
        )
        return np.asarray(batch.smallest if low else batch.largest)

    def fit(tops: jax.Array) -> jax.Array:
        found = adabatch.curvature.fit_hessian_noise(1 / inverse(np.array(FITTED)), tops)
        return adabatch.curvature.batch_hessian_extremes(
            found.largest, 0.0, found.noise, sizes, N
        ).largest

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
    effective = adabatch.curvature.effective_batch_size(jnp.array(FITTED), N)

    def top(level: Any, count: float) -> Any:
        ratio = jnp.asarray(count * inverse(sizes))
        return adabatch.curvature.batch_gauss_newton_extremes(case.largest, level, ratio).largest

    def fit(count: float) -> Any:
        def predict(tops: jax.Array) -> Any:
            largest = jnp.float32(case.largest)
            level = adabatch.curvature.gauss_newton_noise(
                effective, tops, largest, num_parameters=count
            )
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
