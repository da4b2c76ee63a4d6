"""The models of images: shapes, sizes, one example at a time, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax.training.models import build_model
from tests.marks import slow

NAMES = ("logistic", "mlp", "cnn", "resnet")
SIDES = (8, 28)


def images(number, side):
    values = np.random.Generator(np.random.Philox(0)).random((number, side, side))
    return jnp.asarray(values, jnp.float32)


def num_parameters(name, side):
    shapes = {
        "logistic": [(side**2, 10), (10,)],
        "mlp": [(side**2, 256), (256,), (256, 10), (10,)],
        "cnn": [
            *[(3, 3, 1, 32), (32,), (3, 3, 32, 64), (64,)],
            *[((side // 4) ** 2 * 64, 128), (128,), (128, 10), (10,)],
        ],
        "resnet": [
            *[(3, 3, 1, 8), (3, 3, 8, 8), (3, 3, 8, 8)],
            *[(3, 3, 8, 16), (3, 3, 16, 16), (8, 16)],
            *[(3, 3, 16, 32), (3, 3, 32, 32), (16, 32)],
            *[(2, c) for c in (8, 8, 8, 16, 16, 32, 32)],
            *[(32, 10), (10,)],
        ],
    }
    return sum(int(np.prod(shape)) for shape in shapes[name])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_sizes(name, side):
    # Rank promotion raises in every test, so this also shows that no model relies on it.
    model = build_model(name, num_classes=10)
    batch = jax.ShapeDtypeStruct((3, side, side), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    logits = jax.eval_shape(model.apply, variables, batch)
    assert logits.shape == (3, 10)
    assert logits.dtype == jnp.float32
    assert set(variables) == {"params"}, "no running statistics"
    leaves = jax.tree.leaves(variables)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == num_parameters(name, side)


@pytest.fixture(scope="module", params=[*NAMES[:-1], *slow("resnet")])
def initialised(request):
    model = build_model(request.param, num_classes=3)
    return model, jax.jit(model.init)(jax.random.key(0), images(1, 8))


def test_examples_do_not_see_each_other(initialised):
    # What batch normalisation would break, and with it every estimate of one example's noise.
    model, variables = initialised
    inputs = images(4, 8)
    apply = jax.jit(model.apply)
    together = apply(variables, inputs)
    changed = apply(variables, inputs.at[1:].multiply(-3.0))
    np.testing.assert_allclose(together[0], changed[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(together[1:], changed[1:], rtol=1e-2), "the inputs matter"


def test_every_parameter_learns(initialised):
    model, variables = initialised
    inputs, labels = images(6, 8), jnp.arange(6) % 3

    @jax.jit
    @jax.value_and_grad
    def loss(variables):
        logits = model.apply(variables, inputs)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    before, gradient = loss(variables)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradient))
    after, _ = loss(jax.tree.map(lambda p, g: p - 1e-2 * g, variables, gradient))
    assert after < before


def test_wrong_arguments_are_named():
    names = "'logistic', 'mlp', 'cnn', 'resnet', 'transformer', got 'rnn'"
    with pytest.raises(ValueError, match=names):
        build_model("rnn", 10)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        build_model("mlp", 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "inputs", [np.zeros((2, 8, 8), np.uint8), np.zeros((8, 8), np.float32)], ids=("uint8", "rank 2")
)
def test_wrong_inputs_are_refused(name, inputs):
    with pytest.raises(ValueError, match=r"floats of shape \[B, H, W\].* got"):
        build_model(name, 10).init(jax.random.key(0), jnp.asarray(inputs))
