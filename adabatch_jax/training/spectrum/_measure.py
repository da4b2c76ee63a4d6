"""The spectrum of a model's curvature matrix, of all examples and of batches, against the formulas."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import adabatch_jax as adabatch
from adabatch_jax._types import PyTree
from adabatch_jax.curvature import SpectralDensity, Spectrum
from adabatch_jax.training.checkpoint import load_params
from adabatch_jax.training.data import Dataset, load_dataset
from adabatch_jax.training.models import Apply, classifier
from adabatch_jax.training.spectrum._batches import Batches, compile_measures
from adabatch_jax.training.spectrum._config import Source, SpectrumConfig
from adabatch_jax.training.spectrum._theory import (
    MOMENTUM,
    learning_rates,
    noise_from_batches,
    predicted,
    transition,
)

# More groups tell more about the noise, larger ones run faster.
_NOISE_GROUP = 16  # examples, at most
_NOISE_GROUPS = 256  # at least, as long as there is an example for each


class SpectrumResult(NamedTuple):
    """What `measure_spectrum` finds: the full matrix's Lanczos runs, its density, and every number."""

    spectrum: Spectrum
    density: SpectralDensity
    summary: dict[str, Any]


class _Measured(NamedTuple):
    """Batches of one size: arrays over subsamples."""

    largest: np.ndarray
    smallest: np.ndarray
    converged: np.ndarray
    sharpness: np.ndarray


def measure_spectrum(
    config: SpectrumConfig, *, on_progress: Callable[[str, float], None] | None = None
) -> SpectrumResult:
    """Measures the spectrum of the full matrix and of batches, and what the theory says of both.

    The full matrix is that of `config.examples` training examples. Batches are drawn from them without
    replacement. Writes nothing.

    Args:
      config: what to measure.
      on_progress: called with what is being done and the share of the work that is behind, in [0, 1].

    Returns:
      A `SpectrumResult`. Its summary has `full` (`largest`, `smallest`, their residuals, `converged`,
      `trace` with its standard error), `noise` (ν² for the Hessian, σ² for the Gauss-Newton matrix),
      `noise_smallest` (ν² along the direction of the smallest eigenvalue), `transition_batch_size`
      (where a batch's largest eigenvalue is twice the full one) and `batches`: for each `batch_size`
      the measured `largest` and `smallest` with standard errors over subsamples, `predicted_largest`
      and `predicted_smallest`, the largest stable learning rates of SGD without and with momentum, and
      the curvature of the loss along the batch's gradient, `batch_sharpness`.

    Raises:
      ValueError: the data, the run or its checkpoint cannot be used.
      FileNotFoundError: the data are not to be found.

    Example:
      >>> from adabatch_jax.training import SpectrumConfig, measure_spectrum, plot_spectrum
      >>> config = SpectrumConfig(model="logistic", examples=64, batch_sizes=(8,), probes=1, steps=8)
      >>> found = measure_spectrum(config)
      >>> found.summary["batches"][0]["largest"] > found.summary["full"]["largest"]
      True
      >>> [axes.get_xlabel() for axes in plot_spectrum(found.summary, found.density).axes]
      ['Eigenvalue', 'Batch size']
    """
    return measure_subject(load_subject(config), on_progress)


class Subject(NamedTuple):
    """What is measured, loaded and checked."""

    config: SpectrumConfig
    source: Source
    dataset: Dataset
    params: PyTree
    apply: Apply


def load_subject(config: SpectrumConfig) -> Subject:
    """Loads data and parameters, and refuses what cannot be measured.

    Raises:
      ValueError: the data, the run or its checkpoint cannot be used.
      FileNotFoundError: the data are not to be found.
    """
    source = config.source()
    dataset = load_dataset(source.dataset, source.data_dir)
    config = config.resolved(len(dataset.train_labels))
    params, apply = classifier(source.model, dataset, config.seed)
    if source.checkpoint is not None:
        params = jax.device_put(load_params(source.checkpoint, params))
    return Subject(config, source, dataset, params, apply)


def measure_subject(
    subject: Subject, on_progress: Callable[[str, float], None] | None = None
) -> SpectrumResult:
    """The part of `measure_spectrum` that takes time."""
    start = time.perf_counter()
    config, source, dataset, params, _ = subject
    work = _Work(config, on_progress or (lambda what, share: None))
    with jax.default_matmul_precision("float32"):  # what an accelerator rounds, Lanczos amplifies
        spectrum, measured, noise = _measure(subject, work)
    if not np.isfinite(spectrum.eigenvalues).all():
        raise ValueError("spectrum: the curvature is not finite: the run diverged")
    summary = {
        "matrix": config.matrix,
        "dataset": source.dataset,
        "model": source.model,
        "checkpoint": source.checkpoint,
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "examples": config.examples,
        "training_examples": len(dataset.train_labels),
    }
    summary["full"] = _full(spectrum, summary["num_parameters"])
    summary |= _noise(summary, config, measured, noise)
    summary["transition_batch_size"] = transition(summary)
    summary["batches"] = _rows(summary, measured)
    summary |= {
        "ritz_values": spectrum.eigenvalues,
        "ritz_weights": spectrum.weights,
        "seconds": time.perf_counter() - start,
        "versions": {"adabatch_jax": adabatch.__version__, "jax": jax.__version__},
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "config": dataclasses.asdict(config),
    }
    return SpectrumResult(spectrum, adabatch.curvature.spectral_density(spectrum), summary)


def _full(spectrum: Spectrum, num_parameters: int) -> dict[str, Any]:
    """The ends of the full matrix's spectrum, each with the residual of the probe that found it."""
    values, residuals = np.ravel(spectrum.eigenvalues), np.ravel(spectrum.residuals)
    top, bottom = values.argmax(), values.argmin()
    moments = num_parameters * np.sum(spectrum.weights * spectrum.eigenvalues, axis=1)
    return {
        "largest": float(values[top]),
        "largest_residual": float(residuals[top]),
        "smallest": float(values[bottom]),
        "smallest_residual": float(residuals[bottom]),
        "converged": bool(spectrum.converged()),
        "trace": float(np.mean(moments)),
        "trace_standard_error": _standard_error(moments),
    }


def _noise(
    summary: dict[str, Any],
    config: SpectrumConfig,
    measured: dict[int, _Measured],
    noise: list[float],
) -> dict[str, Any]:
    """ν² as measured, or σ² fitted to the batches."""
    if noise:
        return {
            "noise": noise[0],
            "noise_smallest": noise[-1],
            "noise_is": "nu_squared",
            "noise_from": config.noise_probe,
        }
    fitted, sizes = noise_from_batches(
        list(measured),
        [float(np.mean(m.largest)) for m in measured.values()],
        summary["full"]["largest"],
        examples=summary["examples"],
        num_parameters=summary["num_parameters"],
    )
    return {"noise": fitted, "noise_is": "sigma_squared", "noise_from": sizes}


def _rows(summary: dict[str, Any], measured: dict[int, _Measured]) -> list[dict[str, Any]]:
    sizes = np.array(list(measured))
    largest, smallest = predicted(summary, sizes)
    sgd = learning_rates(summary, sizes, momentum=0.0)
    heavy_ball = learning_rates(summary, sizes, momentum=MOMENTUM)
    rows = []
    for i, (size, seen) in enumerate(measured.items()):
        row: dict[str, Any] = {"batch_size": size}
        for name in ("largest", "smallest", "sharpness"):
            values = getattr(seen, name)
            spelled = "batch_sharpness" if name == "sharpness" else name
            row[spelled] = float(np.mean(values))
            row[f"{spelled}_standard_error"] = _standard_error(values)
        row["predicted_largest"], row["predicted_smallest"] = float(largest[i]), float(smallest[i])
        row["max_learning_rate"] = float(sgd[i])
        row["max_learning_rate_momentum"] = float(heavy_ball[i])
        row["converged"] = bool(seen.converged.all())
        rows.append(row)
    return rows


def _standard_error(values: np.ndarray) -> float:
    """Of the mean; NaN for one value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


class _Work:
    """Counts products with one example's matrix, the unit of the progress."""

    def __init__(self, config: SpectrumConfig, report: Callable[[str, float], None]) -> None:
        examples, sizes = config.examples or 0, config.batch_sizes or ()
        self._report, self._done = report, 0.0
        self._total = config.steps * (examples * config.probes + config.subsamples * sum(sizes))
        if config.matrix == "hessian":
            self._total += noises(config) * noise_products(config) * examples

    def begin(self, what: str) -> None:
        self._report(what, self._done / self._total)

    def end(self, products: float) -> None:
        self._done += products


def noises(config: SpectrumConfig) -> int:
    """In how many directions the noise of the Hessian is measured."""
    return 2 if config.noise_probe == "ritz" else 1


def noise_products(config: SpectrumConfig) -> int:
    """Products with the full matrix that one of them takes."""
    return 1 + (config.steps if config.noise_probe == "ritz" else 0)


def _measure(subject: Subject, work: _Work) -> tuple[Spectrum, dict[int, _Measured], list[float]]:
    """Everything that takes time: the full matrix, ν² of the Hessian, the batches of every size."""
    config, _, dataset, params, apply = subject
    of_batch, noise_along = compile_measures(config, apply)
    examples, sizes = config.examples or 0, config.batch_sizes or ()
    batches = Batches(dataset, examples, config.max_micro_batch_size)
    generator = np.random.Generator(np.random.Philox(config.seed))
    pool = generator.permutation(len(dataset.train_labels))[:examples]
    probe_key, noise_key, batch_key = jax.random.split(jax.random.key(config.seed), 3)

    runs = []
    full = batches.of(pool)
    for number, key in enumerate(jax.random.split(probe_key, config.probes), start=1):
        work.begin(f"full matrix, probe {number} of {config.probes}")
        runs.append(jax.block_until_ready(of_batch(params, *full, key)[0]))
        work.end(config.steps * examples)
    spectrum = jax.tree.map(lambda *x: jnp.concatenate(x), *runs)

    noise: list[float] = []
    if config.matrix == "hessian":
        group = max(min(_NOISE_GROUP, examples // _NOISE_GROUPS), 1)
        whole = examples // group * group
        groups, _ = Batches(dataset, whole, group).of(pool[:whole])
        for end, sign in (("top", 1.0), ("bottom", -1.0))[: noises(config)]:
            work.begin(f"noise of the Hessian, {end}")
            noise.append(float(noise_along(params, groups, sign, noise_key)))
            work.end(noise_products(config) * examples)

    measured = {}
    for place, size in enumerate(sizes):
        found = []
        for number in range(config.subsamples):
            work.begin(f"batches of {size}, {number + 1} of {config.subsamples}")
            batch = batches.of(generator.choice(pool, size, replace=False))
            key = jax.random.fold_in(batch_key, place * config.subsamples + number)
            seen, along = of_batch(params, *batch, key)
            found.append(jax.device_get((seen.largest, seen.smallest, seen.converged(), along)))
            work.end(config.steps * size)
        measured[size] = _Measured(*(np.array(column) for column in zip(*found, strict=True)))
    work.begin("done")
    return spectrum, measured, noise
