"""What random-matrix theory says of a measured spectrum: how batches should look, how far to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import adabatch_jax as adabatch

Floats = npt.NDArray[np.floating]
MOMENTUM = 0.9
_MOST_SIZES_IN_FIT = 4


def predicted(summary: Mapping[str, Any], batch_sizes: Any) -> tuple[Floats, Floats]:
    """Largest and smallest eigenvalue of batches drawn without replacement from the full matrix's.

    Args:
      summary: of `measure_spectrum`, from "matrix" to "noise".
      batch_sizes: [n], examples.

    Returns:
      λ₁′ and λ_P′, [n] each.
    """
    return _batch_extremes(summary, batch_sizes, summary["examples"])


def noise_from_batches(
    batch_sizes: Sequence[int],
    extremes: Sequence[float],
    largest: float,
    *,
    examples: int,
    num_parameters: int,
) -> tuple[float, list[int]]:
    """σ² of the Gauss-Newton matrix, and the batch sizes it was fitted to.

    Of four sizes or more every other one is left out of the fit, and so tests it.

    Args:
      batch_sizes: ascending, examples.
      extremes: λ₁′ at each, means over batches.
      largest: λ₁ of the full matrix.
      examples: of the full matrix.
      num_parameters: P.
    """
    noisy = [(b, x) for b, x in zip(batch_sizes, extremes, strict=True) if b < examples]
    if not noisy:
        return float("nan"), []
    fitted = noisy[::2] if len(noisy) >= 4 else noisy
    places = np.linspace(0, len(fitted) - 1, min(len(fitted), _MOST_SIZES_IN_FIT)).round()
    used = [fitted[int(i)] for i in places]
    sizes = np.array([b for b, _ in used])
    noise = adabatch.curvature.gauss_newton_noise(
        adabatch.curvature.effective_batch_size(sizes, examples),
        np.array([x for _, x in used]),
        largest,
        num_parameters=num_parameters,
    )
    return float(noise), sizes.tolist()


def transition(summary: Mapping[str, Any]) -> float:
    """The effective batch size at which λ₁′ = 2 λ₁."""
    largest, noise = summary["full"]["largest"], summary["noise"]
    if summary["matrix"] == "hessian":
        return float(adabatch.curvature.transition_batch_size(largest, noise))
    gap = largest - noise
    return summary["num_parameters"] * noise / gap if gap > 0 else float("inf")


def learning_rates(
    summary: Mapping[str, Any], batch_sizes: Any, *, momentum: float
) -> npt.NDArray[np.floating]:
    """The largest stable rates of SGD for batches of all the training data, [n].

    By the mean square along the top direction; with the Gauss-Newton matrix λ₁′ − λ₁ stands for ν²/(𝔟 λ₁).
    """
    total = summary["training_examples"]
    largest = summary["full"]["largest"]
    level: dict[str, Any] = dict(noise=summary["noise"], batch_size=batch_sizes, dataset_size=total)
    if summary["matrix"] != "hessian":
        extremes = _batch_extremes(summary, batch_sizes, total)[0]
        level = dict(noise=(extremes - largest) * largest, batch_size=1)
    rates = adabatch.curvature.max_stable_learning_rate(largest, momentum=momentum, **level)
    return np.asarray(rates)


def _batch_extremes(
    summary: Mapping[str, Any], batch_sizes: Any, total: int
) -> tuple[Floats, Floats]:
    full, noise = summary["full"], summary["noise"]
    sizes = np.asarray(batch_sizes)
    if summary["matrix"] == "hessian":
        # Noise is aligned with the outliers, so each end has a ν² of its own.
        ends = full["largest"], full["smallest"]
        top, bottom = (
            adabatch.curvature.batch_hessian_extremes(*ends, nu_squared, sizes, total)
            for nu_squared in (noise, summary["noise_smallest"])
        )
        return np.asarray(top.largest), np.asarray(bottom.smallest)
    ratio = summary["num_parameters"] * adabatch.curvature.inverse_effective_batch_size(
        sizes, total
    )
    found = adabatch.curvature.batch_gauss_newton_extremes(full["largest"], noise, ratio)
    return np.asarray(found.largest), np.asarray(found.smallest)
