"""Which estimator of the noise: by its cost and by its standard error."""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

from adabatch_jax import _validate
from adabatch_jax.noise._signs import freedom_of_signs


class Recommendation(NamedTuple):
    """An estimator of tr Σ, how exact it is at worst, and what it costs.

    Attributes:
      estimator: "groups" (`value_and_grad_noise`), "signs" (`value_and_grad_signs`) or "per_example"
        (`value_and_grad_noise` over groups of one example).
      degrees_of_freedom: of one step's estimate, over all devices.
      relative_standard_error: √(2 / degrees_of_freedom), where all gradients lie on one line; inf
        without any.
      relative_cost: expected time over that of the same step without noise.
      number: groups in which to split each micro-batch, or `num_signs` for each.

    Example:
      >>> Recommendation("groups", 8, 0.5, 1.0, 1).degrees_of_freedom
      8
    """

    estimator: str
    degrees_of_freedom: int
    relative_standard_error: float
    relative_cost: float
    number: int


def recommend_estimator(
    batch_size: int,
    *,
    relative_standard_error: float,
    accumulation_steps: int = 1,
    num_devices: int = 1,
    divisible: bool = True,
    group_overhead: float = 22.0,
) -> Recommendation:
    """The cheapest estimator of tr Σ whose relative standard error is small enough at worst.

    With ν degrees of freedom the relative standard error of a Gaussian variance is √(2/ν), so ν ≥ 2/ε²
    are needed. That is the worst case, a covariance of rank one; with the effective rank r = (tr Σ)²/tr(Σ²)
    it is √(2/(r·ν)). A = accumulation_steps · num_devices micro-batches come without any work:

    | estimator | ν | time over a step's |
    |---|---|---|
    | groups: each micro-batch in c parts | A·c − 1 | (b + a·A·c) / (b + a·A) |
    | signs: k vectors for each micro-batch | A·(ν_k + 1) − 1 | 1 + 2k/3 |
    | per example | b − 1 | (b + a·b) / (b + a·A) |

    with ν_k as in `value_and_grad_signs`, about k. The times are models: a gradient takes as long as
    its examples and a = `group_overhead` more, which go by moving the parameters' memory; and a
    backward pass takes two thirds of a gradient. Averaging over steps (`ema_decay`) multiplies ν as
    well, and costs nothing.

    Args:
      batch_size: b, examples of one step over all devices.
      relative_standard_error: ε > 0, wanted of one step's estimate. 0.5 needs 8 degrees of freedom.
      accumulation_steps: micro-batches on each device in one step.
      num_devices: devices that share the batch.
      divisible: whether the loss can be taken on a part of a micro-batch. Where it cannot, signs are
        all there is beyond the micro-batches themselves.
      group_overhead: a ≥ 0, examples. The default is that of a dense network on two CPU cores, the
        worst case there; networks that use a parameter many times an example, convolutions or
        attention, come near 0. On other hardware: take the time of one gradient at two sizes.

    Returns:
      A `Recommendation`. Parts are of equal size: c divides the n examples of a micro-batch. Where
      nothing is exact enough, the most exact: single examples or, if not `divisible`, n − 1 sign
      vectors for each micro-batch.

    Raises:
      ValueError: a number is not positive, or `group_overhead` negative; `batch_size` is not divisible
        by accumulation_steps · num_devices.

    Example:
      >>> choice = recommend_estimator(256, relative_standard_error=0.5, accumulation_steps=4)
      >>> choice.estimator, choice.number, choice.degrees_of_freedom
      ('groups', 4, 15)
      >>> round(choice.relative_standard_error, 2), round(choice.relative_cost, 2)
      (0.37, 1.77)
      >>> recommend_estimator(256, relative_standard_error=0.5, accumulation_steps=16).relative_cost
      1.0
      >>> recommend_estimator(256, relative_standard_error=1.5, divisible=False).estimator
      'signs'

    Source: ours; the degrees of freedom are those of `value_and_grad_noise` and `value_and_grad_signs`.
    """
    where = "recommend_estimator"
    _validate.positive_int(
        where, batch_size=batch_size, accumulation_steps=accumulation_steps, num_devices=num_devices
    )
    _validate.positive(where, relative_standard_error=relative_standard_error)
    _validate.between(where, 0.0, float("inf"), group_overhead=group_overhead)
    batches = int(accumulation_steps) * int(num_devices)
    if batch_size % batches:
        raise ValueError(
            f"{where}: batch_size={batch_size} is not divisible by accumulation_steps * num_devices "
            f"= {batches}"
        )
    size = int(batch_size) // batches

    def groups(parts: int) -> Recommendation:
        kind = "per_example" if parts == size > 1 else "groups"
        cost = (size + group_overhead * parts) / (size + group_overhead)
        return _recommendation(kind, batches * parts - 1, cost, parts)

    def signs(number: int) -> Recommendation:
        freedom = batches * (freedom_of_signs(number, size) + 1) - 1
        return _recommendation("signs", freedom, 1.0 + 2.0 * number / 3.0, number)

    # The factor: 2/0.1² must ask for 200 whatever its rounding.
    wanted = math.ceil(2.0 / relative_standard_error**2 * (1.0 - 1e-12))
    choices = [groups(c) for c in range(1, size + 1) if size % c == 0 and (divisible or c == 1)]
    if size > 1:
        most = size - 1
        fewest = bisect.bisect_left(
            range(1, most), wanted, key=lambda k: signs(k).degrees_of_freedom
        )
        choices.append(signs(fewest + 1))
    enough = [x for x in choices if x.degrees_of_freedom >= wanted]
    if enough:
        return min(enough, key=lambda x: x.relative_cost)
    return max(choices, key=lambda x: (x.degrees_of_freedom, -x.relative_cost))


def _recommendation(kind: str, freedom: int, cost: float, number: int) -> Recommendation:
    error = math.sqrt(2.0 / freedom) if freedom else math.inf
    return Recommendation(kind, freedom, error, cost, number)
