"""Spectral density on a grid, from Lanczos runs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax import _validate
from adabatch_jax.curvature._spectrum import Spectrum


class SpectralDensity(NamedTuple):
    """Density of eigenvalues, float32 [num_points] each; it integrates to 1.

    Example:
      >>> import jax.numpy as jnp
      >>> SpectralDensity(jnp.zeros(2), jnp.ones(2), jnp.zeros(2)).density.tolist()
      [1.0, 1.0]

    Source: see `spectral_density`.
    """

    grid: jax.Array  # eigenvalues
    density: jax.Array  # mean over probes
    standard_error: jax.Array  # over probes; 0 for one, which tells nothing of it


def spectral_density(
    spectrum: Spectrum, *, num_points: int = 1000, width: Any = None
) -> SpectralDensity:
    """The density of eigenvalues by stochastic Lanczos quadrature.

    ρ(t) = mean over probes of Σ_k w_k N(t; θ_k, s²), on a grid from the smallest to the largest
    eigenvalue and 5 s beyond.

    Args:
      spectrum: from `lanczos_spectrum`, with several probes for the standard error to be known.
      num_points: of the grid; static. The grid should be finer than `width`.
      width: s > 0, standard deviation of the Gaussians; None: 1 % of the range of the spectrum, or of
        its magnitude where the range is zero.

    Returns:
      A `SpectralDensity`.

    Raises:
      ValueError: `num_points` is not a positive integer, `width` not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> spectrum = Spectrum(jnp.array([[0.0, 1.0]]), jnp.array([[0.75, 0.25]]), jnp.zeros((1, 2)))
      >>> found = spectral_density(spectrum)
      >>> round(float(jnp.trapezoid(found.density, found.grid)), 3)
      1.0

    Source: Ghorbani, Krishnan, Xiao (2019), arXiv 1901.10159, section 2; Golub and Welsch (1969).
    """
    where = "spectral_density"
    _validate.positive_int(where, num_points=num_points)
    low, high = spectrum.smallest, spectrum.largest
    if width is None:
        reach = jnp.maximum(high - low, 0.01 * jnp.maximum(jnp.abs(high), jnp.abs(low)))
        width = jnp.where(reach > 0, 0.01 * reach, 0.01)
    else:
        _validate.positive(where, width=width)
    grid = jnp.linspace(low - 5 * width, high + 5 * width, num_points)

    def of_probe(theta: jax.Array, weights: jax.Array) -> jax.Array:
        distance = (grid[:, None] - theta[None, :]) / width
        bells = jnp.exp(-0.5 * jnp.square(distance))
        total = jnp.matmul(bells, weights, precision=jax.lax.Precision.HIGHEST)
        return total / (width * math.sqrt(2 * math.pi))

    each = jax.vmap(of_probe)(spectrum.eigenvalues, spectrum.weights)
    num_probes = each.shape[0]
    deviation = jnp.std(each, axis=0, ddof=1) if num_probes > 1 else jnp.zeros(num_points)
    return SpectralDensity(grid, jnp.mean(each, axis=0), deviation / num_probes**0.5)
