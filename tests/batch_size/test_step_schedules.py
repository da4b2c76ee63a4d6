"""Schedules that count steps are found inside `adaptive_multi_steps`, wherever they stand."""

import warnings

import jax.numpy as jnp
import optax
import pytest

from adabatch_jax import (
    adapt_batch_size,
    adaptive_multi_steps,
    by_examples,
    norm_test,
    scale_by_autowu,
    scale_by_example_schedule,
)

PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}
SCHEDULE = optax.linear_schedule(0.1, 0.0, 100)
COUNTS_STEPS = {
    "in the optimizer": lambda: optax.adamw(SCHEDULE),
    "within masked": lambda: optax.masked(optax.sgd(SCHEDULE), {"w": True, "b": False}),
    "within partition": lambda: optax.partition(
        {"w": optax.sgd(SCHEDULE), "b": optax.sgd(0.1)}, {"w": "w", "b": "b"}
    ),
    "under inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(SCHEDULE),
    "AutoWU": lambda: scale_by_autowu(total_steps=100, steps_per_test=10),
    "of a weight decay": lambda: optax.chain(
        optax.inject_hyperparams(optax.add_decayed_weights)(SCHEDULE), optax.sgd(0.1)
    ),
}
COUNTS_NONE = {
    "a constant": lambda: optax.inject_hyperparams(optax.adamw)(0.1),
    "examples": lambda: optax.chain(optax.scale_by_adam(), scale_by_example_schedule(SCHEDULE)),
    "AutoWU": lambda: scale_by_autowu(total_examples=1600, examples_per_test=160),
    "by_examples": lambda: by_examples(optax.adamw, base_batch_size=16)(SCHEDULE),
}


def wrapped(optimizer, largest=64):
    control = adapt_batch_size(norm_test(1.0), initial_batch_size=16, max_batch_size=largest)
    return adaptive_multi_steps(optax.chain(control, optimizer), micro_batch_size=8)


@pytest.mark.parametrize("name", COUNTS_STEPS)
def test_one_that_counts_steps_is_told_with_the_remedy(name):
    with pytest.warns(
        UserWarning, match=r"counts optimizer steps .*inner_state|\[1\].*by_examples"
    ) as told:
        wrapped(COUNTS_STEPS[name]()).init(PARAMS)
    assert told[0].filename == __file__, "the warning points at the caller"


@pytest.mark.parametrize("name", COUNTS_NONE)
def test_what_counts_no_steps_is_left_in_peace(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(COUNTS_NONE[name]()).init(PARAMS)


def test_a_batch_that_cannot_change_has_as_many_steps_as_planned():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(optax.adamw(SCHEDULE), largest=16).init(PARAMS)
