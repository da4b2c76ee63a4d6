"""What a criterion is: a ratio of two statistics, kept apart until the last moment.

Numerator and denominator are averaged over steps each by itself, never their ratio, which has no
expectation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax._types import PyTree
from adabatch_jax.noise import GradientNoise


class Evidence(NamedTuple):
    """What one gradient says, before any averaging. Leaves are float32.

    Attributes:
      numerator: variance of one example's gradient (or the part of it that the test looks at).
      denominator: squared length of the mean gradient, to be compared with it.
      excess: the variance behind the upward bias of `denominator`: E denominator = its true value
        + excess / num_examples.

    Example:
      >>> import jax.numpy as jnp
      >>> Evidence(jnp.float32(10.0), jnp.float32(25.0), jnp.float32(10.0)).numerator.item()
      10.0
    """

    numerator: PyTree
    denominator: PyTree
    excess: PyTree


def _as_they_are(numerator: PyTree, denominator: PyTree) -> tuple[jax.Array, jax.Array]:
    return numerator, denominator


@dataclass(frozen=True)
class Criterion:
    """A test on gradient noise, as `adapt_batch_size` uses it; calling it gives the required batch size.

    Attributes:
      name: as in error messages and logs.
      evidence: `GradientNoise` → `Evidence`.
      scale: the square of the test's threshold; the required batch size is numerator / (scale ·
        denominator).
      summarize: `(numerator, denominator)` as pytrees → the two scalars that decide.
      debias: the denominator is always de-biased, since the quantity is defined that way.
      coordinate_wise: the evidence has a number for every coordinate, not scalars.
      reads: what `evidence` takes by keyword besides the noise: "examples_seen" (float32, all examples
        used so far), or an extra argument of `update` such as "value", the mean loss.
      uses_noise: False: the noise does not matter, need not be measured, and cannot spoil the decision.
      needs_debias: on average numerator ≤ scale · denominator · num_examples as long as the denominator
        is biased, so that an average of it never asks for growth. True of the tests whose threshold is
        at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from adabatch_jax import GradientNoise
      >>> noise = GradientNoise(jnp.array([3.0, 4.0]), scatter=jnp.array(70.0),
      ...                       num_examples=jnp.array(16), num_groups=jnp.array(8))
      >>> mine = Criterion("mine", lambda n: Evidence(n.trace, n.squared_norm, n.trace), scale=0.01)
      >>> round(float(mine(noise)), 3)
      40.0
    """

    name: str
    evidence: Callable[..., Evidence]
    scale: Any = 1.0
    summarize: Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]] = _as_they_are
    debias: bool = False
    coordinate_wise: bool = False
    reads: tuple[str, ...] = ()
    uses_noise: bool = True
    needs_debias: bool = False

    def required(self, numerator: jax.Array, denominator: jax.Array) -> jax.Array:
        """The required batch size: 0 without variance, +inf with variance but nothing to compare it to."""
        bound = jnp.asarray(self.scale, jnp.float32) * denominator
        ratio = numerator / jnp.where(bound > 0, bound, 1.0)
        unbounded = jnp.where(jnp.isnan(bound), bound, jnp.inf)
        return jnp.where(numerator <= 0, 0.0, jnp.where(bound > 0, ratio, unbounded))

    def __call__(self, noise: GradientNoise, **read: Any) -> jax.Array:
        """The required batch size (float32 scalar) that this one gradient asks for; `read`: see `reads`."""
        evidence = self.evidence(noise, **read)
        return self.required(*self.summarize(*corrected(self, evidence, noise)))


def corrected(
    criterion: Criterion,
    evidence: Evidence,
    noise: GradientNoise,
    *,
    debias: bool = False,
    population: Any = 1.0,
) -> tuple[PyTree, PyTree]:
    """Numerator and denominator, in float32; `debias` takes the bias `excess / b` off the denominator.

    `population` is the factor (n − b)/n on the variance of a mean of b out of n examples.
    """
    numerator, denominator, excess = jax.tree.map(
        lambda x: jnp.asarray(x).astype(jnp.float32), tuple(evidence)
    )
    if debias or criterion.debias:
        examples = jnp.maximum(jnp.asarray(noise.num_examples).astype(jnp.float32), 1.0)
        denominator = jax.tree.map(lambda d, e: d - population * e / examples, denominator, excess)
    return numerator, denominator


def of_population(required: jax.Array, num_examples: int) -> jax.Array:
    """The batch out of n examples whose mean is as noisy as that of T out of infinitely many.

    tr Σ / b · (n − b)/n = tr Σ / T, so 1/b = 1/T + 1/n. Where no T is large enough it stays infinite.
    """
    return jnp.where(jnp.isinf(required), required, num_examples / (num_examples / required + 1.0))
