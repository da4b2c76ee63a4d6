"""Optimizers, criteria and schedules by name: the built-in ones, and one's own."""

import re

import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax.cli import main
from adabatch_jax.training import (
    TrainConfig,
    _registry,
    build_criterion,
    register_criterion,
    register_optimizer,
    register_schedule,
    resolve,
    run_steps,
)
from adabatch_jax.training._options import choices
from adabatch_jax.training.data import load_dataset

TABLES = {"optimizer": "OPTIMIZERS", "criterion": "CRITERIA", "schedule": "SCHEDULES"}


@pytest.fixture(autouse=True)
def as_before():
    """What a test registers is gone after it."""
    before = {table: dict(getattr(_registry, table)) for table in TABLES.values()}
    yield
    for table, entries in before.items():
        getattr(_registry, table).clear()
        getattr(_registry, table).update(entries)


def halved(learning_rate, total_examples):
    return optax.linear_schedule(learning_rate, learning_rate / 2, total_examples)


def test_what_is_registered_trains():
    register_optimizer("my-lion", optax.scale_by_lion, learning_rate=0.02, momentum=0.9)
    register_criterion("strict", lambda eta: adabatch.norm_test(eta), thresholds={"eta": 0.5})
    register_schedule("halved", halved)
    config = TrainConfig(
        model="logistic",
        optimizer="my-lion",
        criterion="strict",
        schedule="halved",
        scaling="none",
        epochs=1,
    )
    rows = []
    run_steps(config, load_dataset("digits"), rows.append)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["batch_size"] > rows[0]["batch_size"]
    assert rows[0]["learning_rate"] == pytest.approx(0.02)
    assert rows[-1]["learning_rate"] < 0.016
    options = resolve(config, 1437).options
    assert (options.learning_rate, options.eta) == (0.02, 0.5)


def test_thresholds_and_measurements_are_those_of_the_criterion():
    def made(**thresholds):
        return adabatch.augmented_inner_product_test(**thresholds)

    register_criterion("mine", made, thresholds={"theta": 0.5, "nu": 2.0}, inner_products=True)
    plan = resolve(TrainConfig(criterion="mine", nu=3.0), 1437)
    assert plan.thresholds == {"theta": 0.5, "nu": 3.0} and plan.criterion.inner_products
    assert isinstance(build_criterion(plan), adabatch.batch_size.Criterion)
    with pytest.raises(ValueError, match="--criterion mine does not read --eta"):
        TrainConfig(criterion="mine", eta=0.5)


def test_auto_takes_a_registered_optimizer():
    register_optimizer("mine", optax.scale_by_adam, learning_rate=1e-3)
    assert resolve(TrainConfig(optimizer="mine", auto=True), 1437).options.learning_rate is None


def test_the_command_offers_what_is_built_in(capsys):
    register_optimizer("mine", optax.scale_by_adam, learning_rate=1e-3)
    for name, table in TABLES.items():
        offered = set(choices(TrainConfig)[name])
        assert offered == _registry._BUILT_IN[name] <= set(getattr(_registry, table))
    assert "mine" in _registry.OPTIMIZERS
    assert main(["train", "--optimizer", "adamax"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("adabatch-jax: train: --optimizer must be one of adadagrad, ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (
            lambda: register_optimizer("adam", optax.scale_by_adam, learning_rate=1.0),
            "register_optimizer: name must not be one that is built in, got 'adam'",
        ),
        (
            lambda: register_optimizer("", optax.scale_by_adam, learning_rate=1.0),
            "register_optimizer: name must be a text, got ''",
        ),
        (
            lambda: register_optimizer("x", optax.scale_by_adam, learning_rate=0.0),
            "register_optimizer: learning_rate must be a positive number, got 0.0",
        ),
        (
            lambda: register_optimizer("x", optax.scale_by_adam(), learning_rate=1.0),
            "register_optimizer: direction must be callable",
        ),
        (
            lambda: register_criterion("x", adabatch.norm_test(1.0), thresholds={"size": 1.0}),
            "register_criterion: thresholds must be one of eta, theta, nu, got 'size'",
        ),
        (
            lambda: register_criterion("norm", adabatch.norm_test),
            "register_criterion: name must not be one that is built in, got 'norm'",
        ),
        (
            lambda: register_schedule("x", 0.1),
            "register_schedule: schedule must be callable, got 0.1",
        ),
    ],
)
def test_a_bad_entry_is_named(register, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        register()
