"""What one AutoWU decision costs: against GPyTorch, and as the number of losses grows.

    python -m venv .venv && .venv/bin/pip install ".[train,peers]"
    .venv/bin/python tests/benchmarks/autowu_decision.py            # about two minutes on two cores

1. One decision of the paper (100 Adam steps on 100 losses, five draws of 500 losses predicted at 500
   points) by `smoother="rbf"` and by the same model in GPyTorch, in turns, on the same losses; and, where
   nothing is random, that both see the same. Without GPyTorch this part is left out.
2. `smoother="quasisep"` on 2,000, 20,000 and 200,000 losses.
3. Why its curve is computed in float64: its deviation, and that of float32, over the dense one.

Expected on two CPU cores: GPyTorch at least 5 times slower; quasisep no slower than linear in the number
of losses, below 1 s at 20,000 and at most 4 times the paper's mode; a posterior deviation that is right
to 0.001 %, and wrong by a factor of several in float32.
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
from tinygp import GaussianProcess, kernels

from adabatch_jax.learning_rate._quasisep import QuasisepFit, quasisep_smoother
from adabatch_jax.learning_rate._rbf import rbf_smoother
from adabatch_jax.training._files import write_json

POINTS = 500


def series(number: int, minimum: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Losses that fall, pass a minimum and rise."""
    x = np.arange(number) / number
    noise = np.random.default_rng(0).normal(size=number)
    return x.astype(np.float32), (1.0 + 2.0 * (x - minimum) ** 2 + 0.15 * noise).astype(np.float32)


def in_turns(repeats: int, **contenders: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Seconds of each, one after the other in every round: minimum, median, maximum."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {
        name: {"min": min(t), "median": float(np.median(t)), "max": max(t)}
        for name, t in taken.items()
    }


def compiled(
    smoother: Any, number: int, minimum: float = 0.6
) -> tuple[Callable[[], Any], float, float]:
    """One test as a call, and the seconds that tracing and compiling it took."""
    x, y = (jnp.asarray(v) for v in series(number, minimum))
    arguments = smoother.init(), x, y, jnp.int32(number), jax.random.PRNGKey(0)
    start = time.perf_counter()
    lowered = jax.jit(smoother.test).lower(*arguments)
    middle = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    return lambda: jax.block_until_ready(program(*arguments)), middle - start, end - middle


def gpytorch_decision(
    number: int, minimum: float = 0.6
) -> Callable[[], tuple[list[float], list[float]]]:
    """The paper's model in GPyTorch: what its authors' scheduler computes at a test."""
    import gpytorch
    import torch

    class Model(gpytorch.models.ExactGP):
        def __init__(self, x: Any, y: Any, likelihood: Any) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
            self.covar_module.base_kernel.lengthscale = 0.2
            self.covar_module.base_kernel.raw_lengthscale.requires_grad_(False)
            torch.nn.init.constant_(self.mean_module.constant, float(y.mean()))
            likelihood.noise = 1e-3

        def forward(self, x: Any) -> Any:
            return gpytorch.distributions.MultivariateNormal(
                self.mean_module(x), self.covar_module(x)
            )

    x, y = (torch.from_numpy(v) for v in series(number, minimum))
    grid = torch.linspace(0, 1, POINTS)
    generator = torch.Generator().manual_seed(0)

    def some(size: int) -> Any:
        if number <= size:
            return slice(None)
        return torch.randperm(number, generator=generator)[:size].sort().values

    def decide() -> tuple[list[float], list[float]]:
        likelihood = gpytorch.likelihoods.GaussianLikelihood()
        chosen = some(100)
        model = Model(x[chosen], y[chosen], likelihood)
        with torch.no_grad():
            model.mean_module.constant.fill_(float(y.mean()))
        model.train()
        likelihood.train()
        marginal = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(100):
            optimizer.zero_grad()
            (-marginal(model(x[chosen]), y[chosen])).backward()
            optimizer.step()
        model.eval()
        likelihood.eval()
        probabilities, locations = [], []
        for _ in range(5):
            chosen = some(500)
            model.set_train_data(x[chosen], y[chosen], strict=False)
            with torch.no_grad():
                posterior = model(grid)
                mean, covariance = posterior.mean, posterior.covariance_matrix
            spread = covariance.diagonal() + covariance[-1, -1] - 2 * covariance[:, -1] + 1e-4
            normal = torch.distributions.Normal(0.0, spread[:-1].clamp_min(1e-12).sqrt())
            probabilities.append(float(normal.cdf(mean[-1] - mean[:-1]).max()))
            locations.append(float(grid[mean.argmin()]))
        return probabilities, locations

    return decide


def against_gpytorch(repeats: int) -> dict[str, Any]:
    run, tracing, compiling = compiled(rbf_smoother(), 1000)
    theirs = gpytorch_decision(1000)
    run(), theirs()
    seconds = in_turns(repeats, ours=run, gpytorch=theirs)
    alike, _, _ = compiled(rbf_smoother(), 90, 1.3)
    ours, (probability, location) = alike()[1], gpytorch_decision(90, 1.3)()
    return {
        "seconds": seconds,
        "times faster": seconds["gpytorch"]["median"] / seconds["ours"]["median"],
        "tracing": tracing,
        "compiling": compiling,
        "probability": [float(ours.probability[0]), probability[0]],
        "location": [float(ours.location[0]), location[0]],
    }


def quasisep_growth(repeats: int) -> dict[str, Any]:
    paper, _, _ = compiled(rbf_smoother(), 2000)
    runs, details = {"paper, 2000": paper}, {}
    for number in (2000, 20_000, 200_000):
        run, tracing, compiling = compiled(quasisep_smoother(), number)
        runs[f"quasisep, {number}"] = run
        details[f"quasisep, {number}"] = {"tracing": tracing, "compiling": compiling}
    for run in runs.values():
        run()
    seconds = in_turns(repeats, **runs)
    first = seconds["paper, 2000"]["median"]
    return {
        name: {**t, **details.get(name, {}), "over paper": t["median"] / first}
        for name, t in seconds.items()
    }


def dense_deviation(x: np.ndarray, grid: np.ndarray, noise: float, scale: float) -> np.ndarray:
    """Posterior deviation of a Matérn-5/2 process of unit variance, in float64."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        r = np.sqrt(5.0) * np.abs(a[:, None] - b[None, :]) / scale
        return (1.0 + r + r * r / 3.0) * np.exp(-r)

    cross = kernel(x, grid)
    solved = np.linalg.solve(kernel(x, x) + noise * np.eye(len(x)), cross)
    return np.sqrt(1.0 - np.sum(cross * solved, axis=0))


def float32_deviation(x: np.ndarray, grid: np.ndarray, noise: float, scale: float) -> np.ndarray:
    """The same by tinygp's quasi-separable solver in float32: grid points with infinite noise."""
    everything = np.concatenate([x, grid])
    order = np.argsort(everything, kind="stable")
    on_grid = (np.arange(len(everything)) >= len(x))[order]
    process = GaussianProcess(
        kernels.quasisep.Matern52(scale=jnp.float32(scale)),
        jnp.float32(everything[order]),
        diag=jnp.where(on_grid, 1e8, noise).astype(jnp.float32),
        assume_sorted=True,
    )
    conditioned = process.condition(jnp.zeros(len(everything), jnp.float32)).gp
    return np.sqrt(np.maximum(np.asarray(conditioned.variance, np.float64)[on_grid], 0.0))


def deviations() -> list[dict[str, Any]]:
    noise, scale = 0.05, 0.5
    fit = QuasisepFit(tuple(jnp.float32(np.log(v)) for v in (1.0, noise, scale)), jnp.int32(1), ())
    rows = []
    for number in (300, 2000, 6000):
        x, y = series(number)
        count = jnp.int32(number)
        grid, posterior = jax.jit(quasisep_smoother().posterior)(fit, x, y, count)
        grid, x = np.asarray(grid, np.float64), x.astype(np.float64)
        exact = dense_deviation(x, grid, noise, scale)
        ours = np.sqrt(np.asarray(posterior.variance)) / exact
        float32 = float32_deviation(x, grid, noise, scale) / exact
        rows.append(
            {
                "losses": number,
                "ours": [float(ours.min()), float(ours.max())],
                "float32": [float(float32.min()), float(float32.max())],
            }
        )
    return rows


def show(result: dict[str, Any]) -> None:
    def milliseconds(t: dict[str, float]) -> str:
        return " / ".join(f"{1e3 * t[k]:.0f}" for k in ("min", "median", "max"))

    if "gpytorch" in result:
        part = result["gpytorch"]
        print("| one decision of the paper, 1,000 losses | ms: min / median / max |\n|---|---|")
        for name, t in part["seconds"].items():
            print(f"| {name} | {milliseconds(t)} |")
        print(
            f"\n{part['times faster']:.1f} times faster; tracing {part['tracing']:.1f} s, compiling "
            f"{part['compiling']:.1f} s. At 90 losses (nothing random), ours and theirs: probability "
            f"{part['probability'][0]:.5f} and {part['probability'][1]:.5f}, location "
            f"{part['location'][0]:.4f} and {part['location'][1]:.4f}.\n"
        )
    print("| smoother, losses | ms: min / median / max | over the paper's mode | compiling, s |")
    print("|---|---|---|---|")
    for name, t in result["quasisep"].items():
        compiling = f"{t['compiling']:.1f}" if "compiling" in t else "–"
        print(f"| {name} | {milliseconds(t)} | {t['over paper']:.2f} | {compiling} |")
    print("\n| losses | deviation over the dense one | in float32 |\n|---|---|---|")
    for row in result["deviations"]:
        spans = (f"{row[k][0]:.5f} – {row[k][1]:.5f}" for k in ("ours", "float32"))
        print(f"| {row['losses']} | {' | '.join(spans)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/autowu_decision.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    try:
        result["gpytorch"] = against_gpytorch(options.repeats)
    except ModuleNotFoundError as error:
        print(f"{error.name} is missing: without the comparison (pip install '.[peers]')\n")
    result["quasisep"] = quasisep_growth(options.repeats)
    result["deviations"] = deviations()
    show(result)
    write_json(options.out, result)
    print(f"\n{json.dumps(str(options.out))} holds these figures.")


if __name__ == "__main__":
    main()
