"""From a configuration to an optimizer: controller, direction, scaling, learning rate."""

from __future__ import annotations

from collections.abc import Callable

import optax

import adabatch_jax as adabatch
from adabatch_jax.training._config import TrainConfig


def build_criterion(config: TrainConfig) -> adabatch.Criterion | None:
    """The criterion that the configuration names; None for a constant batch."""
    makers: dict[str, Callable[[], adabatch.Criterion | None]] = {
        "norm": lambda: adabatch.norm_test(config.eta),
        "coordinate-norm": lambda: adabatch.coordinate_norm_test(config.eta),
        "inner-product": lambda: adabatch.inner_product_test(config.theta),
        "augmented": lambda: adabatch.augmented_inner_product_test(config.theta, config.nu),
        "noise-scale": adabatch.gradient_noise_scale,
        "none": lambda: None,
    }
    return makers[config.criterion]()


def build_direction(name: str) -> optax.GradientTransformation:
    """The update direction, before sign and learning rate."""
    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adadagrad": lambda: optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-20),
        "adadagrad-norm": adabatch.scale_by_adagrad_norm,
        "adam": optax.scale_by_adam,
        "adamw": lambda: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4)),
        "sgd": optax.identity,
        "momentum": lambda: optax.trace(decay=0.9),
        "lamb": lambda: optax.chain(optax.scale_by_adam(eps=1e-6), optax.scale_by_trust_ratio()),
    }
    return makers[name]()


def build_optimizer(
    config: TrainConfig, total_examples: int
) -> optax.GradientTransformationExtraArgs:
    """The whole chain. A constant batch is a controller that starts at its maximum.

    Args:
      config: the configuration.
      total_examples: the budget of the run, over which the schedule decays.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` reads `noise=`.
    """
    criterion = build_criterion(config)
    constant = criterion is None
    rules = {"linear": adabatch.linear_scaling, "sqrt": adabatch.sqrt_scaling}
    links = [
        adabatch.adapt_batch_size(
            criterion or adabatch.norm_test(1.0),
            initial_batch_size=config.initial_batch_size,
            max_batch_size=config.initial_batch_size if constant else config.max_batch_size,
            smoothing=config.smoothing,
            debias=config.debias,
            growth_limit=config.growth_limit,
        ),
        build_direction(config.optimizer),
    ]
    if config.scaling != "none":
        base = config.initial_batch_size
        links.append(adabatch.scale_by_batch_size(rules[config.scaling](), base_batch_size=base))
    schedule: float | optax.Schedule = config.learning_rate
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(config.learning_rate, total_examples)
    return optax.chain(*links, adabatch.scale_by_example_schedule(schedule))
