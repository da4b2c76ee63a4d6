"""Optax's own wrappers and optimizers, inside and around `adaptive_multi_steps`."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch

MICRO = 8  # examples in a micro-batch of `around`
OUT_ONLY = {"hidden": False, "out": True}


@pytest.fixture(scope="module")
def trained(prove, first_params, loss_fn):
    """The unchanged loop around an optimizer; its carry is parameters and state."""

    def trained(optimizer, **options):
        def step(carry, x, y):
            params, state = carry
            value, grads = jax.value_and_grad(loss_fn)(params, x, y)
            updates, state = optimizer.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), value

        first = first_params, optimizer.init(first_params)
        return prove(step, first, state=lambda carry: carry[1], **options)

    return trained


@pytest.mark.slow
def test_clipping_inside_and_outside_the_wrapper(trained, controller, around, digits):
    """Inside, the mean gradient is clipped, and the noise is that of the gradient as it is. Outside,
    every micro-batch is clipped before the wrapper sees it: outliers count less, less noise is seen,
    and the batch grows less. Its sizes at every tenth micro-batch, one image in fifty an outlier:

    inside   16 40 64 88 120 120 120 120 120 120 120 120 120
    outside  16 40 56 56  56  64  64  64  64  72  72  80  80

    Slow: several runs, each compiled.
    """
    images = digits[0].copy()
    images[::50] *= 20.0
    data = images, digits[1]
    clip, adam = optax.clip_by_global_norm(1.0), optax.adam(0.01)
    inside = trained(around(optax.chain(clip, controller(), adam)), data=data).sizes
    outside = trained(optax.chain(clip, around(optax.chain(controller(), adam))), data=data).sizes
    print(*(" ".join(map(str, sizes[::10])) for sizes in (inside, outside)), sep="\n")
    assert 16 < outside[-1] < inside[-1]


def test_masked_parameters_stay_and_the_rest_learns(trained, controller, around, first_params):
    frozen = jax.tree.map(lambda trained: not trained, OUT_ONLY)
    chain = optax.chain(
        optax.masked(optax.chain(controller(), optax.adam(0.05)), OUT_ONLY),
        optax.masked(optax.set_to_zero(), frozen),
    )
    params, _ = trained(around(chain)).carry
    chex.assert_trees_all_equal(params["hidden"], first_params["hidden"])


def test_partition_gives_each_part_its_optimizer(trained, controller, around, first_params):
    parts = {"adam": optax.adam(0.01), "still": optax.set_to_zero()}
    labels = {"hidden": {"w": "adam", "b": "still"}, "out": "adam"}
    params, _ = trained(around(optax.chain(controller(), optax.partition(parts, labels)))).carry
    chex.assert_trees_all_equal(params["hidden"]["b"], first_params["hidden"]["b"])


def test_injected_hyperparameters_change_while_it_runs(trained, controller, around):
    """A schedule counts optimizer steps, not micro-batches; a number may be set by hand."""

    def make(learning_rate, b1):
        return optax.chain(controller(), optax.scale_by_adam(b1), optax.scale(-learning_rate))

    schedule = optax.linear_schedule(0.02, 0.0, 1000)
    optimizer = around(optax.inject_hyperparams(make)(learning_rate=schedule, b1=0.9))

    def after(number, carry):
        params, state = carry
        if number == 60:
            inner = state.inner_opt_state
            lower = inner.hyperparams | {"b1": jnp.full_like(inner.hyperparams["b1"], 0.8)}
            return params, state._replace(inner_opt_state=inner._replace(hyperparams=lower))
        return None

    with pytest.warns(UserWarning, match="a schedule inside counts optimizer steps"):
        last = trained(optimizer, after=after)
    state, shown = last.carry[1], adabatch.metrics(last.carry[1])
    np.testing.assert_allclose(shown["learning_rate"], schedule(last.moved.sum() - 1), rtol=1e-5)
    np.testing.assert_allclose(state.inner_opt_state.hyperparams["b1"], 0.8, rtol=1e-6)


def test_apply_if_finite_around_it_loses_one_micro_batch(trained, controller, around, digits):
    images, labels = digits[0].copy(), digits[1]
    images[203, 5] = np.nan  # in the micro-batch 25
    optimizer = optax.apply_if_finite(around(optax.chain(controller(), optax.adam(0.01))), 5)
    last = trained(optimizer, data=(images, labels))
    state = last.carry[1]
    assert int(state.total_notfinite) == 1 and not last.moved[25]
    shown = adabatch.metrics(state)
    assert int(shown["skipped_micro_batches"]) == 0, "it never sees the broken one"
    gathered = shown["num_examples"] + MICRO * int(shown["micro_batches"])
    assert gathered == MICRO * (len(last.sizes) - 1)


@pytest.mark.slow
def test_schedule_free_is_evaluated_at_its_average(
    trained, controller, around, digits, loss_fn, first_params
):
    """Slow: two runs of an optimizer that compiles long."""
    inner = optax.contrib.schedule_free(optax.adam(0.03, b1=0.0), learning_rate=0.03, b1=0.9)
    params, state = trained(around(optax.chain(controller(), inner))).carry
    average = optax.contrib.schedule_free_eval_params(state.inner_opt_state[1], params)
    assert loss_fn(average, *digits) < 0.3 * loss_fn(first_params, *digits)
    assert any(
        jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (average, params)), strict=True)
    )


@pytest.mark.slow
def test_muon_takes_whole_batches_to_orthogonal_steps(trained, controller, around, first_params):
    """Zero on every other micro-batch; else a matrix moves as far along each of its directions.

    Slow: two runs of Muon, which compiles long.
    """
    optimizer = around(optax.chain(controller(), optax.contrib.muon(0.03)))
    matrices = [first_params["hidden"]["w"]]

    def after(number, carry):
        matrices.append(carry[0]["hidden"]["w"])

    moved = trained(optimizer, after=after).moved
    steps = np.diff(np.array(matrices), axis=0)
    assert (steps.any(axis=(1, 2)) == moved).all()
    singular = np.linalg.svd(steps[moved], compute_uv=False)
    ratios = singular[3:, 0] / singular[3:, -1]
    assert len(ratios) > 3 and max(ratios) < 4.0, ratios
