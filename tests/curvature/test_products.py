"""Products with curvature matrices against dense ones, for plain functions and both APIs of Flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import adabatch_jax as adabatch
from tests.marks import slow

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (24, 5))
Y = jnp.arange(24) % 3
PARAMS = {
    "w": 0.5 * jax.random.normal(jax.random.key(1), (5, 4)),
    "v": 0.5 * jax.random.normal(jax.random.key(2), (4, 3)),
}


def model(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def loss(params, x, y):
    return cross_entropy(model(params, x), y)


def dense(operator, params):
    flat, unravel = ravel_pytree(params)
    columns = jax.vmap(lambda e: ravel_pytree(operator(unravel(e)))[0])
    return np.asarray(columns(jnp.eye(flat.size)))


def dense_hessian(params=PARAMS, x=X, y=Y):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda p: loss(unravel(p), x, y)))(flat))


def dense_gauss_newton():
    flat, unravel = ravel_pytree(PARAMS)
    logits = model(PARAMS, X)
    jacobian = jax.jacobian(lambda p: model(unravel(p), X).reshape(-1))(flat)
    middle = jax.hessian(lambda z: cross_entropy(z.reshape(logits.shape), Y))(logits.reshape(-1))
    return np.asarray(jacobian.T @ middle @ jacobian)


def split(tree, num):
    return jax.tree.map(lambda a: a.reshape(num, -1, *a.shape[1:]), tree)


def test_the_hessian_is_jax_s():
    got = dense(adabatch.curvature.hessian_vector_product(loss, PARAMS, X, Y), PARAMS)
    np.testing.assert_allclose(got, dense_hessian(), atol=1e-6)


def test_the_gauss_newton_matrix_is_the_dense_one_and_has_no_negative_eigenvalue():
    operator = adabatch.curvature.gauss_newton_vector_product(model, cross_entropy, PARAMS, X, Y)
    got = dense(operator, PARAMS)
    np.testing.assert_allclose(got, dense_gauss_newton(), atol=1e-6)
    assert np.linalg.eigvalsh(got)[0] > -1e-6


@pytest.mark.parametrize("count", [3, *slow(1, 6)])
def test_micro_batches_add_up_to_the_examples_that_are_counted(count):
    x, y = split((X, Y), 6)
    used = 4 * count
    hessian = adabatch.curvature.hessian_vector_product(loss, PARAMS, x, y, count=count)
    np.testing.assert_allclose(
        dense(hessian, PARAMS), dense_hessian(x=X[:used], y=Y[:used]), atol=1e-6
    )
    gauss_newton = adabatch.curvature.gauss_newton_vector_product(
        model, cross_entropy, PARAMS, x, y, count=count
    )
    expected = adabatch.curvature.gauss_newton_vector_product(
        model, cross_entropy, PARAMS, X[:used], Y[:used]
    )
    np.testing.assert_allclose(dense(gauss_newton, PARAMS), dense(expected, PARAMS), atol=1e-6)


def test_one_compilation_serves_every_count_and_what_is_left_out_may_be_nan():
    x, y = split((X, Y), 6)
    x = x.at[4:].set(jnp.nan)

    @jax.jit
    def product(params, x, y, count, v):
        return adabatch.curvature.hessian_vector_product(loss, params, x, y, count=count)(v)

    for count in (0, 2, 4):
        got = ravel_pytree(product(PARAMS, x, y, count, PARAMS))[0]
        v = ravel_pytree(PARAMS)[0]
        used = 4 * count
        expected = dense_hessian(x=X[:used], y=Y[:used]) @ v if count else np.zeros(v.size)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert product._cache_size() == 1


@pytest.mark.usefixtures("optimized")
def test_memory_does_not_grow_with_the_number_of_micro_batches():
    def temporary(num):
        x, y = jnp.zeros((num, 256, 5)), jnp.zeros((num, 256), jnp.int32)
        fn = lambda p, x, y, v: adabatch.curvature.hessian_vector_product(loss, p, x, y, count=num)(
            v
        )
        return (
            jax.jit(fn).lower(PARAMS, x, y, PARAMS).compile().memory_analysis().temp_size_in_bytes
        )

    assert temporary(32) <= 1.1 * temporary(2)


def test_an_operator_is_an_argument_like_any_other():
    apply = jax.jit(lambda operator, v: operator(v))
    for scale in (1.0, 2.0):
        params = jax.tree.map(lambda p, s=scale: s * p, PARAMS)
        got = apply(adabatch.curvature.hessian_vector_product(loss, params, X, Y), PARAMS)
        expected = dense_hessian(params) @ ravel_pytree(PARAMS)[0]
        np.testing.assert_allclose(ravel_pytree(got)[0], expected, atol=1e-5)
    assert apply._cache_size() == 1


def test_bfloat16_parameters_give_float32_products():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    x, y = split((X.astype(jnp.bfloat16), Y), 6)
    got = adabatch.curvature.hessian_vector_product(loss, params, x, y, count=6)(PARAMS)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {"float32"}
    expected = dense_hessian() @ ravel_pytree(PARAMS)[0]
    np.testing.assert_allclose(ravel_pytree(got)[0], expected, atol=0.03)


def test_flax_linen():
    net = nn.Dense(3, use_bias=False)
    params = net.init(KEY, X)
    operator = adabatch.curvature.hessian_vector_product(
        lambda p, x, y: cross_entropy(net.apply(p, x), y), params, X, Y
    )
    got = dense(operator, params)
    np.testing.assert_allclose(got, got.T, atol=1e-6)
    assert np.linalg.eigvalsh(got)[-1] > 0.1


def test_flax_nnx():
    net = nnx.Linear(5, 3, use_bias=False, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(net)

    def of_state(state, x, y):
        return cross_entropy(nnx.merge(graphdef, state)(x), y)

    got = dense(adabatch.curvature.hessian_vector_product(of_state, params, X, Y), params)
    kernel = net.kernel[...]
    expected = adabatch.curvature.hessian_vector_product(
        lambda w, x, y: cross_entropy(x @ w, y), kernel, X, Y
    )
    np.testing.assert_allclose(got, dense(expected, kernel), atol=1e-6)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="loss_fn must be callable, got 3"):
        adabatch.curvature.hessian_vector_product(3, PARAMS, X, Y)
    with pytest.raises(ValueError, match="same leading axis, got shapes"):
        adabatch.curvature.hessian_vector_product(loss, PARAMS, X, Y[:3], count=2)
    with pytest.raises(ValueError, match="must start with the inputs"):
        adabatch.curvature.gauss_newton_vector_product(model, cross_entropy, PARAMS)
