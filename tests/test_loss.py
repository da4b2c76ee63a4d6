"""`loss=`, as some training libraries call it, does what `value=` does."""

import jax.numpy as jnp
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax.learning_rate import smoothed_losses


def heard():
    """A link that keeps the loss as it hears it by either name."""

    def update(updates, state, params=None, *, value=-1.0, loss=-1.0, **_):
        return updates, {"value": jnp.float32(value), "loss": jnp.float32(loss)}

    return optax.GradientTransformationExtraArgs(lambda _: {"value": 0.0, "loss": 0.0}, update)


def after_two_calls(*calls):
    """The batch size of CABS, and what a link inside heard, after a batch of two micro-batches."""
    controller = adabatch.adapt_batch_size(
        adabatch.cabs(1.0), initial_batch_size=8, max_batch_size=4096
    )
    optimizer = adabatch.adaptive_multi_steps(
        optax.chain(controller, heard(), optax.sgd(0.1)), micro_batch_size=4
    )
    params = jnp.zeros(2)
    state = optimizer.init(params)
    for gradient, call in zip(([30.0, 0.0], [10.0, 0.0]), calls, strict=True):
        _, state = optimizer.update(jnp.array(gradient), state, params, **call)
    return int(adabatch.get_batch_size(state)), state.inner_opt_state[1]


def test_a_drop_in_loop_takes_the_mean_of_either():
    size, told = after_two_calls({"loss": 1.0}, {"loss": 3.0})
    assert told == {"value": 2.0, "loss": 2.0}
    assert size == after_two_calls({"value": 1.0}, {"value": 3.0})[0] == 400  # 4 · 200 / 2


def test_value_is_the_loss_where_both_are_given():
    size, told = after_two_calls({"value": 1.0, "loss": 7.0}, {"value": 3.0, "loss": 9.0})
    assert size == 400 and told == {"value": 2.0, "loss": 9.0}


def test_autowu_follows_either():
    options = dict(total_steps=100, steps_per_test=10, smoother="as they are")
    link = adabatch.scale_by_autowu(**options)
    state = link.init({})
    for call in ({"loss": 3.0}, {"value": 2.0}, {"value": 1.0, "loss": 7.0}):
        _, state = link.update({}, state, **call)
    assert smoothed_losses(state).losses.tolist() == [3.0, 2.0, 1.0]
    with pytest.raises(ValueError, match="value=loss"):
        link.update({}, state)
