"""`trained=`: frozen parameters have no gradient, no noise, and can do no harm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import split_groups, value_and_grad_noise
from adabatch_jax.noise import value_and_grad_signs
from adabatch_jax.noise._structured._estimate import value_and_grad_structured

ALL = {"coordinate_wise": True, "inner_products": True}
TRAINED = {"head": True, "body": False, "step": False, "none": None}


def losses_fn(params, batch):
    x, y = batch
    # The root has no derivative at 0, and a frozen NaN gradient is none of ours.
    hidden = x @ params["body"]["w"] + jnp.sqrt(jnp.sum(params["body"]["b"] ** 2)) + params["step"]
    return (hidden @ params["head"]["w"] + params["head"]["b"] - y) ** 2


def loss_fn(params, batch):
    return jnp.mean(losses_fn(params, batch))


@pytest.fixture(scope="module")
def params():
    body = {"w": jax.random.normal(jax.random.key(0), (3, 4)), "b": jnp.zeros(4)}
    head = {"w": jnp.arange(4.0) - 1.0, "b": jnp.float32(0.5)}
    return {"body": body, "head": head, "step": jnp.int32(2), "none": None}


@pytest.fixture(scope="module")
def batch():
    return jax.random.normal(jax.random.key(1), (8, 3)), jax.random.normal(jax.random.key(2), (8,))


def only_head(params, form):
    """The same, with the frozen parameters as constants of the loss."""
    fn = losses_fn if form == "signs" else loss_fn
    return lambda head, group: fn({**params, "head": head}, group)


FORMS = {
    "loop": lambda f, **o: value_and_grad_noise(f, **ALL, **o),
    "lanes": lambda f, **o: value_and_grad_noise(f, **ALL, lanes=True, **o),
    "signs": lambda f, **o: value_and_grad_signs(f, coordinate_wise=True, **o),
    "structured": lambda f, **o: value_and_grad_structured(f, **ALL, **o),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_noise_is_that_of_the_trained_part(params, batch, form):
    groups = split_groups(batch, 8 if form == "structured" else 4)
    if form == "lanes":
        groups = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), groups)
    key = [jax.random.key(0)] if form == "signs" else []
    fn = FORMS[form](losses_fn if form == "signs" else loss_fn, trained=TRAINED)
    value, noise = jax.jit(fn)(params, groups, *key)
    alone = FORMS[form](only_head(params, form))
    true, expected = jax.jit(alone)(params["head"], groups, *key)
    np.testing.assert_allclose(value, true, rtol=1e-6)
    for name in ("mean", "coordinate_scatter"):
        found = getattr(noise, name)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        assert not any(np.any(x) for x in jax.tree.leaves((found["body"], found["step"])))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
            found["head"],
            getattr(expected, name),
        )
    assert jax.tree.map(lambda x: x.dtype, noise.mean) == jax.tree.map(lambda x: x.dtype, params)
    np.testing.assert_allclose(noise.scatter, expected.scatter, rtol=1e-6)
    np.testing.assert_allclose(noise.squared_norm, expected.squared_norm, rtol=1e-6)
    if form != "signs":
        np.testing.assert_allclose(
            noise.inner_product_scatter, expected.inner_product_scatter, rtol=1e-5
        )


@pytest.mark.usefixtures("optimized")
def test_nothing_is_computed_for_what_is_frozen(params, batch):
    params = {**params, "step": jnp.float32(2.0)}
    groups = split_groups(batch, 4)

    def flops(trained):
        fn = value_and_grad_noise(loss_fn, trained=trained)
        compiled = jax.jit(fn).lower(params, groups).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(TRAINED) < 0.8 * flops(True)


@pytest.mark.parametrize("trained", [False, {"a": False, "b": False}], ids=["prefix", "leaves"])
def test_with_nothing_to_train_there_is_no_gradient(trained):
    fn = value_and_grad_noise(lambda p, x: jnp.mean(p["a"] * x + p["b"]), trained=trained)
    value, noise = jax.jit(fn)({"a": jnp.float32(1), "b": jnp.float32(1)}, jnp.ones((4, 2)))
    assert float(value) == 2.0
    assert float(noise.scatter) == float(noise.squared_norm) == 0.0
    assert {float(x) for x in noise.mean.values()} == {0.0}


@pytest.mark.parametrize("factory", [value_and_grad_noise, value_and_grad_signs])
def test_marks_that_are_no_bools_are_named(factory):
    with pytest.raises(ValueError, match=rf"{factory.__name__}: trained must hold bools.*got 1"):
        factory(loss_fn, trained={"head": 1})


def test_marks_of_another_structure_are_named(params, batch):
    fn = value_and_grad_noise(loss_fn, trained={"head": True})
    with pytest.raises(
        ValueError, match="value_and_grad_noise: trained must be a bool or a pytree"
    ):
        fn(params, split_groups(batch, 4))
