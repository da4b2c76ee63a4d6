"""`value_and_grad_structured` with counts, sizes, chunks, aux, `measure=`; errors; `explain_noise`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import split_groups, value_and_grad_noise
from adabatch_jax.noise._structured._estimate import below_resolution, value_and_grad_structured
from adabatch_jax.noise._structured._explain import explain_noise
from tests.marks import slow

N = 7
ALL = {"coordinate_wise": True, "inner_products": True}


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(jnp.dot(x, params["in"]) + params["bias"][None])
    return jnp.mean(jnp.square(jnp.dot(hidden, params["out"]) - y))


def loss_and_aux(params, batch):
    value = loss_fn(params, batch)
    return value, {"double": 2 * value, "large": (batch[1] > 0.0,) * 2}


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"in": (3, 5), "bias": (5,), "out": (5,)}
    return {k: jax.random.normal(key, s) for key, (k, s) in zip(keys, shapes.items(), strict=True)}


@pytest.fixture(scope="module")
def groups():
    x, y = (jax.random.normal(jax.random.key(k), (N, 3)[: 3 - k]) for k in (1, 2))
    return split_groups((x, y), N)


def assert_equal(found, expected, rtol=1e-5):
    (a, noise), (b, other) = found, expected
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), (a, noise), (b, other)
    )


@pytest.mark.parametrize("chunk", [3, *slow(None, 1)])
def test_counts_sizes_and_chunks_are_those_of_the_loop(params, groups, chunk):
    """What does not count is NaN here."""
    options = {"has_aux": True, "sum_aux": {"double": False, "large": (True, False)}, **ALL}
    loop = jax.jit(value_and_grad_noise(loss_and_aux, **options))
    measure = value_and_grad_structured(loss_and_aux, vectorize=chunk, **options)
    fn = jax.jit(measure)
    sizes = jnp.array([0, 1, 1, 0, 1, 1, 1])
    spoilt = (groups[0].at[jnp.array([0, 3, 6])].set(jnp.nan), groups[1])
    for count in (6, 3, 0):
        expected = loop(params, spoilt, count=count, sizes=sizes)
        assert_equal(fn(params, spoilt, count=count, sizes=sizes), expected)
    assert fn._cache_size() == 1
    none = fn(params, spoilt, count=0, sizes=sizes)
    assert np.isnan(none[0][0])
    assert not any(np.any(x) for x in jax.tree.leaves(none[1].mean))
    assert_equal(measure(params, groups), loop(params, groups))


@pytest.mark.parametrize("chunk", [3, *slow(None)])
def test_a_step_that_does_not_measure_has_value_and_gradient_alone(params, groups, chunk):
    fn = value_and_grad_structured(loss_fn, vectorize=chunk, **ALL)
    traced = jax.jit(lambda wanted: fn(params, groups, measure=wanted))
    always = fn(params, groups)
    measured, not_measured = traced(jnp.bool_(True)), traced(jnp.bool_(False))
    assert traced._cache_size() == 1
    assert_equal(measured, always)
    np.testing.assert_allclose(not_measured[0], always[0], rtol=1e-5)
    noise = not_measured[1]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        noise.mean,
        always[1].mean,
    )
    for statistic in jax.tree.leaves((noise.scatter, noise.coordinate_scatter, noise[5])):
        assert np.all(statistic == -1)


def test_bfloat16_parameters_have_float32_statistics(params, groups):
    small = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), groups)
    _, noise = jax.jit(value_and_grad_structured(loss_fn, **ALL))(small, batch)
    again = jax.tree.map(lambda p: p.astype(jnp.float32), (small, batch))
    _, expected = value_and_grad_noise(loss_fn, **ALL)(*again)
    assert {x.dtype for x in jax.tree.leaves(noise.mean)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(noise.coordinate_scatter)} == {jnp.dtype(jnp.float32)}
    for a, b in zip(jax.tree.leaves(noise[1:6]), jax.tree.leaves(expected[1:6]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * float(np.max(b)))


def test_noise_that_float32_cannot_resolve_is_marked():
    def loss(w, x):
        return jnp.mean(w * x)

    fn = jax.jit(value_and_grad_structured(loss))
    for spread, below in ((0.1, False), (1e-5, True)):
        x = split_groups(1.0 + spread * jnp.array([-1.0, 1.0, -1.0, 1.0]), 4)
        noise = fn(jnp.float32(1.0), x)[1]
        assert bool(below_resolution(noise)) is below
        assert noise.scatter >= 0


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"vectorize": 0}, {}, "vectorize"),
        ({}, {"groups": jnp.ones((3, 2, 3))}, "groups of one example"),
        ({}, {"params": jnp.arange(3)}, "int32"),
        ({}, {"groups": jnp.zeros((4, 1, 3), jnp.int32)}, "does not depend on the example"),
    ],
)
def test_what_it_cannot_do_is_named(options, given, message):
    given = {"params": jnp.ones(3), "groups": jnp.ones((4, 1, 3))} | given

    def loss(w, x):
        return jnp.mean(jnp.dot(x, w) if jnp.issubdtype(x.dtype, jnp.floating) else w)

    with pytest.raises(ValueError, match=message):
        value_and_grad_structured(loss, **options)(**given)


def test_the_plan_in_words(capsys):
    def loss(params, x):
        x = jnp.dot(x, params["in"]) + params["bias"][None]
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(jnp.dot(x, w)), None), x, params["layers"])
        x = jnp.maximum(x, params["floor"][None])
        twice = jnp.dot(x, params["tied"]) + jnp.dot(x, jnp.exp(params["tied"]))
        return jnp.mean(twice)

    shapes = {
        "in": (3, 4),
        "bias": (4,),
        "layers": (2, 4, 4),
        "floor": (4,),
        "tied": (4,),
        "no": (1,),
    }
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    explain_noise(loss, params, jax.ShapeDtypeStruct((1, 3), jnp.float32))
    assert capsys.readouterr().out.splitlines() == [
        "['bias']    [4]        direct   add",
        "['floor']   [4]        direct   max",
        "['in']      [3, 4]     formula  dot_general, ‖x‖²·‖δ‖²",
        "['layers']  [2, 4, 4]  direct   scan, again for every example",
        "['no']      [1]        unused   the loss does not depend on it",
        "['tied']    [4]        direct   2 uses: dot_general, dot_general",
    ]
