"""The recipes: AdaGrad and AdaGrad-Norm against NumPy, with a batch that grows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import (
    GradientNoise,
    adadagrad,
    adadagrad_norm,
    get_batch_size,
    metrics,
    norm_test,
    scale_by_adagrad_norm,
    sqrt_scaling,
)

SIZES = {"initial_batch_size": 64, "max_batch_size": 1024}
CRITERION = norm_test(1.0)


def draw(steps, seed=0):
    """Gradients of very different size, one coordinate of them dead."""
    w = np.random.default_rng(seed).normal(size=(steps, 6)) * np.logspace(-4, 2, 6)
    w[:, 2] = 0.0
    return [{"w": x[:4].reshape(2, 2), "b": x[4:]} for x in w.astype(np.float32)]


def noise_of(gradient, trace=1.0, num_examples=64):
    return GradientNoise(gradient, jnp.float32(7 * trace), jnp.int32(num_examples), jnp.int32(8))


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def run(optimizer, gradients, noise=False):
    """The updates of every step, flattened; and the last state."""
    state, update = optimizer.init(gradients[0]), jax.jit(optimizer.update)
    taken = []
    for gradient in gradients:
        extra = {"noise": noise_of(gradient)} if noise else {}
        updates, state = update(gradient, state, gradient, **extra)
        taken.append(flat(updates))
    return np.stack(taken), state


def test_adagrad_norm_by_hand():
    link = scale_by_adagrad_norm(initial_accumulator_value=11.0, eps=0.0)
    gradient = {"w": jnp.array([[3.0]]), "b": jnp.array([4.0])}
    updates, state = link.update(gradient, link.init(gradient))
    assert float(state.sum_of_squared_norms) == 36.0
    np.testing.assert_allclose(flat(updates), [4 / 6, 3 / 6], rtol=1e-6)


def test_adagrad_norm_matches_numpy_over_steps():
    gradients = draw(30)
    taken, _ = run(scale_by_adagrad_norm(0.5, eps=0.01), gradients)
    g = np.stack([flat(x) for x in gradients])
    total = 0.5 + np.cumsum((g**2).sum(1))
    np.testing.assert_allclose(taken, g / (np.sqrt(total) + 0.01)[:, None], rtol=1e-5)


def test_adagrad_norm_keeps_one_number_and_the_dtype():
    link = scale_by_adagrad_norm()
    gradient = {"w": jnp.ones((300,), jnp.bfloat16), "b": jnp.ones(2)}
    updates, state = link.update(gradient, link.init(gradient))
    assert [x.shape for x in jax.tree.leaves(state)] == [()]
    assert state.sum_of_squared_norms.dtype == jnp.float32
    np.testing.assert_allclose(state.sum_of_squared_norms, 302.01, rtol=1e-6)
    assert updates["w"].dtype == jnp.bfloat16


def test_adagrad_norm_of_a_tiny_float16_gradient_is_finite():
    """1 / ‖g‖ = 1.4e5 is no float16, but g / ‖g‖ is."""
    link = scale_by_adagrad_norm(initial_accumulator_value=0.0)
    gradient = jnp.full(2, 5e-6, jnp.float16)
    updates, _ = link.update(gradient, link.init(gradient))
    np.testing.assert_allclose(np.float32(updates), 0.5**0.5, rtol=1e-3)


def test_adagrad_norm_of_nothing_is_nothing():
    link = scale_by_adagrad_norm(initial_accumulator_value=0.0)
    updates, _ = link.update(jnp.zeros(2), link.init(jnp.zeros(2)))
    assert updates.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"initial_accumulator_value": -0.1}, "initial_accumulator_value must"),
        ({"eps": -1e-9}, "eps must"),
        ({"eps": float("nan")}, "eps must"),
        ({"initial_accumulator_value": 0, "eps": 0}, "must not both be 0"),
    ],
)
def test_adagrad_norm_refuses(arguments, name):
    with pytest.raises(ValueError, match=f"scale_by_adagrad_norm: .*{name}"):
        scale_by_adagrad_norm(**arguments)


def test_adagrad_norm_may_be_injected():
    link = optax.inject_hyperparams(scale_by_adagrad_norm)(
        initial_accumulator_value=0.0, eps=0.0 + 1.0
    )
    updates, _ = link.update(jnp.array([3.0, 4.0]), link.init(jnp.zeros(2)))
    np.testing.assert_allclose(updates, [0.5, 4 / 6], rtol=1e-6)


def test_adadagrad_is_the_rule_of_pytorch():
    gradients = draw(30)
    taken, _ = run(adadagrad(0.05, criterion=CRITERION, **SIZES), gradients, noise=True)
    g = np.stack([flat(x) for x in gradients])
    root = np.sqrt(np.cumsum(g**2, axis=0))  # v₀ = 0
    expected = -0.05 * g / (root + 1e-10)
    # ε² inside the root instead of ε outside differs by a relative ε/√v: 1e-6 at √v = 1e-4.
    error, allowed = np.abs(taken - expected), (1e-6 + 1e-10 / np.maximum(root, 1e-10))
    assert np.all(error <= allowed * np.abs(expected))


def test_adadagrad_lets_a_dead_coordinate_rest():
    gradients = draw(30)
    taken, _ = run(adadagrad(0.05, criterion=CRITERION, **SIZES), gradients, noise=True)
    dead = np.stack([flat(x) for x in gradients]).any(0) == 0
    assert dead.sum() == 1
    assert not taken[:, dead].any()


def test_adadagrad_norm_is_the_scalar_rule():
    gradients = draw(30)
    taken, _ = run(adadagrad_norm(0.05, criterion=CRITERION, **SIZES), gradients, noise=True)
    g = np.stack([flat(x) for x in gradients])
    root = np.sqrt(0.01 + np.cumsum((g**2).sum(1)))
    np.testing.assert_allclose(taken, -0.05 * g / (root + 1e-10)[:, None], rtol=1e-5)


@pytest.fixture(params=[adadagrad, adadagrad_norm], ids=lambda f: f.__name__)
def recipe(request):
    return request.param


def test_the_batch_grows_as_the_criterion_asks(recipe):
    optimizer = recipe(0.1, criterion=CRITERION, multiple_of=32, **SIZES)
    gradient = {"w": jnp.array([1.0])}
    noise = noise_of(gradient, trace=100.0)
    _, state = jax.jit(optimizer.update)(gradient, optimizer.init(gradient), noise=noise)
    assert int(get_batch_size(state)) == 128  # ⌈100⌉, to a multiple of 32


def test_the_learning_rate_may_be_a_schedule_over_examples(recipe):
    schedule = optax.linear_schedule(1.0, 0.0, 640)
    _, state = run(recipe(schedule, criterion=CRITERION, **SIZES), draw(6), noise=True)
    np.testing.assert_allclose(metrics(state)["learning_rate"], 0.5, rtol=1e-6)  # 5 · 64 of 640
    assert metrics(state)["num_examples"] == 6 * 64


def test_scaling_starts_from_the_initial_batch_size(recipe):
    gradient = {"w": jnp.array([3.0, 4.0])}
    updates = {}
    for scaling in (None, sqrt_scaling()):
        optimizer = recipe(0.1, criterion=CRITERION, scaling=scaling, **SIZES)
        state, update = optimizer.init(gradient), jax.jit(optimizer.update)
        for examples in (64, 256):
            taken, _ = update(gradient, state, noise=noise_of(gradient, num_examples=examples))
            updates[scaling is not None, examples] = flat(taken)
    np.testing.assert_array_equal(updates[True, 64], updates[False, 64])
    np.testing.assert_array_equal(updates[False, 256], updates[False, 64])
    np.testing.assert_allclose(updates[True, 256], 2 * updates[True, 64], rtol=1e-6)


def test_numbers_may_be_injected(recipe):
    static = ("criterion", "initial_batch_size", "max_batch_size", "scaling", "batch_size_options")
    injected = optax.inject_hyperparams(recipe, static_args=static)
    plain = {"criterion": CRITERION, "multiple_of": 32, **SIZES}
    optimizer, expected = injected(learning_rate=0.1, **plain), recipe(0.2, **plain)
    gradient = {"w": jnp.array([3.0, 4.0])}
    noise = noise_of(gradient, trace=2500.0)
    state = optimizer.init(gradient)
    state.hyperparams["learning_rate"] = jnp.float32(0.2)
    updates, state = jax.jit(optimizer.update)(gradient, state, noise=noise)
    theirs, _ = jax.jit(expected.update)(gradient, expected.init(gradient), noise=noise)
    np.testing.assert_allclose(updates["w"], theirs["w"], rtol=1e-6)
    assert int(get_batch_size(state)) == 128


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"learning_rate": 0.0}, "learning_rate must"),
        ({"learning_rate": float("nan")}, "learning_rate must"),
        ({"initial_batch_size": 0}, "initial_batch_size must"),
        ({"max_batch_size": 32}, "initial_batch_size ≤ max_batch_size"),
        ({"criterion": None}, "criterion must"),
        ({"scaling": "sqrt"}, "scaling must be callable"),
        ({"growth_limit": 0.5}, "growth_limit must"),
        ({"initial_accumulator_value": -1.0}, "initial_accumulator_value must"),
        ({"eps": -1.0}, "eps must"),
    ],
)
def test_arguments_out_of_range_are_named(recipe, arguments, name):
    defaults = {"learning_rate": 0.1, "criterion": CRITERION} | SIZES
    with pytest.raises(ValueError, match=name):
        recipe(**defaults | arguments)


def test_an_unknown_option_is_refused(recipe):
    with pytest.raises(TypeError, match="batch_sise"):
        recipe(0.1, criterion=CRITERION, batch_sise=3, **SIZES)


def test_a_missing_noise_says_how_to_pass_it(recipe):
    optimizer = recipe(0.1, criterion=CRITERION, **SIZES)
    with pytest.raises(ValueError, match="noise=noise"):
        optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)), jnp.ones(1))
