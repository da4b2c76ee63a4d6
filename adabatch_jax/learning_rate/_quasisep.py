"""All losses in linear time: a Matérn-5/2 Gaussian process, fitted by tinygp's quasi-separable solver."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tinygp import GaussianProcess, kernels

from adabatch_jax.learning_rate._fit import Moments, Parameters, descend, no_moments
from adabatch_jax.learning_rate._minimum import (
    Draws,
    Posterior,
    Smoother,
    draw,
    in_float32,
    posterior_on_grid,
)

_FIT_STEPS = 10
_FIT_RATE = 0.1
_FIT_SIZE = 2000  # losses, at most, that the hyper-parameters are fitted to
_NUM_CELLS = 500  # means of consecutive losses, at most, that the curve is conditioned on
_FIRST_LENGTH_SCALE = 0.2
_LENGTH_SCALES = (0.05, 1.0)  # of the series at the end of the warm-up; longer before
_LEAST_LOCATION = 0.05  # of a minimum that counts
_LEAST_NOISE = 1e-4  # noise variance over that of the curve, at least: float32 needs some
_INFINITE = 1e8  # the same, of a point that is not there


class QuasisepFit(NamedTuple):
    """Hyper-parameters and Adam's state.

    The parameters are the logarithms of the variance of the curve around its mean, of the variance
    of one loss around the curve, and of the length scale.
    """

    parameters: Parameters
    fits: jax.Array  # int32; 0: the parameters are not set yet
    moments: Moments


def quasisep_smoother() -> Smoother:
    """Constant mean + Matérn-5/2 + noise, conditioned on every loss in O(n).

    Each test makes 10 Adam steps (rate 0.1, on the logarithms) on an evenly thinned series of at most
    2,000 losses with the quasi-separable solver. It goes on from the test before, or, where that explains
    the losses better, starts anew from their variance and their neighbours' differences: a curve that
    was flat so far must not stay so. The length scale lies between 0.05 / (part of the warm-up that is
    over)² and 1 of the series: a curve that could bend faster would find minima in the noise before the
    loss has begun to fall. For the same reason a minimum in the first twentieth does not count.

    The curve is conditioned on at most 500 means of equally many consecutive losses, with the noise
    variance divided by their number: all losses count, and a mean stands at most 1/250 of the series,
    a twelfth of the shortest length scale, away from any of its losses. (Inserting the 500 points with
    infinite noise into the quasi-separable system of all losses is O(n) too, but in float32 its
    deviation is wrong by factors: `tests/benchmarks/autowu_decision.py`.) Nothing is random: there is
    one draw.

    Source: Foreman-Mackey's tinygp for kernel and solver; this use of it is ours.
    """
    return Smoother(_init, _test, _posterior, looks_ahead=False)


def _init() -> QuasisepFit:
    logs = tuple(jnp.zeros((), jnp.float32) for _ in range(3))
    return QuasisepFit(logs, jnp.zeros((), jnp.int32), no_moments(logs))


@in_float32()
def _test(
    state: QuasisepFit,
    x: jax.Array,
    y: jax.Array,
    count: jax.Array,
    key: jax.Array,
    progress: Any = 1.0,
) -> tuple[QuasisepFit, Draws]:
    del key
    state = _fit(state, x, y, count, progress)
    seen = draw(*_posterior(state, x, y, count))
    # A curve that is lowest where it starts has not fallen yet: what rises is noise.
    has_fallen = ~(seen.location < _LEAST_LOCATION)
    seen = seen._replace(probability=jnp.where(has_fallen, seen.probability, 0.0))
    return state, jax.tree.map(lambda v: v[None], seen)


def _relative_noise(log_variance: jax.Array, log_noise: jax.Array) -> jax.Array:
    return jnp.exp(log_noise - log_variance)


def _thin(count: jax.Array, length: int, size: int) -> tuple[jax.Array, jax.Array]:
    """`size` indices spread evenly over the first `count`, and which of them are there."""
    used = jnp.maximum(jnp.minimum(count, size), 1)
    slot = jnp.arange(size)
    # slot · count // used, without a product that overflows
    index = slot * (count // used) + slot * (count % used) // used
    return jnp.minimum(index, length - 1), (slot < used) & (slot < count)


def _fit(
    state: QuasisepFit, x: jax.Array, y: jax.Array, count: jax.Array, progress: Any
) -> QuasisepFit:
    index, here = _thin(count, x.shape[0], min(_FIT_SIZE, x.shape[0]))
    x, y = jnp.where(here, x[index], 1.0), y[index]
    n = jnp.maximum(jnp.sum(here.astype(jnp.float32)), 1.0)
    centred = jnp.where(here, y - jnp.sum(jnp.where(here, y, 0.0)) / n, 0.0)
    missing = (x.shape[0] - n) * jnp.log(jnp.float32(_INFINITE))

    def loss(parameters: Parameters) -> jax.Array:
        """The process for y / √variance, whose numbers are of order one, and the Jacobian."""
        log_variance, log_noise, log_length_scale = parameters
        relative = jnp.maximum(_relative_noise(log_variance, log_noise), _LEAST_NOISE)
        kernel = kernels.quasisep.Matern52(scale=jnp.exp(log_length_scale))
        noise = jnp.where(here, relative, _INFINITE)
        process = GaussianProcess(kernel, x, diag=noise, assume_sorted=True)
        alpha = process.solver.solve_triangular(centred / jnp.exp(0.5 * log_variance))
        volume = 2.0 * process.solver.normalization() - x.shape[0] * np.log(2.0 * np.pi) - missing
        value = 0.5 * (jnp.sum(jnp.square(alpha)) + volume + n * log_variance) / n
        return value.astype(jnp.float32)

    shortest, longest = (jnp.float32(bound) for bound in _LENGTH_SCALES)
    shortest = jnp.clip(shortest / jnp.square(jnp.float32(progress)), shortest, longest)

    def project(parameters: Parameters) -> Parameters:
        *others, log_length_scale = parameters
        return (*others, jnp.clip(log_length_scale, jnp.log(shortest), jnp.log(longest)))

    tiny = jnp.float32(1e-12)
    jumps = jnp.sum(jnp.where(here[1:], jnp.square(jnp.diff(y)), 0.0))
    guess: Parameters = (
        jnp.log(jnp.sum(jnp.square(centred)) / n + tiny),
        jnp.log(0.5 * jumps / jnp.maximum(n - 1.0, 1.0) + tiny),
        jnp.log(jnp.float32(_FIRST_LENGTH_SCALE)),
    )
    old, guess = project(state.parameters), project(guess)
    explained = jax.lax.map(loss, jax.tree.map(lambda a, b: jnp.stack([a, b]), old, guess))
    resumes = (state.fits > 0) & (explained[0] <= explained[1])
    before = jax.tree.map(
        lambda a, b: jnp.where(resumes, a, b),
        (old, state.moments),
        (guess, no_moments(guess)),
    )
    after = descend(loss, *before, rate=_FIT_RATE, steps=_FIT_STEPS, project=project)
    good = jnp.isfinite(jnp.stack(after[0])).all()  # if not, the old values serve on
    fitted, moments = jax.tree.map(lambda a, b: jnp.where(good, a, b), after, before)
    return QuasisepFit(fitted, state.fits + 1, moments)


@in_float32()
def _posterior(
    state: QuasisepFit, x: jax.Array, y: jax.Array, count: jax.Array
) -> tuple[jax.Array, Posterior]:
    length, cells = x.shape[0], min(_NUM_CELLS, x.shape[0])
    size = jnp.maximum(-(-count // cells), 1)  # losses in a cell
    inside = jnp.arange(-(-length // cells))
    index = jnp.arange(cells)[:, None] * size + inside[None, :]
    here = (index < count) & (inside[None, :] < size)
    index = jnp.minimum(index, length - 1)
    found = jnp.sum(here.astype(jnp.float32), axis=1)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(here, values, 0.0), axis=1) / jnp.maximum(found, 1.0)

    centre = jnp.sum(jnp.where(jnp.arange(length) < count, y, 0.0)) / jnp.maximum(count, 1).astype(
        jnp.float32
    )
    log_variance, log_noise, log_length_scale = state.parameters
    scale = jnp.exp(0.5 * log_variance)
    noise = _relative_noise(log_variance, log_noise) / jnp.maximum(found, 1.0)
    kernel = kernels.Matern52(scale=jnp.exp(log_length_scale))
    grid, unit = posterior_on_grid(
        kernel,
        mean(x[index]),
        mean((y[index] - centre) / scale),
        jnp.maximum(noise, _LEAST_NOISE),
        found > 0,
        jnp.zeros((), jnp.float32),
    )
    square = jnp.square(scale)
    return grid, Posterior(
        centre + scale * unit.mean, square * unit.variance, square * unit.last_covariance
    )
