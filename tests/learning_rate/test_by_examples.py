"""`by_examples`: schedules at the examples so far, a rate that follows the batch, any factory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import by_examples, sqrt_scaling
from adabatch_jax.learning_rate import follow_batch_size, scaled_weight_decay
from tests.marks import slow

BASE = 64
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.zeros(3)}
OPTIONS = {"base_batch_size": BASE, "scaling": sqrt_scaling()}
MASK = {"w": True, "b": False}
SCHEDULE = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 3, 20)


def clipped(learning_rate):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, mask=MASK))


FACTORIES = {
    "adamw, its mask a function": lambda: (
        optax.adamw,
        dict(mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    ),
    "a chain of the user's own": lambda: (clipped, {}),
    "inject_hyperparams": lambda: (optax.inject_hyperparams(optax.adamw), {}),
    "inject_hyperparams within a chain": lambda: (
        lambda learning_rate: optax.chain(
            optax.clip(1.0), optax.inject_hyperparams(optax.sgd)(learning_rate, momentum=0.9)
        ),
        {},
    ),
    "muon": lambda: (optax.contrib.muon, {}),
    "adafactor": lambda: (optax.adafactor, {}),
}


def gradients(number):
    return jax.tree.map(lambda p: jnp.sin(number + jnp.arange(p.size).reshape(p.shape)), PARAMS)


def trained(optimizer, sizes, **extra):
    params, state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(optax.with_extra_args_support(optimizer).update)
    for number, size in enumerate(sizes):
        updates, state = update(gradients(number), state, params, num_examples=size, **extra)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    return params, state


QUICK = ("adamw, its mask a function", "inject_hyperparams within a chain")


@pytest.mark.parametrize(
    "name", [*QUICK, *slow(*(name for name in FACTORIES if name not in QUICK))]
)
def test_with_a_batch_that_stays_nothing_changes(name):
    factory, options = FACTORIES[name]()
    ours = by_examples(factory, base_batch_size=BASE)(learning_rate=SCHEDULE, **options)
    plain = factory(learning_rate=SCHEDULE, **options)
    expected, _ = trained(plain, [BASE] * 5)
    found, _ = trained(ours, [BASE] * 5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_schedule_is_read_at_the_examples_and_scaled_by_the_batch():
    ours = by_examples(optax.sgd, base_batch_size=BASE, scaling=sqrt_scaling())(SCHEDULE, 0.9)
    sizes = [64, 256, 64, 1024]
    rates = []
    state = ours.init(PARAMS)
    for size in sizes:
        _, state = ours.update(PARAMS, state, num_examples=size)
        rates.append(float(state.hyperparams["learning_rate"]))
    before = np.cumsum([0, *sizes])[:-1]
    expected = [SCHEDULE(n / BASE) * (b / BASE) ** 0.5 for n, b in zip(before, sizes, strict=True)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_a_constant_rate_and_one_by_default_follow_the_batch_too():
    for options in ({"learning_rate": 0.25}, {}):
        ours = by_examples(lambda learning_rate=0.25: optax.sgd(learning_rate), **OPTIONS)(
            **options
        )
        update, _ = ours.update(jnp.ones(2), ours.init(jnp.ones(2)), num_examples=4 * BASE)
        np.testing.assert_array_equal(update, [-0.5, -0.5])


def test_a_schedule_over_whole_steps_and_one_with_a_state_of_its_own():
    table = jnp.array([1.0, 0.5, 0.25])
    decay = follow_batch_size(scaled_weight_decay(0.5), base_batch_size=BASE)
    ours = by_examples(
        lambda learning_rate, weight_decay: optax.chain(
            optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay),
            optax.sgd(learning_rate),
        ),
        base_batch_size=BASE,
    )(learning_rate=lambda step: table[step], weight_decay=decay)
    one, state = jnp.ones(()), ours.init(jnp.ones(()))
    taken = []
    for size in (96, 64):  # the second step begins at 1.5
        update, state = ours.update(0.0 * one, state, one, num_examples=size)
        taken.append(float(update))
    assert taken == [-1.0 * 0.5 * 96 / 64, -0.5 * 0.5]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_updates_keep_a_narrow_dtype(dtype):
    params = jnp.ones(3, dtype)
    ours = by_examples(optax.sgd, **OPTIONS)(learning_rate=SCHEDULE)
    with jax.numpy_dtype_promotion("strict"):
        update, _ = ours.update(params, ours.init(params), params, num_examples=BASE)
    assert update.dtype == dtype


def test_a_mask_is_no_schedule_and_a_rate_must_be_one():
    with pytest.raises(ValueError, match=r"learning_rate=.* is no schedule"):
        by_examples(optax.sgd, base_batch_size=BASE)(lambda step: step > 3)
    with pytest.raises(ValueError, match="<lambda> was given no learning_rate="):
        by_examples(lambda: optax.sgd(0.1), **OPTIONS)()
    with pytest.raises(ValueError, match="base_batch_size must be a positive number, got 0"):
        by_examples(optax.sgd, base_batch_size=0)
    with pytest.raises(ValueError, match="optimizer_factory must be callable"):
        by_examples(optax.sgd(0.1), base_batch_size=64)
    ours = by_examples(optax.sgd, base_batch_size=64)(SCHEDULE)
    with pytest.raises(ValueError, match="by_examples counts examples: pass noise="):
        ours.update(PARAMS, ours.init(PARAMS))


def test_a_rate_given_to_inject_hyperparams_and_besides_is_refused():
    def both(learning_rate):
        injected = optax.inject_hyperparams(optax.scale)(step_size=learning_rate)
        return optax.chain(injected, optax.scale_by_learning_rate(learning_rate))

    ours = by_examples(both, base_batch_size=BASE)(learning_rate=SCHEDULE)
    with pytest.raises(ValueError, match=r"leave optax\.inject_hyperparams out of the factory"):
        ours.update(PARAMS, ours.init(PARAMS), num_examples=BASE)
