"""The optimizers, criteria and schedules that a run can name. Each is named here and nowhere else.

The command offers those that are built in. `register_optimizer`, `register_criterion` and
`register_schedule` add others, which `TrainConfig` then takes by their name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import optax

import adabatch_jax as adabatch
from adabatch_jax import _validate
from adabatch_jax.learning_rate import LEAST_WARMUP_STEPS
from adabatch_jax.optimizers import adagrad_direction

Transformation: TypeAlias = optax.GradientTransformation
Rate: TypeAlias = float | optax.Schedule  # a schedule counts examples

HINT = "Try a smaller learning rate"


@dataclass(frozen=True)
class Direction:
    """An optimizer whose learning rate is given, or found by a schedule.

    Args:
      make: builds the update direction, before sign and learning rate.
      learning_rate: the default, at the first batch size of 16.
      momentum: decay of its average of gradients, for `--scaling random-matrix`.
      adaptive: it divides by a size of the gradients, for `--scaling random-matrix`.
    """

    make: Callable[[], Transformation]
    learning_rate: float
    momentum: float = 0.0
    adaptive: bool = True


@dataclass(frozen=True)
class CurvatureOptimizer:
    """An optimizer that sets learning rate and momentum by the curvature.

    Args:
      make: builds the link, `make(*, refresh_every, refresh_unit, seed)`.
    """

    make: Callable[..., Transformation]


@dataclass(frozen=True)
class BatchSizeTest:
    """A criterion, and what it needs.

    Args:
      make: builds the criterion from its thresholds, by name.
      thresholds: the thresholds that it reads ("eta", "theta", "nu"), with their defaults.
      coordinate_wise: the step must measure what the coordinate-wise test needs.
      inner_products: the step must measure what the inner-product tests need.
      debiased: it takes the noise out of the squared gradient norm by definition.
    """

    make: Callable[..., adabatch.batch_size.Criterion]
    thresholds: Mapping[str, float] = field(default_factory=dict)
    coordinate_wise: bool = False
    inner_products: bool = False
    debiased: bool = False


@dataclass(frozen=True)
class RateSearch:
    """A schedule that finds its learning rate in the first part of a run.

    Args:
      make: builds the optimizer around `links`, the controller, the direction and the scaling:
        `make(links, direction, *, total_examples, examples_per_epoch, initial_batch_size)`.
      part: of the run, at most, that goes into the search.
      least_steps: of the first batch size that the search takes.
      hint: what to try where the loss stays not finite.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    part: float
    least_steps: int = LEAST_WARMUP_STEPS
    hint: str = HINT


def _autowu(
    links: Sequence[Transformation],
    direction: Transformation,
    *,
    total_examples: int,
    examples_per_epoch: int,
    initial_batch_size: int,
) -> optax.GradientTransformationExtraArgs:
    link = adabatch.scale_by_autowu(
        total_examples=total_examples,
        examples_per_test=examples_per_epoch,  # as in the paper
        initial_batch_size=initial_batch_size,
    )
    return optax.chain(*links, link)


def _improved_autowu(
    links: Sequence[Transformation],
    direction: Transformation,
    *,
    total_examples: int,
    examples_per_epoch: int,
    initial_batch_size: int,
) -> optax.GradientTransformationExtraArgs:
    link = adabatch.scale_by_improved_autowu(
        total_examples=total_examples, initial_batch_size=initial_batch_size, direction=direction
    )
    return adabatch.return_to_minimum(optax.chain(*links, link))


# The rates are those at the first batch size of 16, from where the rate follows with the root of the batch.
# Cross-entropy on a quarter held out of the digits' training data, after ten epochs of a batch that grows
# to 512, by the rate: MLP, in brackets logistic regression, means of two seeds. About half of the best, so
# that there is room.
#   adadagrad       .01: .153 (.813)   .02: .116 (.494)   .04: .105 (.324)   .08: .103 (.237)
#   adadagrad-norm   .6: .264 (.381)     1: .200 (.299)     2: .144 (.235)     4: .120 (.191)
#   adam, adamw, adamp .002: .164 (.802)  .004: .139 (.446)  .008: .119 (.284)  .016: .119 (.205)
#   sgd              .1: .202 (.373)    .2: .147 (.270)    .4: .115 (.207)    .8: .894 (.168)
#   momentum        .01: .192 (.311)   .02: .165 (.231)   .04: .124 (.196)   .08: .171 (.209)
#   lamb           .005: .180 (1.20)   .01: .160 (.519)   .02: .230 (.215)   .04: .630 (.573)
OPTIMIZERS: dict[str, Direction | CurvatureOptimizer] = {
    "adadagrad": Direction(
        lambda: adagrad_direction(initial_accumulator_value=0.0, eps=1e-20), learning_rate=0.02
    ),
    "adadagrad-norm": Direction(adabatch.scale_by_adagrad_norm, learning_rate=2.0),
    "adamw": Direction(
        lambda: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4)),
        learning_rate=0.004,
        momentum=0.9,
    ),
    "adam": Direction(optax.scale_by_adam, learning_rate=0.004, momentum=0.9),
    "adamp": Direction(adabatch.optimizers.scale_by_adamp, learning_rate=0.004, momentum=0.9),
    "sgd": Direction(optax.identity, learning_rate=0.2, adaptive=False),
    "momentum": Direction(
        lambda: optax.trace(decay=0.9), learning_rate=0.02, momentum=0.9, adaptive=False
    ),
    "lamb": Direction(
        lambda: optax.chain(optax.scale_by_adam(eps=1e-6), optax.scale_by_trust_ratio()),
        learning_rate=0.01,
        momentum=0.9,
    ),
    "lanczos-sgd": CurvatureOptimizer(adabatch.scale_by_lanczos),
}

# None keeps the batch constant. coordinate-norm asks for more than norm at the same η. Ten epochs as above:
# norm 1: .116 after 90 steps; coordinate-norm 1: .151 after 29, 2: .123 after 41, 3: .123 after 60.
CRITERIA: dict[str, BatchSizeTest | None] = {
    "norm": BatchSizeTest(adabatch.norm_test, {"eta": 1.0}),
    "coordinate-norm": BatchSizeTest(
        adabatch.coordinate_norm_test, {"eta": 3.0}, coordinate_wise=True
    ),
    "inner-product": BatchSizeTest(
        adabatch.inner_product_test, {"theta": 0.9}, inner_products=True
    ),
    "augmented": BatchSizeTest(
        adabatch.augmented_inner_product_test, {"theta": 0.9, "nu": 5.84}, inner_products=True
    ),
    "noise-scale": BatchSizeTest(adabatch.gradient_noise_scale, debiased=True),
    "none": None,
}

# A function of the learning rate and of the examples in the run, or a search.
SCHEDULES: dict[str, Callable[[float, int], Rate] | RateSearch] = {
    "constant": lambda learning_rate, total_examples: learning_rate,
    "cosine": optax.cosine_decay_schedule,
    "autowu": RateSearch(
        _autowu,
        part=0.5,
        hint="Try --schedule autowu-improved, which goes back when the loss explodes",
    ),
    "autowu-improved": RateSearch(_improved_autowu, part=0.2),
}

THRESHOLDS = ("eta", "theta", "nu")
_BUILT_IN = {"optimizer": {*OPTIMIZERS}, "criterion": {*CRITERIA}, "schedule": {*SCHEDULES}}

if TYPE_CHECKING:  # a name that a user has registered is one, too
    OptimizerName: TypeAlias = str
    CriterionName: TypeAlias = str
    ScheduleName: TypeAlias = str
else:  # the command offers what is built in
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    CriterionName = Literal[tuple(CRITERIA)]
    ScheduleName = Literal[tuple(SCHEDULES)]


def register_optimizer(
    name: str,
    direction: Callable[[], Transformation],
    *,
    learning_rate: float,
    momentum: float = 0.0,
    adaptive: bool = True,
) -> None:
    """Lets `TrainConfig(optimizer=name)` train with an update direction of one's own.

    Args:
      name: by which a configuration names it; one that was registered before is replaced.
      direction: builds an Optax transformation, before sign and learning rate: `optax.scale_by_lion`,
        not `optax.lion(...)`.
      learning_rate: the default, at the first batch size, above 0.
      momentum: decay of its average of gradients, in [0, 1); for `scaling="random-matrix"`.
      adaptive: whether it divides by a size of the gradients; for `scaling="random-matrix"`.

    Raises:
      ValueError: `name` is built in, `direction` is not callable, or a number is out of its range.

    Example:
      >>> import optax
      >>> from adabatch_jax.training import TrainConfig, register_optimizer
      >>> register_optimizer("lion", optax.scale_by_lion, learning_rate=5e-4, momentum=0.9)
      >>> TrainConfig(optimizer="lion").optimizer
      'lion'
    """
    where = "register_optimizer"
    _check_name(where, name, _BUILT_IN["optimizer"])
    _validate.function(where, direction=direction)
    _validate.positive(where, learning_rate=learning_rate)
    _validate.between(where, 0.0, 1.0, momentum=momentum)
    OPTIMIZERS[name] = Direction(direction, learning_rate, momentum, adaptive)


def register_criterion(
    name: str,
    criterion: Callable[..., adabatch.batch_size.Criterion],
    *,
    thresholds: Mapping[str, float] | None = None,
    coordinate_wise: bool = False,
    inner_products: bool = False,
) -> None:
    """Lets `TrainConfig(criterion=name)` grow the batch by a test of one's own.

    Args:
      name: by which a configuration names it; one that was registered before is replaced.
      criterion: builds the `Criterion`; it is called with the thresholds by name.
      thresholds: those of "eta", "theta" and "nu" that it reads, with their defaults; None: none.
      coordinate_wise: whether it needs the statistics of the coordinate-wise test.
      inner_products: whether it needs those of the inner-product tests.

    Raises:
      ValueError: `name` is built in, `criterion` is not callable, or a threshold has another name.

    Example:
      >>> import adabatch_jax as adabatch
      >>> from adabatch_jax.training import TrainConfig, register_criterion
      >>> register_criterion("double-noise-scale", lambda: adabatch.gradient_noise_scale(2.0))
      >>> TrainConfig(criterion="double-noise-scale").criterion
      'double-noise-scale'
    """
    where = "register_criterion"
    _check_name(where, name, _BUILT_IN["criterion"])
    _validate.function(where, criterion=criterion)
    for threshold, value in (thresholds or {}).items():
        _validate.one_of(where, THRESHOLDS, thresholds=threshold)
        _validate.positive(where, **{threshold: value})
    CRITERIA[name] = BatchSizeTest(
        criterion, dict(thresholds or {}), coordinate_wise, inner_products
    )


def register_schedule(name: str, schedule: Callable[[float, int], Rate]) -> None:
    """Lets `TrainConfig(schedule=name)` use a schedule of one's own.

    Args:
      name: by which a configuration names it; one that was registered before is replaced.
      schedule: `schedule(learning_rate, total_examples)` gives the learning rate, or a function from
        examples processed to the learning rate.

    Raises:
      ValueError: `name` is built in, or `schedule` is not callable.

    Example:
      >>> import optax
      >>> from adabatch_jax.training import TrainConfig, register_schedule
      >>> def halved(learning_rate, total_examples):
      ...     return optax.linear_schedule(learning_rate, learning_rate / 2, total_examples)
      >>> register_schedule("halved", halved)
      >>> TrainConfig(schedule="halved").schedule
      'halved'
    """
    where = "register_schedule"
    _check_name(where, name, _BUILT_IN["schedule"])
    _validate.function(where, schedule=schedule)
    SCHEDULES[name] = schedule


def _check_name(where: str, name: Any, built_in: set[str]) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: name must be a text, got {name!r}")
    if name in built_in:
        raise ValueError(f"{where}: name must not be one that is built in, got {name!r}")
