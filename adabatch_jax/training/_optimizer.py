"""From the plan of a run to its optimizer: controller, direction, scaling, learning rate."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import optax

import adabatch_jax as adabatch
from adabatch_jax.learning_rate import quasisep_smoother
from adabatch_jax.training._plan import RunPlan
from adabatch_jax.training._registry import CurvatureOptimizer, Direction


def build_criterion(plan: RunPlan) -> adabatch.batch_size.Criterion | None:
    """The criterion of a run; None for a constant batch."""
    return None if plan.criterion is None else plan.criterion.make(**plan.thresholds)


def build_optimizer(
    plan: RunPlan, *, warmup_over: bool = False
) -> optax.GradientTransformationExtraArgs:
    """The whole chain. A constant batch is a controller that starts at its maximum.

    Args:
      plan: of the run.
      warmup_over: with `auto`: for steps that come after the warm-up, see `quasisep_smoother`.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` reads `noise=` and `value=`; where the
      curvature is measured, also `value_fn=`, `loss_fn=` and `groups=`.

    Raises:
      ValueError: the run is too short for AutoWU.
    """
    if isinstance(plan.optimizer, CurvatureOptimizer):
        link = plan.optimizer.make(**_refreshes(plan), seed=plan.seed)
        share = adabatch.scale_by_example_schedule(plan.rate, flip_sign=False)
        return optax.chain(_controller(plan), link, share)
    direction = plan.optimizer.make()
    if plan.auto:
        return _automatic(direction, plan, warmup_over)
    links = [_controller(plan), direction, *_scaling(plan.optimizer, plan)]
    if plan.search is not None:
        with _in_options(f"--schedule {plan.options.schedule}", plan):
            return plan.search.make(
                links,
                direction,
                total_examples=plan.total_examples,
                examples_per_epoch=plan.num_examples,
                initial_batch_size=plan.initial_batch_size,
            )
    return optax.chain(*links, adabatch.scale_by_example_schedule(plan.rate))


def _automatic(
    direction: optax.GradientTransformation, plan: RunPlan, warmup_over: bool
) -> optax.GradientTransformationExtraArgs:
    with _in_options("--auto", plan):
        return adabatch.automatic(
            direction,
            total_examples=plan.total_examples,
            initial_batch_size=plan.initial_batch_size,
            max_batch_size=plan.max_batch_size,
            criterion=build_criterion(plan),
            autowu_options={"smoother": quasisep_smoother(warmup_over=warmup_over)},
            ema_decay=plan.ema_decay,
            debias=plan.debias,
            growth_limit=plan.growth_limit,
        )


def _controller(plan: RunPlan) -> optax.GradientTransformationExtraArgs:
    criterion = build_criterion(plan)
    return adabatch.adapt_batch_size(
        criterion or adabatch.norm_test(1.0),
        initial_batch_size=plan.initial_batch_size,
        max_batch_size=plan.initial_batch_size if criterion is None else plan.max_batch_size,
        ema_decay=plan.ema_decay,
        debias=plan.debias,
        growth_limit=plan.growth_limit,
    )


def _scaling(optimizer: Direction, plan: RunPlan) -> list[optax.GradientTransformationExtraArgs]:
    """The link that lets the learning rate follow the batch size, if there is one."""
    first = plan.initial_batch_size
    rules = {"linear": adabatch.linear_scaling, "sqrt": adabatch.sqrt_scaling}
    if plan.scaling in rules:
        return [adabatch.scale_by_batch_size(rules[plan.scaling](), base_batch_size=first)]
    if plan.scaling == "none":
        return []
    link = adabatch.scale_by_random_matrix(
        base_batch_size=first,
        adaptive=optimizer.adaptive,
        momentum=optimizer.momentum,
        dataset_size=plan.num_examples,
        seed=plan.seed,
        **_refreshes(plan),
    )
    return [link]


def _refreshes(plan: RunPlan) -> dict[str, Any]:
    """When the curvature is measured."""
    return {"refresh_every": plan.refresh_every, "refresh_unit": "example"}


@contextlib.contextmanager
def told_already() -> Iterator[None]:
    """Keeps back what the library warns of in its own words: the caller has said it in the command's."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        yield


@contextlib.contextmanager
def _in_options(what: str, plan: RunPlan) -> Iterator[None]:
    """What a schedule refuses, with the options that decide about its length before it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"train: {what} with --epochs {plan.epochs} and --initial-batch-size "
            f"{plan.initial_batch_size}: {error}"
        ) from error
