"""Has a noisy curve passed its minimum? What a smoother tells AutoWU, and the test on it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

Function = TypeVar("Function", bound=Callable[..., Any])
LEAST_LOCATION = 0.05  # in [0, 1], of a minimum: what is lowest before has not begun to fall
NUM_POINTS = 500  # at which the curve is predicted, both ends of [0, 1] included
_AS_LOW = 2.0  # standard deviations above the minimum within which a curve counts as low
_DIFFERENCE_VARIANCE = 1e-4  # added to the variance of a difference, in units of the smoother


class Posterior(NamedTuple):
    """A smoothed curve at increasing points; the last point is the present."""

    mean: jax.Array  # float32 [k]
    variance: jax.Array  # float32 [k]: of the curve, without the noise of a single loss
    last_covariance: jax.Array  # float32 [k]: with the last point


class Draws(NamedTuple):
    """What one test saw, draw by draw; NaN where a factorisation failed."""

    probability: jax.Array  # float32 [draws]: that the minimum is past
    location: jax.Array  # float32 [draws]: of the minimum, in [0, 1]
    earliest: jax.Array  # float32 [draws]: first point as low, to two standard deviations


class Smoother(NamedTuple):
    """A way to smooth a series of losses: `rbf_smoother()`, `quasisep_smoother()` or one of your own.

    `test(state, x, y, count, key, progress) -> (state, Draws)`: x (increasing, in [0, 1]) and y are
    float32 [n], of which the first `count` are there; progress is the part of the warm-up, in (0, 1],
    that they cover. `posterior(state, x, y, count) -> (grid [k], Posterior)` uses
    the hyper-parameters that the last test has set.

    Source: ours.
    """

    init: Callable[[], Any]
    test: Callable[..., tuple[Any, Draws]]
    posterior: Callable[..., tuple[jax.Array, Posterior]]
    looks_ahead: bool  # whether x = 1 is the end of the last step; if not, it is the last loss
    seed: int = 0  # of the first key
    warmup_over: bool = False  # the program only sees states whose warm-up has ended: no test in it


def compiled(function: Function) -> Function:
    """The function, compiled even where `jax_disable_jit` is set.

    Its recursions over the losses would run in Python there, for minutes and in gigabytes.
    """
    fast = jax.jit(function)  # one, whose programs are kept

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return function(*args)
        with jax.disable_jit(False):
            return fast(*args)

    return call  # type: ignore[return-value]


@contextlib.contextmanager
def in_floats_of(bits: int) -> Iterator[None]:
    """float32 or float64 at full precision, whatever the defaults are where the smoother is traced.

    For tinygp, which has an argument for neither: its quasi-separable products would be bfloat16 on a
    TPU, and all of it float64 wherever a user has turned that on, float32 wherever not.
    """
    with jax.enable_x64(bits == 64), jax.default_matmul_precision("highest"):
        yield


def probability_past_minimum(posterior: Posterior, unit: Any = 1.0) -> jax.Array:
    """max over i < k of P(Xᵢ < X_k), where X_k is the curve at present.

    Xᵢ − X_k is Gaussian with mean μᵢ − μ_k and variance vᵢ + v_k − 2 cᵢ, to which 1e-4 unit² is added.
    The paper's code adds 1e-4, for losses of order one.

    Source: Kim et al. (2021), arXiv 2107.05855, section 2.
    """
    mean, variance, covariance = posterior
    difference = variance[:-1] + variance[-1] - 2.0 * covariance[:-1]
    difference += _DIFFERENCE_VARIANCE * jnp.square(jnp.asarray(unit).astype(jnp.float32))
    rise = mean[-1] - mean[:-1]
    return jax.scipy.stats.norm.cdf(jnp.max(rise / jnp.sqrt(difference))).astype(jnp.float32)


def draw(grid: jax.Array, posterior: Posterior, unit: Any = 1.0) -> Draws:
    """Probability and locations from one posterior of losses of the order of `unit`."""
    lowest = jnp.argmin(posterior.mean)
    as_low = posterior.mean[lowest] + _AS_LOW * jnp.sqrt(posterior.variance[lowest])
    failed = ~jnp.isfinite(posterior.mean).all()

    def location(index: jax.Array) -> jax.Array:
        return jnp.where(failed, jnp.nan, grid[index]).astype(jnp.float32)

    return Draws(
        probability=probability_past_minimum(posterior, unit),
        location=location(lowest),
        earliest=location(jnp.argmax(posterior.mean <= as_low)),
    )
