"""Complex parameters: |x|² is both parts, and inner products are those of the real plane."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import GradientNoise, merge_noise, value_and_grad_noise
from adabatch_jax.noise import value_and_grad_signs
from adabatch_jax.noise._gradient_noise import pool_noise
from adabatch_jax.noise._structured._estimate import value_and_grad_structured

SIZES = (3, 1, 2, 5, 4, 0)


@pytest.fixture(scope="module")
def parts():
    """Six groups with a complex and a real leaf, one of them without examples."""
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(6, 3)) + 1j * rng.normal(size=(6, 3))).astype(np.complex64)
    r = rng.normal(size=(6, 2)).astype(np.float32)
    z[-1] = np.nan
    zeros = {"r": jnp.zeros(2), "z": jnp.zeros(3)}
    return [
        GradientNoise({"r": r[i], "z": z[i]}, jnp.float32(0), n, jnp.int32(n > 0), zeros)
        for i, n in enumerate(jnp.int32(SIZES))
    ]


@pytest.fixture(scope="module")
def expected(parts):
    """The definitions in complex128: mean and scatter by coordinate, the real leaf first."""
    n = np.array(SIZES[:-1])[:, None]
    means = np.stack(
        [np.concatenate([p.mean["r"], p.mean["z"]]) for p in parts[:-1]], dtype=np.complex128
    )
    mean = (n * means).sum(0) / n.sum()
    return mean, (n * np.abs(means - mean) ** 2).sum(0)


def pooled(parts):
    lanes = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    return pool_noise(lanes, jnp.zeros((len(parts), 1)), lambda x: x.sum(0))[0]


def merged(parts):
    return functools.reduce(merge_noise, parts)


@pytest.mark.parametrize("join", [merged, pooled])
def test_merged_noise_is_that_of_the_real_plane(parts, expected, join):
    noise, (mean, squares) = join(parts), expected
    assert noise.mean["z"].dtype == jnp.complex64
    np.testing.assert_allclose(jnp.concatenate([*noise.mean.values()]), mean, rtol=1e-5)
    for name, own in (("r", squares[:2]), ("z", squares[2:])):
        assert noise.coordinate_scatter[name].dtype == jnp.float32
        np.testing.assert_allclose(noise.coordinate_scatter[name], own, rtol=1e-5)
    assert noise.scatter.dtype == noise.trace.dtype == jnp.float32
    np.testing.assert_allclose(noise.scatter, squares.sum(), rtol=1e-5)
    np.testing.assert_allclose(noise.squared_norm, (np.abs(mean) ** 2).sum(), rtol=1e-5)


def test_the_squared_norm_of_one_complex_number():
    assert float(GradientNoise(jnp.complex64(3 + 4j), 0.0, 1, 1).squared_norm) == 25.0


def losses(params, batch):
    """Of single examples: a product of complex numbers, and a real leaf beside it."""
    z, r = params["z"], params["r"]
    x, y = batch
    return jnp.abs(x @ z - y) ** 2 + jnp.real(x @ r.astype(x.dtype)) ** 2


def loss(params, batch):
    return jnp.mean(losses(params, batch))


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(1)

    def draw(*shape):
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)

    params = {"z": jnp.asarray(draw(3)), "r": jnp.array([1.0, -1.0, 0.5])}
    return params, (draw(6, 4, 3), draw(6, 4))


@pytest.mark.parametrize(
    "options", [{}, {"vectorize": 4}, {"lanes": True}], ids=["loop", "vectorize", "lanes"]
)
def test_a_loss_of_complex_parameters(problem, options):
    params, groups = problem
    each = [jax.grad(loss)(params, jax.tree.map(lambda x, j=j: x[j], groups)) for j in range(6)]
    g = np.stack([np.concatenate([x["r"], x["z"]]) for x in each]).astype(np.complex128)
    mean = g.mean(0)
    products = np.real(g.conj() @ mean)  # of R⁹
    if options.get("lanes"):
        groups = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), groups)
    fn = value_and_grad_noise(loss, coordinate_wise=True, inner_products=True, **options)
    value, noise = jax.jit(fn)(params, groups)
    whole = [x.reshape(24, *x.shape[2:]) for x in problem[1]]
    np.testing.assert_allclose(value, loss(params, whole), rtol=1e-5)
    assert noise.mean["z"].dtype == jnp.complex64
    np.testing.assert_allclose(jnp.concatenate([noise.mean["r"], noise.mean["z"]]), mean, rtol=1e-4)
    np.testing.assert_allclose(noise.scatter, 4 * (np.abs(g - mean) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(
        noise.coordinate_scatter["z"], 4 * (np.abs(g - mean) ** 2).sum(0)[3:], rtol=1e-5
    )
    np.testing.assert_allclose(
        noise.inner_product_scatter, 4 * ((products - products.mean()) ** 2).sum(), rtol=1e-4
    )


def spiral(w, x):
    """Real parameters that become complex apart from the example, and inside a scan."""
    turn = jax.lax.complex(w[0], jnp.square(w[1]))
    last, _ = jax.lax.scan(lambda c, a: (c * turn + a, None), jnp.complex64(1), x[0] + 0j)
    return jnp.abs(last) ** 2 + jnp.mean(jnp.abs((x + 2j * x) @ jnp.outer(w, w + 1j * w)) ** 2)


def test_the_structured_form_sees_what_is_complex_on_the_way():
    x, w = jax.random.normal(jax.random.key(0), (5, 1, 3)), jnp.array([0.5, -1.0, 0.3])
    options = {"coordinate_wise": True, "inner_products": True}
    expected, found = (
        jax.jit(f(spiral, **options))(w, x)
        for f in (value_and_grad_noise, value_and_grad_structured)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)
    with pytest.raises(ValueError, match=r"value_and_grad_structured.*got complex64"):
        value_and_grad_structured(loss)({"z": w + 0j, "r": w}, (x, x[..., 0]))


def test_signs_see_both_parts(problem):
    params, groups = problem
    whole = jax.tree.map(lambda x: x.reshape(1, 24, *x.shape[2:]), groups)
    fn = value_and_grad_signs(losses, num_signs=8, coordinate_wise=True)
    keys = jax.random.split(jax.random.key(0), 100)
    noise = jax.jit(jax.vmap(lambda key: fn(params, whole, key)[1]))(keys)
    g = jax.vmap(lambda *x: jax.grad(loss)(params, [a[None] for a in x]))(*(a[0] for a in whole))
    g = np.concatenate([g["r"], g["z"]], 1).astype(np.complex128)
    np.testing.assert_allclose(noise.mean["z"][0], g.mean(0)[3:], rtol=1e-4)
    variance = (np.abs(g - g.mean(0)) ** 2).sum(0) / 23
    found = np.asarray(jax.vmap(lambda n: n.trace)(noise))
    assert abs(found.mean() - variance.sum()) < 4 * found.std() / 10
    by_coordinate = np.asarray(noise.coordinate_scatter["z"]).mean(0) / (noise.num_groups[0] - 1)
    np.testing.assert_allclose(by_coordinate, variance[3:], rtol=0.2)
