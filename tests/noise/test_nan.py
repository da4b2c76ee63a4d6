"""Under `jax_debug_nans` nothing healthy raises an alarm, and what was not measured stays known as such."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import merge_noise, value_and_grad_noise
from adabatch_jax.noise import value_and_grad_signs

GROUPS = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
ALL = {"coordinate_wise": True, "inner_products": True}


def loss_fn(w, x):
    return jnp.mean((x @ w) ** 2)


def losses_fn(w, x):
    return (x @ w) ** 2


@pytest.fixture
def alarmed():
    with jax.debug_nans(True):
        yield


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("options", [{}, {"vectorize": 4}, {"lanes": True}, ALL], ids=str)
def test_what_is_not_measured_is_no_nan(alarmed, options, jit):
    groups = GROUPS.reshape(3, 2, 4, 3) if options.get("lanes") else GROUPS
    fn = value_and_grad_noise(loss_fn, **options)
    run = lambda w, groups, wanted: fn(w, groups, measure=wanted)
    _, noise = (jax.jit(run) if jit else run)(jnp.ones(3), groups, jnp.bool_(False))
    assert float(noise.scatter) == -1
    assert np.isnan(noise.trace)


def test_groups_without_examples_and_single_ones_are_no_alarm(alarmed):
    sizes = np.array([0, 4, 0, 4, 4, 0], np.int32)
    spoilt = GROUPS.copy()
    spoilt[sizes == 0] = np.nan
    for options in ({}, {"vectorize": 4}, ALL):
        _, noise = jax.jit(value_and_grad_noise(loss_fn, **options))(
            jnp.ones(3), spoilt, sizes=sizes
        )
        assert float(noise.trace) > 0
    _, noise = jax.jit(value_and_grad_noise(loss_fn))(jnp.ones(3), GROUPS, count=1)
    assert np.isnan(noise.trace)  # said without an alarm
    _, noise = jax.jit(value_and_grad_signs(losses_fn))(
        jnp.ones(3), spoilt, jax.random.key(0), sizes=sizes
    )
    assert float(noise.trace) > 0


def test_a_merge_with_what_was_not_measured_is_not_measured():
    fn = value_and_grad_noise(loss_fn, coordinate_wise=True)
    known, unknown = (fn(jnp.ones(3), GROUPS, measure=m)[1] for m in (True, False))
    for both in (merge_noise(known, unknown), merge_noise(unknown, known)):
        assert np.isnan(both.trace)
        assert np.all(both.coordinate_scatter == -1)
    none = unknown._replace(num_examples=jnp.int32(0), num_groups=jnp.int32(0))
    assert float(merge_noise(known, none).trace) == float(known.trace)


@pytest.mark.parametrize("options", [{"lanes": True}, ALL], ids=str)
def test_without_jit_it_is_the_same(options):
    groups = GROUPS[:4].reshape(2, 2, 4, 3) if options.get("lanes") else GROUPS[:3]
    fn = value_and_grad_noise(loss_fn, **options)
    run = lambda: fn(jnp.ones(3), groups, count=2, measure=jnp.bool_(True))
    expected = jax.jit(run)()
    with jax.disable_jit():
        found = run()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, expected)
