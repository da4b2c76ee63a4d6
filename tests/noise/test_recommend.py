"""`recommend_estimator`: the cheapest that is exact enough, by the models it states."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import split_groups, value_and_grad_noise
from adabatch_jax.noise import recommend_estimator, value_and_grad_signs


def test_micro_batches_that_are_there_anyway_cost_nothing():
    choice = recommend_estimator(
        1024, relative_standard_error=0.5, accumulation_steps=4, num_devices=4, divisible=False
    )
    assert choice == ("groups", 15, math.sqrt(2 / 15), 1.0, 1)


def test_groups_where_a_batch_can_be_split():
    choice = recommend_estimator(256, relative_standard_error=0.5)
    assert choice == ("groups", 15, math.sqrt(2 / 15), (256 + 22 * 16) / (256 + 22), 16)
    free = recommend_estimator(256, relative_standard_error=0.5, group_overhead=0.0)
    assert (free.estimator, free.relative_cost) == ("groups", 1.0)


def test_signs_where_it_cannot_or_is_small():
    choice = recommend_estimator(256, relative_standard_error=1.0, divisible=False)
    assert choice == ("signs", 2, 1.0, 1 + 4 / 3, 2)
    # Half of eight examples takes nearly as long as all of them.
    assert recommend_estimator(8, relative_standard_error=1.5).estimator == "signs"
    assert recommend_estimator(256, relative_standard_error=1.5).estimator == "groups"


def test_every_example_where_few_groups_are_not_enough():
    choice = recommend_estimator(256, relative_standard_error=0.09)
    assert choice[:3] == ("per_example", 255, math.sqrt(2 / 255))
    assert choice.number == 256
    assert recommend_estimator(256, relative_standard_error=0.01) == choice  # the most there is


def test_a_standard_error_that_is_just_reached_is_enough():
    for freedom in (8, 50, 200, 255):
        error = math.sqrt(2 / freedom)
        choice = recommend_estimator(256, relative_standard_error=error)
        assert choice.degrees_of_freedom >= freedom
        assert choice.relative_standard_error <= error
    choice = recommend_estimator(201, relative_standard_error=0.1, accumulation_steps=201)
    assert choice == ("groups", 200, 0.1, 1.0, 1)


def test_one_example_says_nothing_about_noise():
    choice = recommend_estimator(1, relative_standard_error=0.5)
    assert (choice.degrees_of_freedom, choice.relative_standard_error) == (0, math.inf)


@pytest.mark.parametrize("divisible", [True, False])
@pytest.mark.parametrize("error", [0.3, 0.9])
@pytest.mark.parametrize(("batch_size", "steps"), [(48, 1), (48, 6), (12, 4)])
def test_the_estimator_has_the_degrees_of_freedom_it_is_said_to_have(
    batch_size, steps, error, divisible
):
    choice = recommend_estimator(
        batch_size, relative_standard_error=error, accumulation_steps=steps, divisible=divisible
    )
    x, w = np.ones((batch_size, 2), np.float32), jnp.zeros(2)

    def losses_fn(w, x):
        return x @ w

    def measure():
        if choice.estimator == "signs":
            fn = value_and_grad_signs(losses_fn, num_signs=choice.number)
            return fn(w, split_groups(x, steps), jax.random.key(0))[1]
        fn = value_and_grad_noise(lambda w, x: jnp.mean(losses_fn(w, x)))
        return fn(w, split_groups(x, steps * choice.number))[1]

    noise = jax.jit(measure)()
    assert int(noise.num_groups) - 1 == choice.degrees_of_freedom
    best = batch_size - 1 if divisible else 0
    assert choice.relative_standard_error <= max(error, math.sqrt(2 / best) if best else math.inf)
    assert choice.relative_cost >= 1.0


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"relative_standard_error": 0.0}, "relative_standard_error must be a positive number"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"num_devices": 0}, "num_devices must be a positive integer, got 0"),
        ({"group_overhead": -1.0}, "group_overhead must lie in"),
        ({"accumulation_steps": 3}, r"batch_size=256 is not divisible by .* = 3"),
    ],
)
def test_bad_arguments_are_named(options, argument):
    arguments = {"batch_size": 256, "relative_standard_error": 0.5, **options}
    with pytest.raises(ValueError, match=argument):
        recommend_estimator(arguments.pop("batch_size"), **arguments)
