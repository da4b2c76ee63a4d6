"""`num_examples=`: what stands behind one call of the drop-in, in examples or tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 20, 8)).astype(np.float32)
TARGET = RNG.normal(size=(64, 20)).astype(np.float32)
LENGTHS = RNG.integers(1, 20, 64)
WEIGHT = (np.arange(20) < LENGTHS[:, None]).astype(np.float32)
TOKENS = int(WEIGHT.sum())
W = jnp.ones(8)


def loss(w, batch):
    """A mean over the tokens of sequences of unequal length."""
    x, target, weight = batch
    return (weight * (x @ w - target) ** 2).sum() / weight.sum()


def listener(heard):
    """A link that notes what it is told of the batch."""

    def update(updates, state, params=None, *, noise, num_examples, **extra_args):
        jax.debug.callback(
            lambda *x: heard.append(tuple(map(int, x))), noise.num_examples, num_examples
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def wrap(*links, initial=TOKENS, largest=1 << 20, micro_batch_size=None, eta=1.0, **options):
    controller = adabatch.adapt_batch_size(
        adabatch.norm_test(eta), initial_batch_size=initial, max_batch_size=largest, **options
    )
    chain = optax.chain(controller, *links)
    return adabatch.adaptive_multi_steps(chain, micro_batch_size=micro_batch_size)


def micro_batch(i, size=4):
    rows = slice(i, i + size)
    return X[rows], TARGET[rows], WEIGHT[rows]


def test_calls_weighted_by_tokens_add_up_to_the_gradient_of_the_batch():
    heard = []
    optimizer = wrap(listener(heard), optax.sgd(1.0))
    state = optimizer.init(W)

    @jax.jit
    def step(state, batch):
        value, gradient = jax.value_and_grad(loss)(W, batch)
        tokens = batch[2].sum()  # a float, as sums of weights are
        return optimizer.update(gradient, state, W, value=value, num_examples=tokens)

    for i in range(0, 64, 4):
        assert not bool(adabatch.has_updated(state))
        updates, state = step(state, micro_batch(i))
    jax.effects_barrier()
    whole, gradient = jax.value_and_grad(loss)(W, (X, TARGET, WEIGHT))
    np.testing.assert_allclose(-updates, gradient, rtol=1e-5)
    np.testing.assert_allclose(float(state.gathered_value), whole, rtol=1e-6)
    assert bool(adabatch.has_updated(state))
    assert adabatch.metrics(state)["num_examples"] == TOKENS
    assert heard == [(TOKENS, TOKENS)]
    groups = adabatch.split_groups((X, TARGET, WEIGHT), 16)
    sizes = WEIGHT.reshape(16, -1).sum(1).astype(np.int32)
    _, noise = adabatch.value_and_grad_noise(loss)(W, groups, sizes=sizes)
    np.testing.assert_allclose(noise.mean, gradient, rtol=1e-5)
    numerator = adabatch.metrics(state)["noise_numerator"]
    np.testing.assert_allclose(numerator, noise.trace, rtol=1e-4)


def test_a_ragged_micro_batch_counts_for_what_it_holds():
    optimizer = wrap(optax.sgd(1.0), initial=16, micro_batch_size=8, eta=1e3)
    state, update = optimizer.init(W), jax.jit(optimizer.update)
    gradients = [np.full(8, 3.0, np.float32), np.full(8, 9.0, np.float32), np.zeros(8, np.float32)]
    for gradient, size in zip(gradients, (8, 4, 4), strict=True):
        updates, state = update(gradient, state, W, num_examples=size)
    np.testing.assert_allclose(updates, -(8 * 3 + 4 * 9) / 16)
    assert adabatch.metrics(state)["num_examples"] == 16


def test_an_empty_call_is_passed_over_even_if_it_is_nan():
    optimizer = wrap(optax.sgd(1.0), initial=4)
    state, update = optimizer.init(W), jax.jit(optimizer.update)
    nothing = np.full(8, np.nan, np.float32)
    for gradient, size in ((W, 2), (nothing, 0), (3 * W, 2)):
        updates, state = update(gradient, state, W, value=jnp.float32(1), num_examples=size)
        assert bool(state.skipped_call) == (size == 0)
    np.testing.assert_allclose(updates, -2 * W)
    assert int(state.skipped_micro_batches) == 0


def test_a_batch_that_is_tested_takes_two_calls_where_calls_tell_their_size():
    optimizer = wrap(optax.sgd(1.0), initial=4, largest=64)
    state, update = optimizer.init(W), jax.jit(optimizer.update)
    emitted = []
    for i in range(4):
        _, state = update(W * (1 + i % 2), state, W, num_examples=4)
        emitted.append(bool(state.emitted))
    assert emitted == [False, True] * 2
    assert int(adabatch.metrics(state)["skipped_tests"]) == 0


@pytest.mark.parametrize("sizes", [(30, 30, 30, 30, 30, 30), (10, 40, 20, 40, 40, 10)])
def test_no_batch_exceeds_the_largest_size(sizes):
    """It ends before the call that would carry it beyond."""
    optimizer = wrap(optax.sgd(1.0), initial=100, largest=100)
    state, update = optimizer.init(W), jax.jit(optimizer.update)
    used, before = [], 0
    for size in sizes:
        _, state = update(W, state, W, num_examples=size)
        if bool(state.emitted):
            seen = adabatch.metrics(state)["num_examples"]
            used.append(seen - before)
            before = seen
    assert used and max(used) <= 100
    assert min(used) > 100 - max(sizes)


def test_a_batch_stays_below_the_largest_size_where_one_device_is_skipped():
    """Four devices of 16: without the part of one there would be 48, 112, 176 of at most 128."""
    controller = adabatch.adapt_batch_size(
        adabatch.norm_test(1.0), initial_batch_size=128, max_batch_size=128
    )
    optimizer = adabatch.adaptive_multi_steps(
        optax.chain(controller, optax.sgd(1.0)), micro_batch_size=16, axis_name="d"
    )
    gradients = np.random.default_rng(0).normal(1, 1, (3, 4, 8)).astype(np.float32)
    gradients[0, 0, 0] = np.nan

    def run(gradients):
        def step(state, gradient):
            _, state = optimizer.update(gradient, state, W)
            return state, (state.emitted, state.skipped_call)

        state, seen = jax.lax.scan(step, optimizer.init(W), gradients)
        return seen, adabatch.metrics(state)["num_examples"]

    (emitted, skipped), used = jax.vmap(run, in_axes=1, axis_name="d", out_axes=0)(gradients)
    assert emitted[0].tolist() == [False, True, False]
    assert skipped[0].tolist() == [True, False, False]
    assert used[0] == 112


def test_sizes_that_contradict_each_other_are_refused():
    optimizer = wrap(optax.sgd(1.0))
    state = optimizer.init(W)
    noise = adabatch.GradientNoise(W, jnp.float32(1), jnp.int32(8), jnp.int32(2))
    with pytest.raises(ValueError, match=r"micro_batch_size=None: every call must tell"):
        optimizer.update(W, state, W)
    with pytest.raises(ValueError, match=r"batch_size= would overrule .* num_examples="):
        optimizer.update(W, state, W, batch_size=8)
    with pytest.raises(ValueError, match=r"noise.num_examples says already .* sizes="):
        optimizer.update(W, state, W, noise=noise, num_examples=8)
    with pytest.raises(ValueError, match=r"num_examples= must be a scalar.*\(2,\)"):
        optimizer.update(W, state, W, num_examples=jnp.ones(2))


def test_the_noise_that_is_handed_in_counts_by_itself():
    optimizer = wrap(optax.sgd(1.0), initial=16)
    state = optimizer.init(W)
    noise = adabatch.GradientNoise(W, jnp.float32(1), jnp.int32(16), jnp.int32(4))
    updates, state = jax.jit(optimizer.update)(W, state, W, noise=noise)
    np.testing.assert_allclose(updates, -W)
    assert adabatch.metrics(state)["num_examples"] == 16
