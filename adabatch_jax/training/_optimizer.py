"""From a configuration to an optimizer: controller, direction, scaling, learning rate."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import optax

import adabatch_jax as adabatch
from adabatch_jax.optimizers import adagrad_direction
from adabatch_jax.training._config import TrainConfig

WITHOUT_MOMENTUM = ("adadagrad", "adadagrad-norm", "sgd")


def build_criterion(config: TrainConfig) -> adabatch.Criterion | None:
    """The criterion that a resolved configuration names; None for a constant batch."""
    makers: dict[str, Callable[[], adabatch.Criterion | None]] = {
        "norm": lambda: adabatch.norm_test(known(config.eta)),
        "coordinate-norm": lambda: adabatch.coordinate_norm_test(known(config.eta)),
        "inner-product": lambda: adabatch.inner_product_test(known(config.theta)),
        "augmented": lambda: adabatch.augmented_inner_product_test(
            known(config.theta), known(config.nu)
        ),
        "noise-scale": adabatch.gradient_noise_scale,
        "none": lambda: None,
    }
    return makers[config.criterion]()


def build_direction(name: str) -> optax.GradientTransformation:
    """The update direction, before sign and learning rate."""
    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adadagrad": lambda: adagrad_direction(initial_accumulator_value=0.0, eps=1e-20),
        "adadagrad-norm": adabatch.scale_by_adagrad_norm,
        "adam": optax.scale_by_adam,
        "adamp": adabatch.scale_by_adamp,
        "adamw": lambda: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4)),
        "sgd": optax.identity,
        "momentum": lambda: optax.trace(decay=0.9),
        "lamb": lambda: optax.chain(optax.scale_by_adam(eps=1e-6), optax.scale_by_trust_ratio()),
    }
    return makers[name]()


def known(value: Any) -> Any:
    """An option that `TrainConfig.resolved` has filled in."""
    assert value is not None, "the configuration is not resolved"
    return value


def build_optimizer(
    config: TrainConfig, total_examples: int, *, warmup_over: bool = False
) -> optax.GradientTransformationExtraArgs:
    """The whole chain. A constant batch is a controller that starts at its maximum.

    Args:
      config: the configuration.
      total_examples: the budget of the run, over which the schedule decays.
      warmup_over: with `auto`: for steps that come after the warm-up, see `scale_by_autowu`.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` reads `noise=` and `value=`; where the
      configuration measures the curvature, also `value_fn=`, `loss_fn=` and `groups=`.

    Raises:
      ValueError: the run is too short for AutoWU.
    """
    config = config.resolved(total_examples // config.epochs)
    first, largest = known(config.initial_batch_size), known(config.max_batch_size)
    if config.auto:
        with _in_options("--auto", config):
            return adabatch.automatic(
                build_direction(config.optimizer),
                total_examples=total_examples,
                initial_batch_size=first,
                max_batch_size=largest,
                criterion=build_criterion(config),
                autowu_options={"warmup_over": warmup_over},
                smoothing=config.smoothing,
                debias=bool(config.debias),
                growth_limit=config.growth_limit,
            )
    criterion = build_criterion(config)
    constant = criterion is None
    rules = {"linear": adabatch.linear_scaling, "sqrt": adabatch.sqrt_scaling}
    refreshes = {}
    if config.measures_curvature:
        refreshes = {"refresh_every": known(config.refresh_every), "refresh_unit": "example"}
    links = [
        adabatch.adapt_batch_size(
            criterion or adabatch.norm_test(1.0),
            initial_batch_size=first,
            max_batch_size=first if constant else largest,
            smoothing=config.smoothing,
            debias=bool(config.debias),
            growth_limit=config.growth_limit,
        )
    ]
    if config.optimizer == "lanczos-sgd":
        links.append(adabatch.scale_by_lanczos(**refreshes, seed=config.seed))
        decay = optax.cosine_decay_schedule(1.0, total_examples)
        share = decay if config.schedule == "cosine" else 1.0
        return optax.chain(*links, adabatch.scale_by_example_schedule(share, flip_sign=False))
    direction = build_direction(config.optimizer)
    links.append(direction)
    if config.scaling in rules:
        rule = rules[config.scaling]()
        links.append(adabatch.scale_by_batch_size(rule, base_batch_size=first))
    if config.scaling == "random-matrix":
        link = adabatch.scale_by_random_matrix(
            base_batch_size=first,
            adaptive=config.optimizer not in ("sgd", "momentum"),
            momentum=0.0 if config.optimizer in WITHOUT_MOMENTUM else 0.9,
            dataset_size=total_examples // config.epochs,
            seed=config.seed,
            **refreshes,
        )
        links.append(link)
    if config.schedule == "autowu":  # a test per epoch, as in the paper
        epoch = total_examples // config.epochs
        with _in_options("--schedule autowu", config):
            link = adabatch.scale_by_autowu(
                total_examples=total_examples, examples_per_test=epoch, initial_batch_size=first
            )
        return optax.chain(*links, link)
    if config.schedule == "autowu-improved":
        with _in_options("--schedule autowu-improved", config):
            link = adabatch.scale_by_improved_autowu(
                total_examples=total_examples, initial_batch_size=first, direction=direction
            )
        return adabatch.return_to_minimum(optax.chain(*links, link))
    schedule: float | optax.Schedule = known(config.learning_rate)
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(schedule, total_examples)
    return optax.chain(*links, adabatch.scale_by_example_schedule(schedule))


@contextlib.contextmanager
def told_already() -> Iterator[None]:
    """Keeps back what the library warns of in its own words: the caller has said it in the command's."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        yield


@contextlib.contextmanager
def _in_options(what: str, config: TrainConfig) -> Iterator[None]:
    """What a schedule refuses, with the options that decide about its length before it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"train: {what} with --epochs {config.epochs} and --initial-batch-size "
            f"{config.initial_batch_size}: {error}"
        ) from error
