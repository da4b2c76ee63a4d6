"""Mistakes that are easily made get a sentence with the remedy in it, not an error from inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import split_groups, value_and_grad_noise
from adabatch_jax.noise import value_and_grad_signs

GROUPS = jnp.ones((4, 2, 3))


@pytest.mark.parametrize(
    ("loss_fn", "options", "words"),
    [
        (lambda w, x: (x @ w) ** 2, {}, r"real floating-point scalar.*jnp.mean.*float32\[2\]"),
        (lambda w, x: jnp.mean(x @ w)[None], {}, r"scalar.*float32\[1\]"),
        (lambda w, x: (jnp.mean(x @ w), 1), {}, "one array.*tuple.*has_aux=True"),
        (lambda w, x: jnp.mean(x @ w), {"has_aux": True}, r"must return \(loss, aux\)"),
        (lambda w, x: jnp.mean(x @ w) + 0j, {}, "real number.*jnp.real.*complex64"),
        (lambda w, x: jnp.int32(1), {}, r"real floating-point scalar.*int32"),
    ],
    ids=["vector", "shape_1", "aux_unasked", "no_aux", "complex", "integer"],
)
def test_what_the_loss_returns(loss_fn, options, words):
    with pytest.raises(ValueError, match=rf"value_and_grad_noise: .*{words}"):
        jax.jit(value_and_grad_noise(loss_fn, **options))(jnp.ones(3), GROUPS)


def test_what_the_losses_return():
    for losses, words in (
        (lambda w, x: (x @ w, 1), "has_aux=True"),
        (lambda w, x: x @ w + 0j, "complex"),
    ):
        with pytest.raises(ValueError, match=rf"value_and_grad_signs: .*{words}"):
            value_and_grad_signs(losses)(jnp.ones(3), GROUPS, jax.random.key(0))


FACTORIES = {
    "groups": lambda f: value_and_grad_noise(f),
    "signs": lambda f: lambda p, g: value_and_grad_signs(f)(p, g, jax.random.key(0)),
}


@pytest.mark.parametrize("kind", FACTORIES)
@pytest.mark.parametrize("leaf", [jax.nn.relu, "relu"], ids=["function", "string"])
def test_a_leaf_that_is_no_array_names_the_partition(kind, leaf):
    params = {"w": jnp.ones(3), "activation": leaf}
    with pytest.raises(ValueError, match=r"params\['activation'\] is no array.*eqx.partition"):
        FACTORIES[kind](lambda p, x: jnp.mean(x @ p["w"]))(params, GROUPS)
    with pytest.raises(ValueError, match=r"groups\[1\] is no array"):
        FACTORIES[kind](lambda p, x: jnp.mean(x[0] @ p))(jnp.ones(3), (GROUPS, jnp.mean))


@pytest.mark.parametrize("kind", FACTORIES)
def test_an_integer_has_no_gradient(kind):
    params = {"w": jnp.ones(3), "count": jnp.int32(1)}
    with pytest.raises(ValueError, match=r"params\['count'\] is int32.*trained=False.*nnx.split"):
        FACTORIES[kind](lambda p, x: jnp.mean(x @ p["w"]))(params, GROUPS)


def test_aux_that_is_no_array_is_named():
    fn = value_and_grad_noise(lambda w, x: (jnp.mean(x @ w), {"f": jnp.mean}), has_aux=True)
    with pytest.raises(ValueError, match=r"aux\['f'\] is no array"):
        fn(jnp.ones(3), GROUPS)


def test_equinox_model():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))

    def loss_fn(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    with pytest.raises(ValueError, match=r"activation is no array.*eqx.partition"):
        value_and_grad_noise(loss_fn)(model, GROUPS)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    fn = jax.jit(value_and_grad_noise(lambda p, x: loss_fn(eqx.combine(p, static), x)))
    value, noise = fn(params, GROUPS)
    whole = jax.value_and_grad(lambda p: loss_fn(eqx.combine(p, static), GROUPS.reshape(8, 3)))
    true, gradient = whole(params)
    np.testing.assert_allclose(value, true, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), noise.mean, gradient)
    handed = value_and_grad_noise(lambda p, x, static: loss_fn(eqx.combine(p, static), x))
    np.testing.assert_allclose(handed(params, GROUPS, static)[0], true, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.* is a PRNG key, the same in every group:UserWarning")
def test_nnx_model():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 1, rngs=rngs)
            self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.linear(self.norm(x)))

    x = jax.random.normal(jax.random.key(0), (4, 2, 3))
    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"uint32.*nnx.split.*copy=True"):
        value_and_grad_noise(lambda m, x: jnp.mean(m(x) ** 2))(model, x)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, x, rest, copy=True):
        model = nnx.merge(graphdef, params, rest, copy=copy)
        loss = jnp.mean(model(x) ** 2)
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    with pytest.raises(Exception, match="trace level") as caught:
        value_and_grad_noise(lambda p, x: loss_fn(p, x, rest, copy=False)[0])(params, x)
    assert "copy=True" in caught.value.__notes__[0]
    # The state advances as in one step: counts by one call, statistics by the mean over the groups.
    fn = jax.jit(value_and_grad_noise(loss_fn, has_aux=True))
    (_, new), _ = fn(params, split_groups(x.reshape(8, 3), 4), rest)
    _, once = loss_fn(params, x[0], rest)
    assert (
        int(new["dropout"]["rngs"]["count"][...]) == int(once["dropout"]["rngs"]["count"][...]) == 1
    )
    np.testing.assert_allclose(new["norm"]["mean"][...], 0.1 * x.mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_a_key_that_all_groups_share_is_told(key):
    def loss(w, group, state):
        return jnp.mean(w @ group * jax.random.bernoulli(state["key"]))

    fn = value_and_grad_noise(loss)
    state = {"count": jnp.uint32(2), "key": key}
    with pytest.warns(UserWarning, match=r"args\[0\]\['key'\] is a PRNG key.*split\(key") as told:
        jax.eval_shape(lambda w: fn(w, GROUPS, state), jnp.ones(2))
    assert len(told) == 1 and told[0].filename == __file__
