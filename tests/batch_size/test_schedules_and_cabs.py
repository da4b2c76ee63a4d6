"""CABS, which reads the loss and the learning rate, and sizes that are fixed in advance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import (
    BatchSizeStatus,
    GradientNoise,
    adadagrad,
    adaptive_multi_steps,
    batch_size_schedule,
    cabs,
    get_batch_size,
    metrics,
    needs_noise,
    split_groups,
    value_and_grad_noise,
)
from tests.marks import slow


def test_cabs_by_hand(make_noise):
    noise = make_noise(trace=1000, square=25)
    assert float(cabs(0.125)(noise, value=2.0)) == pytest.approx(62.5)  # 0.125 · 1000 / 2
    assert float(cabs(0.125, lowest_loss=1.5)(noise, value=2.0)) == pytest.approx(250.0)
    assert float(cabs(0.125, lowest_loss=-3.0)(noise, value=2.0)) == pytest.approx(25.0)


def test_cabs_agrees_with_numpy_on_per_example_gradients(controller):
    rng = np.random.default_rng(3)
    x, y, w = rng.normal(size=(96, 5)), rng.normal(size=96), rng.normal(size=5)
    residual = x @ w - y
    gradients = residual[:, None] * x
    expected = 0.7 * np.var(gradients, axis=0, ddof=1).sum() / np.mean(residual**2 / 2)

    def loss_fn(w, group):
        return jnp.mean((group[0] @ w - group[1]) ** 2) / 2

    groups = split_groups((jnp.float32(x), jnp.float32(y)), 96)
    value, noise = value_and_grad_noise(loss_fn)(jnp.float32(w), groups)
    np.testing.assert_allclose(cabs(0.7)(noise, value=value), expected, rtol=1e-5)
    link = controller(cabs(0.7), jnp.zeros(5), initial_batch_size=1)
    assert link.feed(noise, value=value) == int(np.ceil(expected))


def test_the_size_of_cabs_falls_with_a_scheduled_rate(controller, make_noise):
    link = controller(cabs(lambda n: jnp.where(n > 100, 0.1, 0.2)), monotone=False)
    noise = make_noise(trace=1000, num_examples=64)
    assert [link.feed(noise, value=1.0) for _ in range(2)] == [200, 100]  # after 64, 128 examples


def test_trace_and_loss_of_cabs_are_averaged_each_by_itself(controller, make_noise):
    link = controller(cabs(1.0), ema_decay=0.75, monotone=False)
    link.feed(make_noise(trace=1000), value=4.0)
    # Weights 3/16 and 4/16: (3000 + 8000) / (3·4 + 4·1), not the mean of 250 and 2000.
    assert link.feed(make_noise(trace=2000), value=1.0) == 688


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_does_not_move_the_batch(controller, make_noise, value):
    link = controller(cabs(1.0))
    assert link.feed(make_noise(trace=1000), value=value) == 64
    assert link.status == BatchSizeStatus.NOT_FINITE


@pytest.mark.parametrize("value", [0.5, 0.25])
def test_at_the_lowest_loss_cabs_doubles_the_batch(controller, make_noise, value):
    noise = make_noise(trace=1000)
    assert np.isinf(cabs(1.0, lowest_loss=0.5)(noise, value=value))
    assert controller(cabs(1.0, lowest_loss=0.5)).feed(noise, value=value) == 128


def test_cabs_without_a_loss_says_what_to_pass(controller, make_noise):
    with pytest.raises(ValueError, match=r"cabs reads value=: call optimizer\.update\(.*value=…"):
        controller(cabs(1.0)).feed(make_noise())


def test_the_learning_rate_of_cabs_may_be_traced_and_nothing_is_retraced(make_noise):
    traces = []

    @jax.jit
    def required(rate, noise, value):
        traces.append(None)
        return cabs(rate)(noise, value=value)

    noise = make_noise(trace=1000)
    found = [float(required(*x)) for x in ((0.5, noise, 2.0), (0.25, noise, 1.0))]
    assert (found, len(traces)) == (pytest.approx([250.0, 250.0]), 1)


def test_a_drop_in_loop_hands_the_mean_loss_to_cabs():
    optimizer = adadagrad(0.1, criterion=cabs(1.0), initial_batch_size=16, max_batch_size=4096)
    optimizer = adaptive_multi_steps(optimizer, micro_batch_size=8)
    params = jnp.zeros(2)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient, value in (([3.0, 0.0], 1.0), ([1.0, 0.0], 3.0)):
        _, state = update(jnp.array(gradient), state, params, value=value)
    assert int(get_batch_size(state)) == 16  # scatter 8 · (1 + 1) over a mean loss of 2, below 16
    for gradient, value in (([30.0, 0.0], 1.0), ([10.0, 0.0], 3.0)):
        _, state = update(jnp.array(gradient), state, params, value=value)
    assert int(get_batch_size(state)) == 800  # 8 · (100 + 100) over 2


@pytest.mark.parametrize("options", [{"dataset_size": 1000}, *slow({}, {"debias": True})])
def test_a_schedule_is_followed_whatever_the_noise(controller, options):
    link = controller(
        batch_size_schedule(optax.linear_schedule(64, 512, 1000)), multiple_of=64, **options
    )
    sizes, seen = [], 0
    for _ in range(8):
        gradient = jnp.full(2, jnp.nan) if len(sizes) == 1 else jnp.zeros(2)
        seen += link.batch_size
        alone = GradientNoise(gradient, jnp.float32(jnp.nan), link.batch_size, jnp.int32(1))
        sizes.append(link.feed(alone))
        exact = 64 + 448 * min(seen / 1000, 1)
        assert sizes[-1] == 64 * int(np.ceil(exact / 64))
        assert link.status == BatchSizeStatus.CHANGED or sizes[-1] == sizes[-2]
    assert sizes[-1] == 512


def test_a_schedule_needs_no_noise_and_shows_that_which_it_is_given(controller, make_noise):
    link = controller(batch_size_schedule(lambda n: n))
    assert not needs_noise(link.state)
    link.feed(make_noise(trace=128, square=4, num_examples=64))
    assert not needs_noise(link.state)
    assert float(metrics(link.state)["noise_scale"]) == 64.0
    link.feed(make_noise(num_groups=1)._replace(scatter=jnp.float32(jnp.nan)))
    assert float(metrics(link.state)["noise_scale"]) == 64.0


def test_a_schedule_that_falls_is_followed_where_the_batch_may_shrink(controller, make_noise):
    steps = batch_size_schedule(optax.piecewise_constant_schedule(64, {100: 4.0, 200: 0.125}))
    sizes = {}
    for monotone in (True, False):
        link = controller(steps, monotone=monotone)
        sizes[monotone] = [link.feed(make_noise(num_examples=64)) for _ in range(4)]
    assert sizes == {True: [64, 256, 256, 256], False: [64, 256, 256, 32]}


def test_a_held_schedule_catches_up(controller, make_noise):
    link = controller(batch_size_schedule(lambda n: 2 * n))
    assert link.feed(make_noise(num_examples=64), hold_batch_size=True) == 64
    assert link.status == BatchSizeStatus.HELD
    assert link.feed(make_noise(num_examples=64)) == 256


def test_a_schedule_counts_the_micro_batches_of_a_drop_in_loop():
    ramp = batch_size_schedule(lambda n: 16 + n)
    optimizer = adadagrad(0.1, criterion=ramp, initial_batch_size=16, max_batch_size=64)
    optimizer = adaptive_multi_steps(optimizer, micro_batch_size=8)
    params = jnp.zeros(2)
    state, update, sizes = optimizer.init(params), jax.jit(optimizer.update), []
    for _ in range(6):  # 2 micro-batches, then 4
        _, state = update(jnp.ones(2), state, params)
        sizes.append(int(get_batch_size(state)))
    assert sizes == [16, 32, 32, 32, 32, 64]


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), None, True, "1"])
def test_the_rate_of_cabs_must_be_positive_or_a_schedule(value):
    with pytest.raises(ValueError, match=f"cabs: learning_rate must .*, got {value!r}"):
        cabs(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1"])
def test_the_lowest_loss_must_be_a_number(value):
    with pytest.raises(ValueError, match=f"cabs: lowest_loss must .*, got {value!r}"):
        cabs(1.0, lowest_loss=value)


@pytest.mark.parametrize("value", [64, None, "ramp"])
def test_a_schedule_must_be_callable(value):
    with pytest.raises(ValueError, match=f"schedule must be callable, got {value!r}"):
        batch_size_schedule(value)


def test_both_survive_a_scan(make_noise):
    for criterion in (cabs(1.0), batch_size_schedule(lambda n: 2 * n)):
        link = adadagrad(0.1, criterion=criterion, initial_batch_size=64, max_batch_size=512)
        noise = make_noise(trace=1000)

        def step(state, value, link=link, noise=noise):
            _, state = link.update(noise.mean, state, noise=noise, value=value)
            return state, get_batch_size(state)

        start = link.init(jnp.zeros(2))
        once = functools.partial(jax.lax.scan, step)
        _, sizes = jax.jit(once)(start, jnp.array([8.0, 4.0, 4.0]))
        assert sizes.tolist() == ([125, 250, 250] if criterion.uses_noise else [128, 256, 384])
