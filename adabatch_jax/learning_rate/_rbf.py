"""The paper's Gaussian process: a smooth (RBF) kernel, fitted to and conditioned on random losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tinygp import GaussianProcess, kernels

from adabatch_jax.learning_rate._fit_hyperparameters import Moments, Parameters, descend, no_moments
from adabatch_jax.learning_rate._posterior_test import (
    NUM_POINTS,
    Draws,
    Posterior,
    Smoother,
    compiled,
    draw,
    in_floats_of,
)

_LENGTH_SCALE = 0.2
_NOISE_FLOOR = 1e-4
_FIRST_NOISE = 1e-3
_FIT_STEPS = 100
_FIT_RATE = 0.01
_FIT_SIZE = 100  # losses, at most, that the hyper-parameters are fitted to
_DRAW_SIZE = 500  # losses, at most, behind one prediction
_NUM_DRAWS = 5
_INFINITE = 1e10  # noise variance of a point that is not there; its root must fit into float32


class RbfFit(NamedTuple):
    """Hyper-parameters, two of them before softplus, and Adam's state: they carry over between tests."""

    parameters: Parameters  # raw outputscale, raw noise, mean
    moments: Moments


def rbf_smoother(*, seed: int = 0, warmup_over: bool = False) -> Smoother:
    """Constant mean + outputscale · exp(−½ (Δx / 0.2)²) + noise, as in the paper.

    Each test sets the mean to that of the losses and makes 100 Adam steps (rate 0.01) on the
    negative log marginal likelihood per point of at most 100 random losses, then conditions on at
    most 500 random losses, five times. With fewer losses nothing is random.

    The constants are absolute, for losses of order one. Multiply what is much smaller or larger by a
    constant.

    Args:
      seed: of the random losses; the key is kept in the state.
      warmup_over: see `quasisep_smoother`.

    Returns:
      A `Smoother`, for `scale_by_autowu(smoother=…)`.

    Example:
      >>> rbf_smoother(seed=3).seed
      3

    Source: Kim et al. (2021), arXiv 2107.05855, section 2 and the authors' code.
    """
    return Smoother(_init, _test, _posterior, looks_ahead=True, seed=seed, warmup_over=warmup_over)


def _init() -> RbfFit:
    raw_noise = np.log(np.expm1(_FIRST_NOISE - _NOISE_FLOOR))
    start = tuple(jnp.asarray(np.float32(x)) for x in (0.0, raw_noise, 0.0))
    return RbfFit(start, no_moments(start))


def _noise(raw: jax.Array) -> jax.Array:
    return _NOISE_FLOOR + jax.nn.softplus(raw)


def _choose(key: jax.Array, length: int, count: jax.Array, size: int) -> jax.Array:
    """`size` random numbers below `count`; where there are not more, all of them in their order."""
    number = jnp.arange(length)
    if size >= length:
        return number
    score = jnp.where(number < count, jax.random.uniform(key, (length,)), -1.0)
    score = jnp.where(count <= size, -number.astype(jnp.float32), score)
    return jax.lax.top_k(score, size)[1]


@compiled
@in_floats_of(32)
def _test(
    state: RbfFit,
    x: jax.Array,
    y: jax.Array,
    count: jax.Array,
    key: jax.Array,
    progress: Any = 1.0,
) -> tuple[RbfFit, Draws]:
    del progress
    fit_key, *draw_keys = jax.random.split(key, 1 + _NUM_DRAWS)
    total = jnp.sum(jnp.where(jnp.arange(x.shape[0]) < count, y, 0.0))
    mean = total / jnp.maximum(count, 1).astype(jnp.float32)
    state = state._replace(parameters=(*state.parameters[:2], mean))
    chosen = _choose(fit_key, x.shape[0], count, _FIT_SIZE)
    state = _fit(state, x[chosen], y[chosen], count)

    def one(last: Draws, key: jax.Array) -> tuple[Draws, Draws]:
        def fresh() -> Draws:
            chosen = _choose(key, x.shape[0], count, _DRAW_SIZE)
            return draw(*_posterior(state, x[chosen], y[chosen], count))

        # With no more losses than a draw takes, all draws are the same.
        differs = (count > _DRAW_SIZE) | (last.probability < 0)
        result = jax.lax.cond(differs, fresh, lambda: last)
        return result, result

    none = Draws(*(jnp.asarray(np.float32(x)) for x in (-1.0, 0.0, 0.0)))
    return state, jax.lax.scan(one, none, jnp.stack(draw_keys))[1]


def _fit(state: RbfFit, x: jax.Array, y: jax.Array, count: jax.Array) -> RbfFit:
    """Adam on the negative log marginal likelihood per point.

    Inputs and length scale stay put, so one eigendecomposition of the unit kernel, K = U Λ Uᵀ, makes
    each step O(n): outputscale · Λ + noise is diagonal in that basis. A point that is not there has a
    row and a column of zeros: an eigenvalue 0, whose part of the likelihood is taken out again.
    """
    here = (jnp.arange(x.shape[0]) < count).astype(jnp.float32)
    n = jnp.maximum(jnp.sum(here), 1.0)
    unit = kernels.ExpSquared(_LENGTH_SCALE)(x, x) * here[:, None] * here[None, :]
    eigenvalues, basis = jnp.linalg.eigh(unit.astype(jnp.float32))
    eigenvalues = jnp.maximum(eigenvalues, 0.0)
    y_rotated, one_rotated = basis.T @ jnp.where(here > 0, y, 0.0), basis.T @ here

    def loss(parameters: Parameters) -> jax.Array:
        raw_outputscale, raw_noise, mean = parameters
        noise = _noise(raw_noise)
        diagonal = jax.nn.softplus(raw_outputscale) * eigenvalues + noise
        misfit = jnp.sum(jnp.square(y_rotated - mean * one_rotated) / diagonal)
        volume = jnp.sum(jnp.log(diagonal)) - (x.shape[0] - n) * jnp.log(noise)
        return 0.5 * (misfit + volume) / n

    return RbfFit(*descend(loss, *state, rate=_FIT_RATE, steps=_FIT_STEPS))


@compiled
@in_floats_of(32)
def _posterior(
    state: RbfFit, x: jax.Array, y: jax.Array, count: jax.Array
) -> tuple[jax.Array, Posterior]:
    """The process given the first `count` losses.

    Of the posterior covariance at the 500 points only the diagonal and the last column are formed:
    with L Lᵀ = K + N and A = L⁻¹ k(x, ·), v = k(·, ·) − Σ A² and c = k(·, last) − Aᵀ A[:, last].
    """
    raw_outputscale, raw_noise, mean = state.parameters
    kernel = jax.nn.softplus(raw_outputscale) * kernels.ExpSquared(_LENGTH_SCALE)
    here = jnp.arange(x.shape[0]) < count
    noise = jnp.where(here, _noise(raw_noise), _INFINITE).astype(jnp.float32)
    grid = jnp.linspace(0.0, 1.0, NUM_POINTS, dtype=jnp.float32)
    process = GaussianProcess(kernel, x, diag=noise, mean=mean)
    residual = jnp.where(here, y - mean, 0.0)
    solved = process.solver.solve_triangular(jnp.column_stack([residual, kernel(x, grid)]))
    weights, known = solved[:, 0], solved[:, 1:]
    prior = kernel(grid, grid[-1:])[:, 0]
    posterior = Posterior(
        mean=mean + known.T @ weights,
        variance=jnp.maximum(prior[-1] - jnp.sum(jnp.square(known), axis=0), 0.0),
        last_covariance=prior - known.T @ known[:, -1],
    )
    return grid, jax.tree.map(lambda v: v.astype(jnp.float32), posterior)
