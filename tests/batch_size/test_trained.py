"""Frozen parameters: found in what the optimizer does, and left out of noise, test and noise scale."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from tests.marks import slow

PARAMS = {"frozen": jnp.ones((2, 3)), "one": jnp.ones(()), "trained": jnp.ones(4)}
MASK = {"frozen": True, "one": False, "trained": False}
LABELS = {"frozen": "f", "one": "t", "trained": "t"}


def parts(direction):
    return optax.partition({"t": direction, "f": optax.set_to_zero()}, LABELS)


FREEZING = {
    "partition": parts(optax.sgd(0.1)),
    "partition around adamw": parts(optax.adamw(0.1, weight_decay=0.1)),
    "masked, behind": optax.chain(optax.adam(0.1), optax.masked(optax.set_to_zero(), MASK)),
    "freeze": optax.chain(optax.adam(0.1), optax.transforms.freeze(MASK)),
    "selective_transform": optax.transforms.selective_transform(optax.adam(0.1), freeze_mask=MASK),
    "scaled afterwards": optax.chain(parts(optax.scale_by_adam()), optax.scale(-0.1)),
    "by a schedule": optax.chain(
        parts(optax.identity()), optax.scale_by_schedule(optax.linear_schedule(0.0, 1.0, 9))
    ),
    "apply_if_finite": optax.apply_if_finite(parts(optax.adam(0.1)), 3),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda learning_rate: parts(optax.sgd(learning_rate))
    )(learning_rate=0.1),
    "schedule_free": parts(optax.contrib.schedule_free_adamw(0.1)),
    "adaptive clip": optax.chain(optax.adaptive_grad_clip(1.0), parts(optax.sgd(0.1))),
    "a global clip before": optax.chain(optax.clip_by_global_norm(1.0), parts(optax.sgd(0.1))),
    "a global clip behind": optax.chain(parts(optax.sgd(0.1)), optax.clip_by_global_norm(1.0)),
    "accumulated": optax.MultiSteps(parts(optax.adam(0.1)), 3).gradient_transformation(),
    "automatic": adabatch.automatic(
        parts(optax.scale_by_adam()),
        total_examples=100_000,
        initial_batch_size=64,
        max_batch_size=256,
        scaling=adabatch.sqrt_scaling(),
    ),
}


@pytest.mark.parametrize("name", FREEZING)
def test_what_is_frozen_is_found_whatever_stands_around_it(name):
    found = adabatch.trained_parameters(FREEZING[name], PARAMS)
    assert found == {"frozen": False, "one": True, "trained": True}


MOVING = {
    "sgd": optax.sgd(0.1),
    "a rate of zero": optax.sgd(0.0),
    "a warm-up from zero": optax.sgd(optax.linear_schedule(0.0, 0.1, 10)),
    "masked alone": optax.masked(optax.adam(0.1), MASK),
    "lion": optax.lion(0.1),
    "adafactor": optax.adafactor(0.1),
    "muon": optax.contrib.muon(0.1),
    "lbfgs": optax.scale_by_lbfgs(),
    "weight decay alone": optax.chain(optax.set_to_zero(), optax.add_decayed_weights(0.1)),
    "adagrad": adabatch.adadagrad(
        0.1, criterion=adabatch.norm_test(1.0), initial_batch_size=8, max_batch_size=64
    ),
}


@pytest.mark.parametrize("name", MOVING)
def test_what_moves_is_not_taken_for_frozen(name):
    found = adabatch.trained_parameters(MOVING[name], PARAMS)
    assert found == dict.fromkeys(PARAMS, True)


def test_the_drop_in_itself_can_be_asked_and_shapes_suffice():
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    found = adabatch.trained_parameters(wrap(parts(optax.sgd(0.1))), shapes)
    assert found == {"frozen": False, "one": True, "trained": True}


def wrap(direction, criterion=None, before=(), **options):
    controller = adabatch.adapt_batch_size(
        criterion or adabatch.norm_test(0.5), initial_batch_size=16, max_batch_size=4096
    )
    chain = optax.chain(*before, controller, direction)
    return adabatch.adaptive_multi_steps(chain, micro_batch_size=4, **options)


def draw(calls=12, seed=0):
    """Gradients whose frozen part is all noise."""
    rng = np.random.default_rng(seed)
    return {
        "frozen": 50 * rng.normal(size=(calls, 2, 3)).astype(np.float32),
        "one": rng.normal(1.0, 0.5, calls).astype(np.float32),
        "trained": rng.normal(1.0, 0.5, (calls, 4)).astype(np.float32),
    }


def run(optimizer, gradients, params):
    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        shown = adabatch.metrics(state)
        kept = (
            adabatch.get_batch_size(state),
            shown["noise_numerator"],
            shown["noise_denominator"],
        )
        return (params, state), kept

    start = (params, optimizer.init(params))
    (params, state), seen = jax.jit(lambda g: jax.lax.scan(step, start, g))(gradients)
    return params, state, seen


def trained_alone(tree):
    return {k: v for k, v in tree.items() if k != "frozen"}


@pytest.mark.parametrize("criterion", ["coordinates", *slow("norm")])
def test_noise_and_batch_are_those_of_the_trained_part_by_itself(criterion):
    test, options = adabatch.norm_test(0.1), {}
    if criterion == "coordinates":
        test, options = adabatch.coordinate_norm_test(0.1, quantile=0.5), {"coordinate_wise": True}
    gradients = draw()
    whole = run(wrap(parts(optax.sgd(0.1)), test, **options), gradients, PARAMS)
    alone = run(
        wrap(optax.sgd(0.1), test, **options), trained_alone(gradients), trained_alone(PARAMS)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole[2], alone[2])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), trained_alone(whole[0]), alone[0]
    )
    np.testing.assert_array_equal(whole[0]["frozen"], PARAMS["frozen"])
    assert int(whole[2][0][-1]) > 16  # a test was made


def test_a_nan_in_the_gradient_of_a_frozen_parameter_does_not_stop_training():
    gradients = draw()
    clean = run(wrap(parts(optax.adam(0.1))), gradients, PARAMS)
    gradients["frozen"][:] = np.nan
    spoilt = run(wrap(parts(optax.adam(0.1))), gradients, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, spoilt[0], clean[0])
    assert int(spoilt[1].skipped_micro_batches) == 0


def test_a_frozen_gradient_that_a_global_norm_reads_is_read_and_still_no_noise():
    """As in `optax.MultiSteps`, the clip sees all of the gradient; a NaN there is skipped."""
    clip, gradients = (optax.clip_by_global_norm(0.1),), draw(4)
    whole = run(wrap(parts(optax.sgd(1.0)), before=clip), gradients, PARAMS)
    mean = jax.tree.map(lambda g: g.mean(0), gradients)
    norm = float(optax.tree.norm(mean))
    np.testing.assert_allclose(whole[0]["one"], 1 - 0.1 / norm * mean["one"], rtol=1e-5)
    alone = run(wrap(optax.sgd(1.0)), trained_alone(gradients), trained_alone(PARAMS))
    np.testing.assert_allclose(whole[2][1][-1], alone[2][1][-1], rtol=1e-5)
    gradients["frozen"][1] = np.nan
    spoilt = run(wrap(parts(optax.sgd(1.0)), before=clip), gradients, PARAMS)
    assert int(spoilt[1].skipped_micro_batches) == 1


def test_fused_the_mask_leaves_the_frozen_part_out():
    mask = adabatch.trained_parameters(parts(optax.sgd(0.1)), PARAMS)
    groups = {k: v.reshape(3, 4, *v.shape[1:]) for k, v in draw().items()}

    def loss(params, group):
        terms = jax.tree.map(lambda p, x: jnp.mean(jnp.sum(p[None] * x)), params, group)
        return sum(jax.tree.leaves(terms))

    _, noise = adabatch.value_and_grad_noise(loss, trained=mask)(PARAMS, groups)
    _, alone = adabatch.value_and_grad_noise(loss)(trained_alone(PARAMS), trained_alone(groups))
    np.testing.assert_allclose(noise.trace, alone.trace, rtol=1e-5)
    assert not np.any(noise.mean["frozen"])
