"""Strict promotion of dtypes, with float64 off and on: every dtype is the one that is promised."""

import jax
import jax.numpy as jnp
import pytest

from adabatch_jax import merge_noise, value_and_grad_noise
from adabatch_jax.noise import value_and_grad_signs

TRAINED = {"z": True, "r": True, "half": False, "count": False}


def losses_fn(params, x):
    return jnp.abs(x.astype(jnp.complex64) @ params["z"]) ** 2 + (x @ params["r"]) ** 2


def loss_fn(params, x):
    aux = {"int": jnp.int32(1), "flag": jnp.bool_(True), "half": jnp.bfloat16(2)}
    aux |= {"key": jax.random.key(0), "byte": jnp.uint8(3), "z": jnp.complex64(1j)}
    return jnp.mean(losses_fn(params, x)), aux


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("sum_aux", [False, True], ids=["taken", "summed"])
def test_every_dtype_is_chosen(x64, sum_aux):
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        params = {"z": jnp.ones(3, jnp.complex64), "r": jnp.ones(3, jnp.float32)}
        params |= {"half": jnp.ones(2, jnp.bfloat16), "count": jnp.int32(3)}
        x = jnp.ones((3, 2, 4, 3), jnp.float32)
        for options in ({}, {"vectorize": 2}, {"lanes": True}):
            fn = value_and_grad_noise(
                loss_fn,
                has_aux=True,
                sum_aux=sum_aux,
                trained=TRAINED,
                coordinate_wise=True,
                inner_products=True,
                **options,
            )
            groups = x if "lanes" in options else x[:, 0]
            run = lambda m, fn=fn, groups=groups: fn(params, groups, measure=m)
            (value, aux), noise = jax.eval_shape(run, jnp.bool_(True))
            assert value.dtype == jnp.float32
            dtypes = {k: a.dtype for k, a in aux.items() if k != "key"}
            small = jnp.int32 if sum_aux else None
            expected = {"int": jnp.int32, "flag": small or bool, "byte": small or jnp.uint8}
            assert dtypes == expected | {"half": jnp.bfloat16, "z": jnp.complex64}
            assert jnp.issubdtype(aux["key"].dtype, jax.dtypes.prng_key)
            assert jax.tree.map(lambda m: m.dtype, noise.mean) == jax.tree.map(
                lambda p: p.dtype, params
            )
            statistics = noise.scatter, noise.coordinate_scatter, noise.inner_product_scatter
            assert {s.dtype for s in jax.tree.leaves(statistics)} == {jnp.dtype(jnp.float32)}
        fn = value_and_grad_signs(losses_fn, trained=TRAINED, coordinate_wise=True)
        _, noise = jax.eval_shape(lambda: fn(params, x[:, 0], jax.random.key(0)))
        assert jax.eval_shape(merge_noise, noise, noise).scatter.dtype == jnp.float32
