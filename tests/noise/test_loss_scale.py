"""float16 with a dynamic loss scale, as the guide of `adabatch_jax.noise` does it: against flax's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import adabatch_jax as adabatch

GROUPS, INTERVAL = 8, 4  # INTERVAL good steps in a row double the scale
START = {"w": np.float32([0.5, -1.0, 2.0]), "b": np.float32([0.25])}
X = np.random.default_rng(0).normal(1.0, 0.5, (GROUPS, 4, 3)).astype(np.float32)


def loss_fn(params, x, dtype=jnp.float16):
    """Computed in `dtype`; parameters and gradients are float32."""
    w, b, x = (v.astype(dtype) for v in (params["w"], params["b"], x))
    return jnp.mean((x @ w + b) ** 2).astype(jnp.float32)


def scaled_loss_fn(params, x, scale):
    value = loss_fn(params, x)
    return scale * value, value


def unscaled(noise, scale):
    def divided(tree, by):
        return jax.tree.map(lambda g: g.astype(jnp.float32) / by, tree)

    return noise._replace(
        mean=divided(noise.mean, scale),
        scatter=noise.scatter / scale**2,
        coordinate_scatter=divided(noise.coordinate_scatter, scale**2),
    )


def next_scale(scale, good_steps, finite):
    good_steps = jnp.where(finite, good_steps + 1, 0)
    grown = jnp.where((good_steps > 0) & (good_steps % INTERVAL == 0), 2 * scale, scale)
    return jnp.where(finite, grown, scale / 2), good_steps


CONTROLLER = adabatch.adapt_batch_size(
    adabatch.norm_test(0.02), initial_batch_size=32, max_batch_size=4096, ema_decay=0.5
)
OPTIMIZER = optax.apply_if_finite(optax.chain(CONTROLLER, optax.adam(0.05)), 30)


@jax.jit
def fused(carry, groups):
    params, state, scale, good_steps = carry
    measure = adabatch.value_and_grad_noise(scaled_loss_fn, has_aux=True)
    (_, value), noise = measure(params, groups, scale)
    noise = unscaled(noise, scale)
    updates, state = OPTIMIZER.update(noise.mean, state, params, value=value, noise=noise)
    scale, good_steps = next_scale(scale, good_steps, state.last_finite)
    return (optax.apply_updates(params, updates), state, scale, good_steps), value


def begin(scale=2.0**16):
    params = jax.tree.map(jnp.asarray, START)
    return params, OPTIMIZER.init(params), jnp.float32(scale), jnp.int32(0)


def test_scale_and_parameters_go_the_way_of_flax_s_dynamic_scale():
    plain, dynamic = optax.adam(0.05), DynamicScale(growth_interval=INTERVAL - 1)

    @jax.jit
    def flax_step(dynamic, params, state):
        def loss(params):  # a copy for each group, so that their gradients add up in float32
            copies = jax.tree.map(lambda p: jnp.stack([p] * GROUPS), params)
            return jnp.sum(jax.vmap(loss_fn)(copies, X))

        dynamic, finite, _, gradient = dynamic.value_and_grad(loss)(params)
        gradient = jax.tree.map(lambda g: g / GROUPS, gradient)
        updates, new_state = plain.update(gradient, state, params)
        new = optax.apply_updates(params, updates), new_state
        return dynamic, *jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (params, state))

    carry, params, scales = begin(), begin()[0], []
    state = plain.init(params)
    for _ in range(24):
        dynamic, params, state = flax_step(dynamic, params, state)
        carry, value = fused(carry, X)
        scales.append(float(carry[2]))
        assert scales[-1] == float(dynamic.scale)
        assert np.isfinite(value), "the loss itself is not scaled"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3), carry[0], params)
    changes = np.diff(np.log2([2.0**16, *scales]))
    assert (changes == 1).any() and (changes == -1).sum() > 2, "it grew, and overflowed again"
    assert int(carry[1].total_notfinite) == (changes == -1).sum()
    assert int(adabatch.get_batch_size(carry[1])) > 32


def test_one_group_that_overflows_holds_the_batch_and_halves_the_scale():
    good, _ = fused(begin(2.0**8), X)
    spoilt = X.copy()
    spoilt[5] *= 40.0
    bad, value = fused(good, spoilt)
    assert np.isfinite(value) and float(bad[2]) == 2.0**7
    jax.tree.map(np.testing.assert_array_equal, bad[0], good[0])
    before, after = good[1], bad[1]
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, before.inner_state)
    assert int(after.total_notfinite) == 1 and adabatch.metrics(after)["num_examples"] == 32
    later, _ = fused(bad, X)
    assert later[1].last_finite and adabatch.metrics(later[1])["num_examples"] == 64
    for leaf in jax.tree.leaves(later):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("scale", [1.0, 2.0**5, 2.0**10])
def test_the_unscaled_noise_is_that_of_the_loss_in_float32(scale):
    options = {"coordinate_wise": True, "has_aux": True}
    _, found = measured(scaled_loss_fn, **options)(START, X, jnp.float32(scale))
    found = unscaled(found, scale)
    exact = functools.partial(loss_fn, dtype=jnp.float32)
    _, wanted = measured(lambda p, x, s: (exact(p, x), 0.0), **options)(START, X, scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02), found, wanted)


def measured(loss, **options):
    return jax.jit(adabatch.value_and_grad_noise(loss, **options))


def test_without_a_scale_a_small_gradient_is_lost_and_with_it_seen():
    def small(params, x, scale):
        value = 1e-9 * loss_fn(params, 0.01 * x).astype(jnp.float32)
        return scale * value, value

    _, lost = measured(small, has_aux=True)(START, X, jnp.float32(1.0))
    _, seen = measured(small, has_aux=True)(START, X, jnp.float32(2.0**20))
    assert float(lost.squared_norm) == 0.0 < float(unscaled(seen, 2.0**20).squared_norm)
    _, state = CONTROLLER.update(lost.mean, CONTROLLER.init(START), noise=lost)
    assert adabatch.metrics(state)["test_status"] == adabatch.BatchSizeStatus.ZERO_GRADIENT


def test_in_the_drop_in_an_overflow_is_skipped_and_counted():
    optimizer = adabatch.adaptive_multi_steps(
        optax.chain(CONTROLLER, optax.adam(0.05)), micro_batch_size=4
    )

    def call(carry, x):
        params, state, scale, good_steps = carry
        (_, value), gradient = jax.value_and_grad(scaled_loss_fn, has_aux=True)(params, x, scale)
        gradient = jax.tree.map(lambda g: g / scale, gradient)
        finite = jnp.isfinite(optax.tree.norm(gradient))
        updates, state = optimizer.update(gradient, state, params, value=value)
        scale, good_steps = next_scale(scale, good_steps, finite)
        params = optax.apply_updates(params, updates)
        return (params, state, scale, good_steps), (finite, scale, adabatch.has_updated(state))

    start = START, optimizer.init(START), jnp.float32(2.0**16), jnp.int32(0)
    stream = np.concatenate([X, X, X])
    carry, (finite, scales, emitted) = jax.jit(lambda c, x: jax.lax.scan(call, c, x))(start, stream)
    assert 2 < (~finite).sum() < 12 and scales[0] == 2.0**15
    shown = adabatch.metrics(carry[1])
    assert shown["skipped_micro_batches"] == (~finite).sum() and shown["skipped_tests"] == 0
    first = np.flatnonzero(emitted)[0]
    assert finite[: first + 1].sum() == GROUPS, "the batch took one more for each that was skipped"
    assert shown["num_examples"] == 32 and shown["next_batch_size"] > 32
    for leaf in jax.tree.leaves((carry[0], carry[1].inner_opt_state)):
        assert np.isfinite(leaf).all()
