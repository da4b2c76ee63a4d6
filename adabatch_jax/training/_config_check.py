"""What is wrong with a configuration, said before anything is loaded, in the words of the command.

An option that has no effect beside the others is not taken and forgotten: it is refused, unless it says
what is the case anyway.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adabatch_jax import _validate
from adabatch_jax.training._options import (
    FIRST_BATCH_SIZE,
    LARGEST_BATCH_SIZE,
    choices,
    flag,
    said,
    spelled,
)
from adabatch_jax.training._registry import (
    CRITERIA,
    OPTIMIZERS,
    SCHEDULES,
    THRESHOLDS,
    CurvatureOptimizer,
)

# Options whose choices a program may add to.
_REGISTERED: dict[str, Mapping[str, Any]] = {
    "optimizer": OPTIMIZERS,
    "criterion": CRITERIA,
    "schedule": SCHEDULES,
}
_POSITIVE = ("eta", "theta", "nu", "learning_rate")
_COUNTS = (
    "noise_groups",
    "initial_batch_size",
    "max_batch_size",
    "max_micro_batch_size",
    "curvature_examples",
    "refresh_every",
    "epochs",
    "steps_per_call",
    "checkpoint_every",
    "keep",
    "devices",
    "num_processes",
    "patience",
)


def check_config(config: Any) -> None:
    """Every field by itself, then those that depend on each other.

    Args:
      config: a `TrainConfig`.

    Raises:
      ValueError: naming the option, its value, and what it contradicts.
    """
    given = {k: v for k, v in vars(config).items() if v is not None}
    for name, values in choices(config.__class__).items():
        if name in given:
            known = tuple(_REGISTERED.get(name, values))
            _validate.one_of("train", known, **flag(name, given[name]))
    for name in _POSITIVE:
        if name in given:
            _validate.positive("train", **flag(name, given[name]))
    for name in _COUNTS:
        if name in given:
            _validate.positive_int("train", **flag(name, given[name]))
    for name in ("seed", "lag"):
        _validate.between("train", 0, 2**32, **flag(name, given[name]))
    if config.noise_groups < 2:
        raise ValueError(f"train: --noise-groups must be at least 2, got {config.noise_groups}")
    if "smoothing" in given:
        _validate.between("train", 0.0, 1.0, **flag("smoothing", config.smoothing))
    if "growth_limit" in given and not config.growth_limit > 1:
        raise ValueError(f"train: --growth-limit must exceed 1, got {config.growth_limit}")
    _check_rate(config)
    _check_test(config)
    _check_sizes(config)
    _check_processes(config)
    _check_data(config)


def _refuse(config: Any, reason: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            raise ValueError(f"train: {reason}, leave out {said(name, value)}")


def _check_rate(config: Any) -> None:
    """No learning rate, or rule for it, beside one that is found."""
    if config.auto:
        _refuse(config, "--auto decides by itself", "learning_rate", "schedule", "scaling")
        if config.criterion == "none":
            _refuse(config, "--auto decides by itself", "criterion")
    if config.searches_rate:
        reason = f"--schedule {config.schedule} finds the learning rate"
        _refuse(config, reason, "learning_rate")
    by_curvature = [k for k, v in OPTIMIZERS.items() if isinstance(v, CurvatureOptimizer)]
    if config.optimizer in by_curvature:
        found = f"{said('optimizer', config.optimizer)} finds the learning rate"
        scaled = [] if config.scaling == "none" else ["scaling"]
        _refuse(config, found, "learning_rate", *scaled)
        if config.auto:
            _refuse(config, found, "auto")
        if config.searches_rate:
            _refuse(config, found, "schedule")
    if not config.measures_curvature:
        told = said("optimizer", " or ".join(by_curvature))
        needs = f"only {told} and --scaling random-matrix measure the curvature"
        _refuse(config, needs, "curvature_examples", "refresh_every")


def _check_test(config: Any) -> None:
    """No option of a test that is not made, and none with which it could never ask for more."""
    for name in THRESHOLDS:
        criteria = [k for k, test in CRITERIA.items() if test and name in test.thresholds]
        if config.criterion not in criteria:
            others = f"{' and '.join(criteria)} {'do' if criteria[1:] else 'does'}"
            reason = f"--criterion {config.criterion} does not read {spelled(name)} ({others})"
            _refuse(config, reason, name)
    if config.criterion == "none":
        debias = ["debias"] if config.debias else []
        kept = "--criterion none makes no test"
        _refuse(config, kept, "smoothing", "growth_limit", *debias)
    test = CRITERIA[config.criterion]
    if test is not None and test.debiased and config.debias is False:
        told = said("criterion", config.criterion)
        _refuse(config, f"{told} is de-biased by definition", "debias")
    thresholds, (ema_decay, debias) = config.thresholds, config.averaging
    if ema_decay and not debias and thresholds and min(thresholds.values()) >= 1:
        told = ", ".join(
            said(k, v) + (" by default" if getattr(config, k) is None else "")
            for k, v in thresholds.items()
        )
        averages = said("smoothing", ema_decay)
        averages += " (by default with --auto)" if config.smoothing is None else ""
        raise ValueError(
            f"train: {averages} without --debias could never enlarge the batch where the threshold is 1 "
            f"or more ({told}): "
            + ("leave out --no-debias" if config.debias is False else "give --debias, too")
        )


def _check_sizes(config: Any) -> None:
    given = config.initial_batch_size, config.max_batch_size
    first, largest = given
    if not config.auto:  # with --auto the sizes left out depend on the data
        first = first or FIRST_BATCH_SIZE
        largest = largest or (first if config.criterion == "none" else LARGEST_BATCH_SIZE)
    if largest and largest > 2**30:
        raise ValueError(f"train: --max-batch-size must be at most 2**30, got {largest}")
    if first and largest:
        check_order(first, largest, given)
    if first and first < 2 and config.criterion != "none":
        raise ValueError(
            "train: --initial-batch-size must be at least 2 for the noise of a gradient to be "
            f"seen, got {first}"
        )
    if config.criterion == "none" and given[1] not in (None, first):
        _refuse(config, f"--criterion none keeps the batch at {first}", "max_batch_size")


def check_order(first: int, largest: int, given: tuple[Any, Any], when: str = "") -> None:
    """The first batch must not exceed the largest.

    Args:
      first: the first batch size.
      largest: the largest.
      given: both as they were given; None for one that is a default, and is called one.
      when: added to the word default.

    Raises:
      ValueError: it does.
    """
    if first <= largest:
        return
    small, large = f"--initial-batch-size {first}", f"--max-batch-size {largest}"
    if given[0] is None:
        raise ValueError(
            f"train: {large} is below the first batch, {first} by default{when}: give "
            "--initial-batch-size, too"
        )
    if given[1] is None:
        raise ValueError(
            f"train: {small} exceeds the largest batch, {largest} by default{when}: give "
            "--max-batch-size, too"
        )
    raise ValueError(f"train: {small} exceeds {large}")


def _check_processes(config: Any) -> None:
    """All of --coordinator, --num-processes and --process-id, or none."""
    by_hand = ("coordinator", "num_processes", "process_id")
    given = [name for name in by_hand if getattr(config, name) is not None]
    if config.distributed is not None and given:
        _refuse(config, "--distributed auto finds it by itself", *by_hand)
    if given and len(given) < len(by_hand):
        missing = ", ".join(spelled(name) for name in by_hand if name not in given)
        raise ValueError(f"train: {spelled(given[0])} needs {missing}, too")
    if config.distributed is None and not given:
        _refuse(config, "one process alone waits for no other", "patience")
    if config.process_id is not None:
        number = config.num_processes or 1
        _validate.between("train", 0, number, **flag("process_id", config.process_id))
    if config.coordinator is not None and not re.fullmatch(r".+:\d+", config.coordinator):
        raise ValueError(f"train: --coordinator must be HOST:PORT, got {config.coordinator!r}")


def _check_data(config: Any) -> None:
    """Where the data are, and a model that can read them."""
    text = config.dataset == "text"
    if text and config.data_file is None:
        raise ValueError("train: --dataset text needs --data-file")
    if not text and config.data_file is not None:
        raise ValueError(f"train: --data-file has no meaning for --dataset {config.dataset}")
    if config.data_dir is not None and config.dataset in ("digits", "text"):
        raise ValueError(f"train: --data-dir has no meaning for --dataset {config.dataset}")
    if text != (config.model == "transformer"):
        raise ValueError(
            f"train: --model {config.model} does not read --dataset {config.dataset}: text goes with "
            "transformer, images with the others"
        )
