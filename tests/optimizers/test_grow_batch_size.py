"""`grow_batch_size`: the parts are put together as the docstring says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax import grow_batch_size
from adabatch_jax.learning_rate import follow_batch_size, scaled_weight_decay
from tests.marks import slow

BASE, MICRO, LARGEST = 32, 8, 256
SIZES = dict(base_batch_size=BASE, max_batch_size=LARGEST, micro_batch_size=MICRO)
PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
MASK = {"kernel": True, "bias": False}
SCHEDULE = optax.cosine_decay_schedule(0.01, 100)


def run(optimizer, calls=100, noise=3.0):
    """Calls of gradients of length one and noise; state and the updates that were made."""

    def step(carry, key):
        params, state = carry
        keys = dict(zip(PARAMS, jax.random.split(key, 2), strict=True))
        grads = {k: 0.5 + noise * jax.random.normal(keys[k], p.shape) for k, p in params.items()}
        updates, state = optimizer.update(grads, state, params, value=jnp.float32(1.0))
        shown = adabatch.metrics(state)
        return (optax.apply_updates(params, updates), state), (shown, adabatch.has_updated(state))

    keys = jax.random.split(jax.random.key(0), calls)
    first = PARAMS, optimizer.init(PARAMS)
    (_, state), (shown, stepped) = jax.jit(lambda: jax.lax.scan(step, first, keys))()
    return state, {name: np.asarray(x)[np.asarray(stepped)] for name, x in shown.items()}


KINDS = {
    "adamw, a mask tree": (lambda: (optax.adamw, dict(mask=MASK)), 0.5),
    "momentum": (lambda: (optax.sgd, dict(momentum=0.9)), 1.0),
    "a chain that clips": (
        lambda: (
            lambda learning_rate: optax.chain(
                optax.clip(1.0), optax.adamw(learning_rate, mask=MASK)
            ),
            {},
        ),
        0.5,
    ),
    "a part frozen": (
        lambda: (
            lambda learning_rate: optax.partition(
                {"kernel": optax.lion(learning_rate), "bias": optax.set_to_zero()},
                {"kernel": "kernel", "bias": "bias"},
            ),
            {},
        ),
        0.5,
    ),
    "muon": (lambda: (optax.contrib.muon, {}), 0.5),
}


QUICK = ("adamw, a mask tree", "momentum")


@pytest.mark.parametrize("name", [*QUICK, *slow(*(name for name in KINDS if name not in QUICK))])
def test_the_schedule_is_read_by_examples_and_the_rate_follows_by_the_kind(name):
    make, power = KINDS[name]
    factory, options = make()
    optimizer = grow_batch_size(factory, learning_rate=SCHEDULE, **options, **SIZES)
    _, shown = run(optimizer)
    sizes = shown["batch_size"]
    assert sizes[0] == BASE < sizes[-1], "the batch grows"
    assert np.all(sizes % MICRO == 0)
    before = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    expected = [
        float(SCHEDULE(n / BASE)) * (b / BASE) ** power for n, b in zip(before, sizes, strict=True)
    ]
    np.testing.assert_allclose(shown["learning_rate"], expected, rtol=1e-5)
    assert np.all(sizes[1:] <= np.ceil(1.1 * sizes[:-1] / MICRO) * MICRO), (
        "a tenth a step, and no more"
    )


def test_without_noise_it_is_the_optimizer_itself():
    optimizer = grow_batch_size(optax.adamw, learning_rate=SCHEDULE, **SIZES)
    plain, params = optax.adamw(SCHEDULE), PARAMS
    state = plain.init(PARAMS)
    ours, moved, update = optimizer.init(PARAMS), PARAMS, jax.jit(optimizer.update)
    for _ in range(12):  # three batches of four equal gradients
        grads = jax.tree.map(jnp.ones_like, PARAMS)
        updates, ours = update(grads, ours, moved)
        moved = optax.apply_updates(moved, updates)
    for _ in range(3):
        updates, state = plain.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, params)
    assert adabatch.metrics(ours)["optimizer_steps"] == 3


def test_what_is_given_takes_the_place_of_what_is_found():
    given = dict(criterion=adabatch.coordinate_norm_test(2.0), scaling=lambda b, base: 1.0)
    optimizer = grow_batch_size(optax.sgd, learning_rate=0.5, **given, **SIZES)
    state, shown = run(optimizer, calls=40)
    assert state.gathered_noise.coordinate_scatter is not None
    np.testing.assert_array_equal(shown["learning_rate"], 0.5)


def test_a_function_as_criterion_and_a_second_schedule_that_the_factory_needs():
    def factory(learning_rate, weight_decay):
        return optax.adamw(learning_rate, weight_decay=weight_decay)

    decay = follow_batch_size(scaled_weight_decay(0.1), base_batch_size=BASE)
    optimizer = grow_batch_size(
        factory,
        learning_rate=SCHEDULE,
        weight_decay=decay,
        criterion=lambda noise: 2.0 * noise.num_examples,
        **SIZES,
    )
    _, shown = run(optimizer, calls=40)
    np.testing.assert_array_equal(shown["batch_size"][:3], [32, 40, 48])  # a tenth, in whole calls


def test_calls_that_tell_their_size():
    optimizer = grow_batch_size(optax.sgd, learning_rate=0.5, **SIZES | {"micro_batch_size": None})
    state, grads = optimizer.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    for tokens in (10, 30):
        _, state = optimizer.update(grads, state, PARAMS, num_examples=tokens)
    shown = adabatch.metrics(state)
    assert shown["num_examples"] == 40 and shown["optimizer_steps"] == 1


def test_bad_arguments_are_refused_before_there_are_parameters():
    with pytest.raises(ValueError, match="grow_batch_size: adamw was given no learning_rate="):
        grow_batch_size(optax.adamw, **SIZES)
    with pytest.raises(ValueError, match="grow_batch_size: optimizer_factory must be callable"):
        grow_batch_size(optax.sgd(0.1), learning_rate=0.1, **SIZES)
    with pytest.raises(ValueError, match="scaling must be callable, got 'sqrt'"):
        grow_batch_size(optax.sgd, learning_rate=0.1, scaling="sqrt", **SIZES)
    with pytest.raises(ValueError, match="max_batch_size"):
        grow_batch_size(optax.sgd, learning_rate=0.1, **SIZES | {"max_batch_size": 16})
