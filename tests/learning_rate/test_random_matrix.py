"""`scale_by_random_matrix`: the rule with the transition batch size that the data have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from tests.marks import slow

DIM, EXAMPLES, GROUPS = 12, 512, 64
EVERY = {"base_batch_size": 32, "refresh_every": 3, "num_steps": DIM}


def loss_fn(params, matrices):
    """½ wᵀ H_i w, the mean over examples."""
    return 0.5 * jnp.mean(jnp.einsum("i,nij,j->n", params, matrices, params))


@pytest.fixture(scope="module")
def matrices():
    """Hessians of examples: diag(40, 1, …, 1) and symmetric noise."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(EXAMPLES, DIM, DIM)) * 20
    mean = np.diag([40.0] + [1.0] * (DIM - 1))
    return (mean + (noise + noise.transpose(0, 2, 1)) / 2).astype(np.float32)


@pytest.fixture(scope="module")
def groups(matrices):
    return adabatch.split_groups(jnp.asarray(matrices), GROUPS)


@pytest.fixture(scope="module")
def by_numpy(matrices):
    """λ₁ of the mean over these examples, ν² along its eigenvector, and what all data have."""
    largest, vectors = np.linalg.eigh(matrices.mean(0))
    images = matrices.reshape(GROUPS, -1, DIM, DIM).mean(1) @ vectors[:, -1]
    noise = EXAMPLES / GROUPS * images.var(0, ddof=1).sum()
    full = adabatch.curvature.full_hessian_extremes(largest[-1], largest[0], noise, EXAMPLES)
    return float(full.largest), float(noise)


def step_of(link, **always):
    """A jitted update of ones; the examples' Hessians are an argument."""

    @jax.jit
    def step(state, groups, batch_size):
        return link.update(
            jnp.ones(DIM),
            state,
            jnp.ones(DIM),
            loss_fn=loss_fn,
            groups=groups,
            num_examples=batch_size,
            **always,
        )

    return step


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dataset_size", [4096, *slow(None)])
def test_the_factor_is_the_rule_at_the_measured_transition(
    groups, by_numpy, matrices, adaptive, dataset_size
):
    link = adabatch.scale_by_random_matrix(
        adaptive=adaptive, dataset_size=dataset_size, momentum=0.5, **EVERY
    )
    step, state = step_of(link), link.init(jnp.ones(DIM))
    values = np.linalg.eigvalsh(matrices.mean(0))
    full = adabatch.curvature.full_hessian_extremes(
        values[-1], values[0], by_numpy[1], EXAMPLES, dataset_size
    )
    transition = adabatch.curvature.transition_batch_size(full.largest, by_numpy[1], momentum=0.5)
    rule = adabatch.random_matrix_scaling(transition, adaptive=adaptive, dataset_size=dataset_size)
    for size in (8, 32, 128, 2048):
        updates, state = step(state, groups, size)
        assert updates[0] == pytest.approx(float(rule(float(size), 32.0)), rel=1e-3)
    shown = adabatch.metrics(state)
    assert float(shown["transition_batch_size"]) == pytest.approx(float(transition), rel=1e-3)
    assert float(shown["learning_rate_scale"]) == float(updates[0])
    assert float(shown["hessian_noise"]) == pytest.approx(by_numpy[1], rel=1e-3)


def test_it_measures_when_due_and_averages(groups):
    """Steeper examples count from the next refresh on, with the past's weight beside them."""
    link = adabatch.scale_by_random_matrix(adaptive=False, ema_decay=0.75, **EVERY)
    step, state = step_of(link), link.init(jnp.ones(DIM))
    seen = []
    for number in range(7):
        _, state = step(state, groups if number == 0 else 2.0 * groups, 64)
        seen.append((int(state.transition_refreshes), float(state.measured_largest)))
    first = seen[0][1]
    assert [count for count, _ in seen] == [1, 1, 1, 2, 2, 2, 3]
    assert [x / first for _, x in seen] == pytest.approx(
        [1, 1, 1, 1.25, 1.25, 1.25, 1.4375], rel=1e-3
    )


def test_an_interval_in_examples(groups):
    link = adabatch.scale_by_random_matrix(
        adaptive=False, refresh_unit="example", **EVERY | {"refresh_every": 100}
    )
    step, state = step_of(link), link.init(jnp.ones(DIM))
    counts = []
    for size in (40, 40, 40, 90, 10, 10):
        _, state = step(state, groups, size)
        counts.append(int(state.transition_refreshes))
    assert counts == [1, 1, 1, 2, 2, 3]  # 120 examples, then 100


@pytest.mark.parametrize("scale", [np.nan, *slow(np.inf, -1.0)])
def test_curvature_that_is_not_finite_or_not_positive_changes_nothing(groups, scale):
    link = adabatch.scale_by_random_matrix(adaptive=True, **EVERY)
    step, state = step_of(link), link.init(jnp.ones(DIM))
    bad = jnp.full_like(groups, scale) if scale < 0 else groups * scale
    bad = -jnp.broadcast_to(jnp.eye(DIM), groups.shape) if scale < 0 else bad
    for number, size in enumerate((64, 8), start=1):  # nothing is known, so each of them tries
        updates, state = step(state, bad, size)
        assert int(state.failed_transition_refreshes) == number
        assert float(updates[0]) == (1.0 if size == 64 else 0.5)
    assert adabatch.metrics(state)["transition_batch_size"] == 0.0
    _, known = step(state, groups, 64)
    for _ in range(3):
        _, after = step(known, bad, 64)
        after, known = known, after
    assert int(known.failed_transition_refreshes) == 3 and int(known.transition_refreshes) == 1
    assert float(known.measured_largest) == float(after.measured_largest) > 0


def test_one_measurement_per_optimizer_step_in_the_drop_in(groups):
    link = adabatch.scale_by_random_matrix(
        adaptive=False, **EVERY | {"base_batch_size": 4, "refresh_every": 1}
    )
    adapt = adabatch.adapt_batch_size(
        adabatch.norm_test(1.0), initial_batch_size=4, max_batch_size=4
    )
    optimizer = adabatch.adaptive_multi_steps(
        optax.chain(adapt, link, optax.sgd(1e-3)), micro_batch_size=1
    )
    params = jnp.ones(DIM)
    state = optimizer.init(params)

    @jax.jit
    def step(state, gradient):
        return optimizer.update(gradient, state, params, loss_fn=loss_fn, groups=groups)[1]

    counts = []
    for number in range(9):
        state = step(state, jnp.full(DIM, 1.0 + number))
        counts.append(int(adabatch.metrics(state)["refreshes"]))
    assert counts == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_what_is_missing_is_named(groups):
    link = adabatch.scale_by_random_matrix(adaptive=False, **EVERY)
    ones, given = jnp.ones(DIM), {"loss_fn": loss_fn, "groups": groups, "num_examples": 8}
    for missing in given:
        rest = {k: v for k, v in given.items() if k != missing}
        with pytest.raises(ValueError, match=f"scale_by_random_matrix .*{missing}="):
            link.update(ones, link.init(ones), ones, **rest)
    with pytest.raises(ValueError, match="params"):
        link.update(ones, link.init(ones), **given)
    with pytest.raises(ValueError, match="groups must be at least 2, got 1"):
        link.update(ones, link.init(ones), ones, **given | {"groups": groups[:1]})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base_batch_size": 0}, "base_batch_size must be a positive number, got 0"),
        ({"refresh_every": 0}, "refresh_every"),
        ({"refresh_unit": "epoch"}, "refresh_unit"),
        ({"num_steps": 0}, "num_steps"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"momentum": 1.0}, "momentum"),
        ({"dataset_size": -1}, "dataset_size"),
    ],
)
def test_arguments_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=f"scale_by_random_matrix: {message}"):
        adabatch.scale_by_random_matrix(**EVERY | {"adaptive": False} | wrong)
