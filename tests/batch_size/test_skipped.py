"""A skipped call is known in that call, and what the loop carries stays clean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch

W = jnp.zeros(4)


def controlled(*links):
    controller = adabatch.adapt_batch_size(
        adabatch.norm_test(1.0), initial_batch_size=16, max_batch_size=64
    )
    return optax.chain(controller, *links)


DROP_IN = adabatch.adaptive_multi_steps(controlled(optax.sgd(0.1)), micro_batch_size=4)


def test_running_statistics_keep_what_they_were_where_a_call_is_skipped():
    """The mean of the good micro-batches, in a scan, with a PRNG key and a counter beside it."""
    x = np.random.default_rng(0).normal(1.0, 1.0, (20, 4, 4)).astype(np.float32)
    clean = np.delete(x, (0, 7), axis=0)
    x[0, 1, 2], x[7, 0, 0] = np.inf, np.nan

    def step(carry, x):
        state, carried = carry
        gradient = jax.grad(lambda w: jnp.mean((x @ w - x.sum(1)) ** 2))(W)
        _, state = DROP_IN.update(gradient, state, W)
        new = {
            "mean": 0.9 * carried["mean"] + 0.1 * x.mean(0),
            "count": carried["count"] + 1,
            "key": jax.random.split(carried["key"], 1)[0],
        }
        carried = adabatch.unless_skipped(state, new, carried)
        return (state, carried), adabatch.metrics(state)["skipped"]

    def run(x):
        start = {"mean": jnp.zeros(4), "count": jnp.int32(0), "key": jax.random.key(0)}
        return jax.lax.scan(step, (DROP_IN.init(W), start), x)

    (_, carried), skipped = jax.jit(run)(x)
    (_, expected), _ = jax.jit(run)(clean)
    assert np.flatnonzero(skipped).tolist() == [0, 7]
    assert int(carried["count"]) == 18
    np.testing.assert_array_equal(carried["mean"], expected["mean"])
    keys = [jax.random.key_data(c["key"]).tolist() for c in (carried, expected)]
    assert keys[0] == keys[1]


def test_a_loss_that_is_not_finite_is_a_skipped_call_too():
    _, state = DROP_IN.update(W, DROP_IN.init(W), W, value=jnp.array(jnp.nan))
    assert bool(adabatch.metrics(state)["skipped"])
    _, state = DROP_IN.update(W, state, W, value=jnp.array(1.0))
    assert not bool(adabatch.metrics(state)["skipped"])


def test_apply_if_finite_around_a_fused_step_says_so_as_well():
    optimizer = optax.apply_if_finite(controlled(optax.sgd(0.1)), 5)
    state = optimizer.init(W)
    for gradient, skipped in ((W, False), (W.at[1].set(jnp.nan), True), (W, False)):
        noise = adabatch.GradientNoise(gradient, jnp.float32(1), jnp.int32(16), jnp.int32(4))
        _, state = optimizer.update(gradient, state, W, noise=noise)
        kept = adabatch.unless_skipped(state, {"a": jnp.float32(2)}, {"a": jnp.float32(1)})
        assert float(kept["a"]) == (1 if skipped else 2)


def test_the_dtype_is_that_of_the_new_and_what_is_no_array_passes():
    _, state = DROP_IN.update(W.at[0].set(jnp.nan), DROP_IN.init(W), W)
    new, old = (jnp.ones(2, jnp.bfloat16), jnp.sum, None), (jnp.zeros(2), jnp.sum, None)
    kept = adabatch.unless_skipped(state, new, old)
    assert kept[0].dtype == jnp.bfloat16 and not kept[0].any()
    assert kept[1:] == (jnp.sum, None)


def test_other_structures_are_refused():
    state = DROP_IN.init(W)
    with pytest.raises(ValueError, match="unless_skipped: new and old differ in structure"):
        adabatch.unless_skipped(state, {"a": W}, {"b": W})


def test_where_nothing_can_be_skipped_the_new_is_taken():
    state = controlled(optax.sgd(0.1)).init(W)
    assert adabatch.unless_skipped(state, {"a": W + 1}, {"a": W})["a"].all()
