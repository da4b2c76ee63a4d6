"""AdaGrad and AdaGrad-Norm with a batch size that grows by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from adabatch_jax import _validate
from adabatch_jax._tree import cast_like, widen
from adabatch_jax._types import ArrayLike, PyTree, ScalingRule, Schedule
from adabatch_jax.batch_size import Criterion, adapt_batch_size
from adabatch_jax.learning_rate import scale_by_batch_size, scale_by_example_schedule
from adabatch_jax.optimizers._adagrad_norm import scale_by_adagrad_norm


def adadagrad(
    learning_rate: float | Schedule,
    *,
    criterion: Criterion | Callable[..., Any],
    initial_batch_size: int,
    max_batch_size: int,
    scaling: ScalingRule | None = None,
    initial_accumulator_value: ArrayLike = 0.0,
    eps: ArrayLike = 1e-20,
    **batch_size_options: Any,
) -> optax.GradientTransformationExtraArgs:
    """AdAdaGrad: AdaGrad, with a batch size that grows as a test on the gradient's noise demands.

    v ← v + g², w ← w − α g / √(v + ε), coordinate by coordinate; the batch size follows `criterion`.
    The defaults v₀ = 0 and ε = 10⁻²⁰ inside the root reproduce the authors' optimizer (PyTorch's: ε =
    10⁻¹⁰ outside the root) wherever √v is well above 10⁻¹⁰; Optax's own start at v₀ = 0.1. v is at
    least float32, whatever the parameters are.

    Args:
      learning_rate: α > 0, or a schedule over **examples processed**. The authors use 8e-3, constant,
        for logistic regression and a CNN on MNIST (first batch 2 and 8, η = 0.1), and 5e-2 → 5e-3,
        cosine with 10 % warm-up, for ResNet-18 on CIFAR-10 (first batch 8, η = 0.5).
      criterion: for instance `norm_test(0.5)`.
      initial_batch_size: examples of the first step.
      max_batch_size: largest batch size; the authors' is the data set.
      scaling: rule by which the learning rate follows the batch size, such as `sqrt_scaling()`, with
        the initial batch size as base. None: it does not, as in the paper.
      initial_accumulator_value: v₀ ≥ 0.
      eps: ε, inside the root.
      **batch_size_options: passed to `adapt_batch_size`.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` reads `noise=`. Under
      `optax.inject_hyperparams` the numbers `learning_rate`, `initial_accumulator_value` and `eps`
      may be injected; everything else belongs to static_args.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import adabatch_jax as adabatch
      >>> optimizer = adabatch.adadagrad(0.1, criterion=adabatch.norm_test(0.5),
      ...                                initial_batch_size=4, max_batch_size=64)
      >>> fn = adabatch.value_and_grad_noise(lambda w, x: jnp.mean((w - x) ** 2))
      >>> params = jnp.array(0.0)
      >>> state = optimizer.init(params)
      >>> value, noise = fn(params, adabatch.split_groups(jnp.array([1.0, 5.0, -3.0, 2.0]), 4))
      >>> updates, state = optimizer.update(noise.mean, state, params, noise=noise)
      >>> round(float(updates), 4), int(adabatch.get_batch_size(state))
      (0.1, 28)

    Source: Lau, Liu, Kolar (2024), arXiv 2402.11215 (AdAdaGrad); AdaGrad: Duchi, Hazan, Singer (2011).
    """
    where = "adadagrad"
    _validate.between(
        where,
        0.0,
        float("inf"),
        initial_accumulator_value=initial_accumulator_value,
        eps=eps,
    )
    return _recipe(
        where,
        adagrad_direction(initial_accumulator_value, eps),
        learning_rate,
        criterion,
        initial_batch_size,
        max_batch_size,
        scaling,
        batch_size_options,
    )


def adadagrad_norm(
    learning_rate: float | Schedule,
    *,
    criterion: Criterion | Callable[..., Any],
    initial_batch_size: int,
    max_batch_size: int,
    scaling: ScalingRule | None = None,
    initial_accumulator_value: ArrayLike = 0.01,
    eps: ArrayLike = 1e-10,
    **batch_size_options: Any,
) -> optax.GradientTransformationExtraArgs:
    """AdAdaGrad-Norm: as `adadagrad`, with one scalar accumulator for all parameters.

    v ← v + ‖g‖², w ← w − α g / (√v + ε). (The authors' code keeps one accumulator per row of every
    matrix; this is the scalar method that the theory is about.)

    Args:
      learning_rate: α > 0, or a schedule over **examples processed**.
      criterion: for instance `norm_test(0.5)`.
      initial_batch_size: examples of the first step.
      max_batch_size: largest batch size.
      scaling: rule by which the learning rate follows the batch size; None: it does not.
      initial_accumulator_value: v₀ ≥ 0.
      eps: ε ≥ 0, outside the root.
      **batch_size_options: passed to `adapt_batch_size`.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` reads `noise=`. Static_args as for
      `adadagrad`.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import adabatch_jax as adabatch
      >>> optimizer = adabatch.adadagrad_norm(0.1, criterion=adabatch.norm_test(0.5),
      ...                                     initial_batch_size=4, max_batch_size=64)
      >>> int(adabatch.get_batch_size(optimizer.init(jnp.zeros(3))))
      4

    Source: Lau, Liu, Kolar (2024), arXiv 2402.11215 (AdAdaGrad-Norm); Ward, Wu, Bottou (2019),
    arXiv 1806.01811.
    """
    return _recipe(
        "adadagrad_norm",
        scale_by_adagrad_norm(initial_accumulator_value, eps),
        learning_rate,
        criterion,
        initial_batch_size,
        max_batch_size,
        scaling,
        batch_size_options,
    )


def adagrad_direction(
    initial_accumulator_value: ArrayLike, eps: ArrayLike
) -> optax.GradientTransformation:
    """`optax.scale_by_rss` with sums that are at least float32; updates in the dtype of the gradient.

    In bfloat16 a sum of ones stays at 256, and in float16 the square of 1e-4 is 0.
    """
    link = optax.scale_by_rss(initial_accumulator_value, eps)

    def init(params: PyTree) -> optax.ScaleByRssState:
        return link.init(widen(params))

    def update(
        updates: PyTree, state: optax.ScaleByRssState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.ScaleByRssState]:
        del params
        scaled, state = link.update(widen(updates), state)
        return cast_like(scaled, updates), state

    return optax.GradientTransformation(init, update)


def _recipe(
    where: str,
    direction: optax.GradientTransformation,
    learning_rate: Any,
    criterion: Any,
    initial_batch_size: int,
    max_batch_size: int,
    scaling: Any,
    batch_size_options: dict[str, Any],
) -> optax.GradientTransformationExtraArgs:
    """controller → direction → scaling → learning rate: the order of every recipe."""
    if not callable(learning_rate):
        _validate.positive(where, learning_rate=learning_rate)
    links = [
        adapt_batch_size(
            criterion,
            initial_batch_size=initial_batch_size,
            max_batch_size=max_batch_size,
            **_validate.keywords("batch_size_options", batch_size_options),
        ),
        direction,
    ]
    if scaling is not None:
        links.append(scale_by_batch_size(scaling, base_batch_size=initial_batch_size))
    return optax.chain(*links, scale_by_example_schedule(learning_rate))
