"""All losses in linear time: a Matérn-5/2 Gaussian process, fitted by tinygp's quasi-separable solver."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tinygp import GaussianProcess, kernels, noise

from adabatch_jax.learning_rate._fit_hyperparameters import Moments, Parameters, descend, no_moments
from adabatch_jax.learning_rate._posterior_test import (
    LEAST_LOCATION,
    NUM_POINTS,
    Draws,
    Posterior,
    Smoother,
    compiled,
    draw,
    in_floats_of,
)

_FIT_STEPS = 10
_FIT_RATE = 0.1
_FIT_SIZE = 2000  # losses, at most, that the hyper-parameters are fitted to
_FIRST_LENGTH_SCALE = 0.2
_LENGTH_SCALES = (0.05, 1.0)  # of the series at the end of the warm-up; longer before
_LEAST_NOISE = 1e-4  # noise variance over that of the curve, at least: float32 needs some
_LEAST_LOSSES = 10  # behind a minimum that counts
_INFINITE = 1e8  # the same, of a loss that is not there
_INSERTED = 1e6  # the same, of a point of the curve: float64 shows a variance of 1e-10 beside it


class QuasisepFit(NamedTuple):
    """Hyper-parameters and Adam's state.

    The parameters are the logarithms of the variance of the curve around its mean, of the variance
    of one loss around the curve, and of the length scale.
    """

    parameters: Parameters
    fits: jax.Array  # int32; 0: the parameters are not set yet
    moments: Moments


def quasisep_smoother(*, warmup_over: bool = False) -> Smoother:
    """Constant mean + Matérn-5/2 + noise, conditioned on every loss in O(n).

    Each test makes 10 Adam steps (rate 0.1, on the logarithms) on an evenly thinned series of at most
    2,000 losses with the quasi-separable solver. It goes on from the test before, or, where that explains
    the losses better, starts anew from their variance and their neighbours' differences: a curve that
    was flat so far must not stay so. The length scale lies between 0.05 / (part of the warm-up that is
    over)² and 1 of the series: a curve that could bend faster would find minima in the noise before the
    loss has begun to fall. For the same reason a minimum in the first twentieth does not count, nor
    one of fewer than ten losses.

    The curve is conditioned on all losses: the 500 points are inserted into the sorted series with
    infinite noise. In float64, also where the step around it is float32, in which the solver's
    recursions over neighbours so close lose everything (`tests/benchmarks/autowu_decision.py`). A TPU
    emulates float64 by pairs of float32. Nothing is random: there is one draw. It decides alike whatever
    the losses are measured in.

    Args:
      warmup_over: leave the test out of the program, which then compiles in a quarter of the time. Set it
        only for steps that come after the warm-up: their state and numbers are the same with and
        without it. A warm-up that still runs would go on to its limit untested.

    Returns:
      A `Smoother`, for `scale_by_autowu(smoother=…)`.

    Example:
      >>> from adabatch_jax import scale_by_autowu
      >>> run = dict(total_steps=100, steps_per_test=10)
      >>> link = scale_by_autowu(**run, smoother=quasisep_smoother())
      >>> later = scale_by_autowu(**run, smoother=quasisep_smoother(warmup_over=True))

    Source: Foreman-Mackey's tinygp for kernel and solver; this use of it is ours.
    """
    return Smoother(_init, _test, _posterior, looks_ahead=False, warmup_over=warmup_over)


def _init() -> QuasisepFit:
    logs = tuple(jnp.zeros((), jnp.float32) for _ in range(3))
    return QuasisepFit(logs, jnp.zeros((), jnp.int32), no_moments(logs))


@compiled
@in_floats_of(32)
def _test(
    state: QuasisepFit,
    x: jax.Array,
    y: jax.Array,
    count: jax.Array,
    key: jax.Array,
    progress: Any = 1.0,
) -> tuple[QuasisepFit, Draws]:
    del key
    # Decisions have no derivative, and what keeps its batching for itself has no backward pass.
    state, x, y, progress = jax.lax.stop_gradient((state, x, y, progress))
    state = _fit(state, x, y, count, progress)
    log_variance, log_noise, _ = state.parameters
    unit = jnp.sqrt(jnp.exp(log_variance) + jnp.exp(log_noise))  # whatever the loss is measured in
    grid, posterior = _posterior(state, x, y, count)
    seen = draw(grid, posterior, unit)
    # A curve that is lowest where it starts has not fallen yet: what rises is noise, as in a handful.
    says_something = ~(seen.location < LEAST_LOCATION) & (count >= _LEAST_LOSSES)
    seen = seen._replace(probability=jnp.where(says_something, seen.probability, 0.0))
    return state, jax.tree.map(lambda v: v[None], seen)


def _relative_noise(log_variance: jax.Array, log_noise: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.exp(log_noise - log_variance), _LEAST_NOISE)


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
        kernel = kernels.quasisep.Matern52(scale=jnp.exp(log_length_scale))
        diagonal = jnp.where(here, _relative_noise(log_variance, log_noise), _INFINITE)
        process = GaussianProcess(kernel, x, diag=diagonal, assume_sorted=True)
        alpha = process.solver.solve_triangular(centred / jnp.exp(0.5 * log_variance))
        volume = 2.0 * process.solver.normalization() - x.shape[0] * np.log(2.0 * np.pi) - missing
        value = 0.5 * (jnp.sum(jnp.square(alpha)) + volume + n * log_variance) / n
        return value.astype(jnp.float32)

    shortest, longest = (jnp.float32(bound) for bound in _LENGTH_SCALES)
    shortest = jnp.clip(shortest / jnp.square(jnp.float32(progress)), shortest, longest)

    def project(parameters: Parameters) -> Parameters:
        *others, log_length_scale = parameters
        return (*others, jnp.clip(log_length_scale, jnp.log(shortest), jnp.log(longest)))

    # What float32 tells apart; of losses that are all equal there is nothing else to go by.
    tiny = 1e-12 * jnp.max(jnp.where(here, jnp.square(y), 0.0)) + jnp.finfo(jnp.float32).tiny
    jumps = jnp.sum(jnp.where(here[1:], jnp.square(jnp.diff(y)), 0.0))
    guess: Parameters = (
        jnp.log(jnp.sum(jnp.square(centred)) / n + tiny),
        jnp.log(0.5 * jumps / jnp.maximum(n - 1.0, 1.0) + tiny),
        jnp.log(jnp.float32(_FIRST_LENGTH_SCALE)),
    )
    old, guess = project(state.parameters), project(guess)
    explained = jax.lax.map(loss, jax.tree.map(lambda a, b: jnp.stack([a, b]), old, guess))
    resumes = (state.fits > 0) & (explained[0] <= explained[1])
    before = optax.tree.where(resumes, (old, state.moments), (guess, no_moments(guess)))
    after = descend(loss, *before, rate=_FIT_RATE, steps=_FIT_STEPS, project=project)
    good = jnp.isfinite(jnp.stack(after[0])).all()  # if not, the old values serve on
    fitted, moments = optax.tree.where(good, after, before)
    return QuasisepFit(fitted, state.fits + 1, moments)


# One by one under `vmap`, whose rules know nothing of the dtypes that are in force here.
@compiled
@jax.custom_batching.sequential_vmap
@in_floats_of(64)
def _posterior(
    state: QuasisepFit, x: jax.Array, y: jax.Array, count: jax.Array
) -> tuple[jax.Array, Posterior]:
    """The process given the first `count` losses, at points that are losses of infinite noise.

    What all others say of point i is in P = (K + N)⁻¹ alone: mean −(P y)ᵢ / Pᵢᵢ, variance
    1 / Pᵢᵢ − Nᵢᵢ, and with the last point, l, covariance −Pᵢₗ / (Pᵢᵢ Pₗₗ).

    Source: Rasmussen & Williams (2006), equation 5.12.
    """
    here = jnp.arange(x.shape[0]) < count
    grid = jnp.linspace(0.0, 1.0, NUM_POINTS, dtype=jnp.float32)
    x = jnp.where(here, x, 1.0).astype(jnp.float32)
    order, places = _merge(x, grid)

    def merged(of_losses: jax.Array, of_points: jax.Array) -> jax.Array:
        of_points = jnp.broadcast_to(of_points, grid.shape)
        return jnp.concatenate([of_losses, of_points]).astype(jnp.float64)[order]

    log_variance, log_noise, log_length_scale = (v.astype(jnp.float64) for v in state.parameters)
    centre = jnp.sum(jnp.where(here, y.astype(jnp.float64), 0.0)) / jnp.maximum(count, 1)
    scale = jnp.exp(0.5 * log_variance)
    diagonal = jnp.where(here, _relative_noise(log_variance, log_noise), _INFINITE)
    kernel = kernels.quasisep.Matern52(scale=jnp.exp(log_length_scale))
    matrix = kernel.to_symm_qsm(merged(x, grid))
    matrix += noise.Diagonal(merged(diagonal, jnp.float64(_INSERTED))).to_qsm()
    inverse = matrix.inv()
    values = merged(jnp.where(here, (y - centre) / scale, 0.0), jnp.float64(0.0))
    last = jnp.zeros_like(values).at[places[-1]].set(1.0)
    weights, column = (inverse @ jnp.column_stack([values, last]))[places].T
    precision = inverse.diag.d[places]
    variance = jnp.maximum(1.0 / precision - _INSERTED, 0.0)
    covariance = -column / (precision * precision[-1])
    posterior = Posterior(
        mean=centre - scale * weights / precision,
        variance=jnp.square(scale) * variance,
        last_covariance=jnp.square(scale) * covariance.at[-1].set(variance[-1]),
    )
    return grid, jax.tree.map(lambda v: v.astype(jnp.float32), posterior)


@in_floats_of(32)
def _merge(x: jax.Array, grid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order that sorts x and the grid, which comes last among equals, and its places in there."""
    order = jnp.argsort(jnp.concatenate([x, grid]), stable=True)
    number = jnp.arange(order.shape[0], dtype=order.dtype)
    return order, jnp.zeros_like(order).at[order].set(number)[x.shape[0] :]
