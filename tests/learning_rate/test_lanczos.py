"""`scale_by_lanczos`: the variants' formulas, when it measures, what it does with a bad measurement."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from tests.marks import slow

CURVATURES = jnp.array([9.0, 4.0, 1.0])
W = jnp.array([1.0, -2.0, 0.5])


def bowl(curvatures, w):
    return 0.5 * jnp.sum(curvatures * w**2)


@functools.cache
def link(variant="heavy_ball", **options):
    common = dict(refresh_every=4, safety=1.0, ema_decay=0.0, max_momentum=0.99)
    return adabatch.scale_by_lanczos(variant, **(common | options))


@functools.cache
def step_of(optimizer):
    """One program for all tests of the same options."""

    @jax.jit
    def step(w, state, c, extra_args):
        value_fn = lambda w: bowl(c, w)
        updates, state = optimizer.update(
            jax.grad(value_fn)(w), state, w, value_fn=value_fn, **extra_args
        )
        return optax.apply_updates(w, updates), state

    return step


def follow(optimizer, curvatures, w=W, **extra_args):
    """States of jitted steps on quadratics whose curvatures are given step by step."""
    state, states = optimizer.init(w), []
    for c in curvatures:
        w, state = step_of(optimizer)(w, state, jnp.asarray(c), extra_args)
        states.append(state)
    return w, states


ROOT, SMALL = 3.0, 1.0  # √L and √μ
FORMULAS = {
    "gradient_descent": (2 / (9 + 4), 0.0),
    "heavy_ball": ((2 / (ROOT + SMALL)) ** 2, 0.25),
    "nesterov": (1 / 9, 0.5),
    "nesterov_authors": (
        1 / 6,
        0.5,
    ),  # √(μ/L) = 1/3 is above the stability limit 2 (1 + β) / ((1 + 2β) L)
}


@pytest.mark.parametrize("variant", FORMULAS)
def test_the_formulas(variant):
    _, states = follow(link(variant), [CURVATURES])
    alpha, beta = FORMULAS[variant]
    np.testing.assert_allclose(states[0].lanczos_learning_rate, alpha, rtol=1e-4)
    np.testing.assert_allclose(states[0].lanczos_momentum, beta, atol=1e-3)
    shown = adabatch.metrics(states[0])
    np.testing.assert_allclose(shown["learning_rate"], alpha, rtol=1e-4)
    np.testing.assert_allclose(shown["curvature_largest"], 9.0, rtol=1e-4)
    np.testing.assert_allclose(shown["curvature_smallest"], 1.0, rtol=1e-3)
    assert shown["refreshes"] == 1 and shown["failed_refreshes"] == 0


@pytest.mark.parametrize("variant", ["heavy_ball", "nesterov"])
def test_the_update_is_that_of_optax(variant):
    alpha, beta = FORMULAS[variant]
    w, _ = follow(link(variant), [CURVATURES] * 12)
    sgd = optax.sgd(alpha, momentum=beta, nesterov=variant == "nesterov")
    expected, state = W, sgd.init(W)
    for _ in range(12):
        updates, state = sgd.update(CURVATURES * expected, state, expected)
        expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(w, expected, atol=1e-4)


@pytest.mark.parametrize(
    "variant", ["heavy_ball", *slow("gradient_descent", "nesterov", "nesterov_authors")]
)
def test_it_converges(variant):
    w, _ = follow(link(variant, safety=0.9), [CURVATURES] * 60)
    assert float(jnp.max(jnp.abs(w))) < 1e-2


def test_the_mass_at_zero_is_left_out():
    """Of 60 dimensions 57 are flat; Polyak's momentum would be 1 with μ = 0."""
    curvatures = jnp.concatenate([CURVATURES, jnp.zeros(57)])
    _, states = follow(link(), [curvatures], w=jnp.ones(60))
    np.testing.assert_allclose(states[0].lanczos_momentum, 0.25, atol=1e-3)


def test_it_measures_when_it_is_due_and_not_in_between():
    _, states = follow(link(refresh_every=3), [CURVATURES * (1 + i) for i in range(7)])
    np.testing.assert_allclose(
        [s.curvature_largest for s in states], [9, 9, 9, 36, 36, 36, 63], rtol=1e-4
    )
    assert [int(s.refreshes) for s in states] == [1, 1, 1, 2, 2, 2, 3]


def test_the_unit_may_be_examples():
    by_examples = link(refresh_every=100, refresh_unit="example")
    _, states = follow(by_examples, [CURVATURES] * 7, num_examples=50)
    assert [int(s.refreshes) for s in states] == [1, 1, 2, 2, 3, 3, 4]


def test_without_emit_it_waits():
    optimizer = link(refresh_every=1)
    value_fn = lambda w: bowl(CURVATURES, w)
    state = optimizer.init(W)
    _, waiting = optimizer.update(W, state, W, value_fn=value_fn, emit=False)
    assert int(waiting.refreshes) == 0 and float(waiting.lanczos_learning_rate) == 0.0
    _, state = optimizer.update(W, waiting, W, value_fn=value_fn, emit=True)
    assert int(state.refreshes) == 1


def test_a_rise_is_taken_at_once_and_a_fall_is_smoothed():
    optimizer = link("nesterov", refresh_every=1, ema_decay=0.5)
    _, states = follow(optimizer, [CURVATURES, 4 * CURVATURES, CURVATURES])
    rates = [float(s.lanczos_learning_rate) for s in states]
    np.testing.assert_allclose(rates, [1 / 9, 1 / 36, 1 / 18], rtol=1e-4)


def test_a_fall_that_may_be_an_echo_of_the_rate_does_not_raise_it():
    """β = 0.9: the rate of L = 90 stays at L = 9, and at L = 1 is 2 (1 − β) / L and not 2 (1 + β) / L."""
    optimizer = link(refresh_every=1, max_momentum=0.9)
    shape = jnp.array([1.0, 0.4, -0.1])
    _, states = follow(optimizer, [90 * shape, 9 * shape, shape])
    rates = [float(s.lanczos_learning_rate) for s in states]
    np.testing.assert_allclose(rates, [3.8 / 90, 3.8 / 90, 0.2], rtol=1e-4)


def test_negative_curvature_leaves_no_least_one():
    """Polyak's and Nesterov's momentum of (9, 4, 1) is below 0.6; a saddle gets all that is allowed."""
    for variant in ("heavy_ball", "nesterov"):
        _, states = follow(link(variant, max_momentum=0.8), [jnp.array([9.0, 4.0, -1.0])])
        np.testing.assert_allclose(states[0].lanczos_momentum, 0.8, rtol=1e-6)


def test_a_least_curvature_that_three_steps_do_not_find_counts_as_none():
    """Of 1 … 1000 they see nothing below some 30, with a residual as large."""
    _, states = follow(
        link(num_steps=3, max_momentum=0.9), [jnp.geomspace(1, 1e3, 30)], jnp.ones(30)
    )
    np.testing.assert_allclose(states[0].lanczos_momentum, 0.9, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_it_knows_no_units(scale):
    _, states = follow(link(), [scale * CURVATURES])
    np.testing.assert_allclose(states[0].lanczos_learning_rate, 0.25 / scale, rtol=1e-4)


def test_a_bad_measurement_changes_nothing_and_is_counted():
    for bad in (jnp.nan * CURVATURES, -CURVATURES, 0 * CURVATURES):
        _, states = follow(link(refresh_every=1), [CURVATURES, bad, CURVATURES])
        kept = {"since_refresh", "lanczos_key", "lanczos_trace", "failed_refreshes"}
        before, after = (
            {k: v for k, v in s._asdict().items() if k not in kept} for s in states[:2]
        )
        chex.assert_trees_all_equal(before, after)
        assert [int(s.failed_refreshes) for s in states] == [0, 1, 1]
        assert int(states[2].refreshes) == 2


def test_until_the_first_usable_measurement_nothing_moves_and_every_step_tries():
    optimizer = link(refresh_every=50)
    w, states = follow(optimizer, [-CURVATURES, -CURVATURES, CURVATURES])
    assert [int(s.failed_refreshes) for s in states] == [1, 2, 2]
    assert float(states[1].lanczos_learning_rate) == 0.0
    assert float(states[2].lanczos_learning_rate) > 0 and (w != W).any()


def test_caps_hold():
    _, states = follow(link(max_momentum=0.1), [CURVATURES])
    np.testing.assert_allclose(states[0].lanczos_momentum, 0.1, rtol=1e-6)
    bound = adabatch.curvature.max_stable_learning_rate(9.0, momentum=0.1)
    assert float(states[0].lanczos_learning_rate) <= float(bound) * (1 + 1e-6)
    _, states = follow(link(safety=0.25), [CURVATURES])
    bound = adabatch.curvature.max_stable_learning_rate(9.0, momentum=states[0].lanczos_momentum)
    np.testing.assert_allclose(states[0].lanczos_learning_rate, 0.25 * bound, rtol=1e-4)


def test_the_rate_is_that_of_the_batch_behind_the_gradient():
    """Curvature 9 of all data, ν² = 81: seen through 100 examples, used with batches of 4 and 10⁶."""
    seen = adabatch.curvature.batch_hessian_extremes(9.0, -9.0, 81.0, 100).largest
    optimizer = link("nesterov", nu_squared=81.0, curvature_batch_size=100)
    for size, expected in ((4, 9 + 81 / (4 * 9)), (10**6, 9.0)):
        _, states = follow(optimizer, [CURVATURES * seen / 9], num_examples=size)
        np.testing.assert_allclose(1 / states[0].lanczos_learning_rate, expected, rtol=1e-3)


@pytest.mark.slow
def test_inside_adaptive_multi_steps_it_measures_once_per_batch():
    """Slow: a learner inside a wrapper, which compiles long."""
    optimizer = adabatch.adaptive_multi_steps(
        optax.chain(
            adabatch.adapt_batch_size(
                adabatch.norm_test(1.0), initial_batch_size=8, max_batch_size=8
            ),
            link(refresh_every=1),
        ),
        micro_batch_size=2,
    )
    value_fn = jax.tree_util.Partial(bowl, CURVATURES)
    step = jax.jit(lambda w, s, g: optimizer.update(g, s, w, value_fn=value_fn))
    state = optimizer.init(W)
    for i in range(12):
        _, state = step(W, state, W + 0.1 * i)
    shown = adabatch.metrics(state)
    assert shown["refreshes"] == 3 and shown["batch_size"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "newton"}, "variant must be one of .*, got 'newton'"),
        ({"refresh_every": 0}, "refresh_every must be a positive integer, got 0"),
        ({"refresh_every": 2**32}, "refresh_every must lie in .*, got 4294967296"),
        ({"refresh_unit": "day"}, "refresh_unit must be one of step, example, got 'day'"),
        ({"num_steps": 0}, "num_steps must be a positive integer, got 0"),
        ({"max_momentum": 1.0}, "max_momentum must lie in .*, got 1.0"),
        ({"safety": 0.0}, "safety must be a positive number, got 0.0"),
        ({"safety": 1.5}, "safety must lie in .*, got 1.5"),
        ({"ema_decay": -0.1}, "ema_decay must lie in .*, got -0.1"),
        ({"nu_squared": 1.0}, "belong together"),
        ({"nu_squared": -1.0, "curvature_batch_size": 8}, "nu_squared must lie in"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        link(**options)


def test_what_update_needs_is_said():
    optimizer = link()
    with pytest.raises(ValueError, match="value_fn=value_fn"):
        optimizer.update(W, optimizer.init(W), W)
    optimizer = link(refresh_unit="example")
    with pytest.raises(ValueError, match="num_examples="):
        optimizer.update(W, optimizer.init(W), W, value_fn=lambda w: bowl(CURVATURES, w))
