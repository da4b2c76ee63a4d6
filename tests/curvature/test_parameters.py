"""What parameters the curvature may be asked of: real arrays, and a sentence for all else."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import adabatch_jax as adabatch

KEY, GROUPS = jax.random.key(0), jnp.ones((2, 3))
BAD = {
    "complex": (jnp.ones(2, jnp.complex64), "['w'] is complex (complex64)"),
    "integers": (jnp.ones(2, jnp.int32), "['w'] is int32, and must be floating-point"),
    "a key": (KEY, "['w'] is a PRNG key"),
    "a function": (jnp.tanh, "['w'] is no array"),
}


def loss(params, *batch):
    return 0.0


FUNCTIONS = {
    "hessian_vector_product": lambda p: adabatch.curvature.hessian_vector_product(loss, p),
    "gauss_newton_vector_product": lambda p: adabatch.curvature.gauss_newton_vector_product(
        loss, loss, p, GROUPS
    ),
    "lanczos_spectrum": lambda p: adabatch.curvature.lanczos_spectrum(
        lambda v: v, p, KEY, num_steps=2
    ),
    "top_eigenvector": lambda p: adabatch.curvature.top_eigenvector(
        lambda v: v, p, KEY, num_steps=2
    ),
    "hessian_noise": lambda p: adabatch.curvature.hessian_noise(loss, p, GROUPS, KEY),
    "batch_sharpness": lambda p: adabatch.curvature.batch_sharpness(loss, p, GROUPS),
    "scale_by_lanczos": lambda p: adabatch.scale_by_lanczos(refresh_every=1).init(p),
    "scale_by_random_matrix": lambda p: adabatch.scale_by_random_matrix(
        base_batch_size=1, adaptive=False, refresh_every=1
    ).init(p),
    "scale_by_adamp": lambda p: adabatch.optimizers.scale_by_adamp().init(p),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_real_array_is_named(function, kind):
    leaf, message = BAD[kind]
    with pytest.raises(ValueError, match=f"{function}: params{re.escape(message)}"):
        FUNCTIONS[function]({"w": leaf})


def test_a_model_of_equinox_is_told_its_remedy_and_follows_it():
    model = eqx.nn.MLP(2, "scalar", 3, 1, key=KEY)
    whole = lambda m, x: jnp.mean(jax.vmap(m)(x) ** 2)
    with pytest.raises(ValueError, match=r"activation is no array.*eqx\.partition"):
        adabatch.curvature.hessian_vector_product(whole, model, jnp.ones((4, 2)))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    product = adabatch.curvature.hessian_vector_product(
        lambda p, x: whole(eqx.combine(p, rest), x), arrays, jnp.ones((4, 2))
    )
    assert jax.tree.structure(product(arrays)) == jax.tree.structure(arrays)


def test_nothing_healthy_is_nan():
    """Not even on the way: jax_debug_nans looks at every number that leaves a program."""
    with jax.debug_nans(True):
        quadratic = lambda w, x: 0.5 * jnp.mean(x) * jnp.sum(w**2)
        product = adabatch.curvature.hessian_vector_product(quadratic, jnp.ones(3), GROUPS)
        found = adabatch.curvature.lanczos_spectrum(product, jnp.ones(3), KEY, num_steps=4)
        adabatch.curvature.spectral_density(found)
        adabatch.curvature.batch_sharpness(quadratic, jnp.zeros(3), GROUPS)
        for value in (2.0, 0.0, -1.0):
            adabatch.curvature.batch_hessian_extremes(value, 0.0, 0.0, 4)
            adabatch.curvature.full_gauss_newton_extremes(value, 0.0, 0.0)
            adabatch.curvature.max_stable_learning_rate(value, momentum=0.9, nesterov=True)
            adabatch.curvature.transition_batch_size(value, 0.0)


def test_a_start_of_other_shapes_is_named():
    with pytest.raises(ValueError, match=r"start must be like params, .*\(3,\).*, got .*\(2,\)"):
        adabatch.curvature.top_eigenvector(
            lambda v: v, {"w": jnp.ones(3)}, KEY, num_steps=2, start={"w": jnp.ones(2)}
        )


def test_an_axis_that_a_weight_has_not_is_named():
    with pytest.raises(ValueError, match=r"shape \(3, 2\) has no axis channel_axis=2"):
        adabatch.optimizers.scale_by_adamp(channel_axis=2).init(
            {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}
        )


def test_groups_are_asked_for_by_who_needs_them():
    link = adabatch.scale_by_random_matrix(base_batch_size=1, adaptive=False, refresh_every=1)
    w = jnp.ones(2)
    with pytest.raises(
        ValueError, match="scale_by_random_matrix: groups must be at least 2, got 1"
    ):
        link.update(w, link.init(w), w, num_examples=4, loss_fn=loss, groups=GROUPS[:1])
