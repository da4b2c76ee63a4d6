"""`value_and_grad_noise`: what it returns, against NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import split_groups, value_and_grad_noise


def location_loss(w, x):
    """Half the mean squared distance: the gradient of one example is `w - x`."""
    return 0.5 * jnp.mean(jnp.sum((w[None] - x) ** 2, axis=-1))


def test_groups_of_one_give_the_statistics_of_single_examples(regression, assert_same, flat):
    batch = regression.draw(0, num_groups=64, group_size=1)
    fn = value_and_grad_noise(regression.loss, coordinate_wise=True, inner_products=True)
    value, noise = jax.jit(fn)(regression.params, batch)
    expected = regression.expected(batch)
    assert_same(noise, expected)
    np.testing.assert_allclose(value, expected.value, rtol=1e-5)
    # Spelled out once with NumPy's own variance: ddof 1, over examples.
    examples = np.concatenate([np.ones((64, 1)), batch["x"][:, 0]], 1, dtype=np.float64)
    examples *= (examples @ flat(regression.params) - batch["y"][:, 0])[:, None]
    np.testing.assert_allclose(noise.trace, examples.var(0, ddof=1).sum(), rtol=1e-5)
    along = (examples @ examples.mean(0)).var(ddof=1)
    np.testing.assert_allclose(noise.variance(noise.inner_product_scatter), along, rtol=1e-5)
    coordinates = jax.tree.map(noise.variance, noise.coordinate_scatter)
    np.testing.assert_allclose(flat(coordinates), examples.var(0, ddof=1), rtol=1e-5)


def test_closed_form_of_four_numbers():
    x = jnp.array([[1.0], [3.0], [5.0], [7.0]])
    value, noise = value_and_grad_noise(location_loss)(jnp.zeros(1), split_groups(x, 2))
    assert float(value) == 10.5
    assert noise.mean.tolist() == [-4.0]
    assert float(noise.scatter) == 2 * (2.0**2 + 2.0**2)  # group means 2 and 6 around 4
    assert (int(noise.num_examples), int(noise.num_groups)) == (4, 2)


def test_the_gradient_is_that_of_the_whole_batch(regression, measure):
    groups = regression.draw(1, num_groups=6, group_size=3)
    (value, _), noise = measure(groups)
    batch = {k: v.reshape((18, *v.shape[2:])) for k, v in groups.items()}
    expected_value, expected = jax.value_and_grad(regression.loss)(regression.params, batch)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), noise.mean, expected)


def test_what_was_not_asked_for_is_none(regression):
    fn = jax.jit(value_and_grad_noise(regression.loss))
    _, noise = fn(regression.params, regression.draw(2, num_groups=3, group_size=2))
    assert noise.coordinate_scatter is None
    assert noise.inner_product_scatter is None


def test_without_sizes_every_row_counts(regression):
    groups = regression.draw(3, num_groups=4, group_size=5)
    fn = value_and_grad_noise(regression.loss, lanes=True)
    _, noise = jax.jit(fn)(regression.params, {k: v[:, None] for k, v in groups.items()})
    assert (int(noise.num_examples), int(noise.num_groups)) == (20, 4)


def test_extra_arguments_reach_every_group_unchanged(regression):
    groups = regression.draw(5, num_groups=4, group_size=2)

    def scaled(params, group, factor, tree):
        return factor * tree["two"] * regression.loss(params, group)

    plain_value, plain = jax.jit(value_and_grad_noise(regression.loss))(regression.params, groups)
    fn = jax.jit(value_and_grad_noise(scaled, inner_products=True))
    value, noise = fn(regression.params, groups, jnp.float32(3.0), {"two": 2.0})
    np.testing.assert_allclose(value, 6 * plain_value, rtol=1e-6)
    np.testing.assert_allclose(noise.scatter, 36 * plain.scatter, rtol=1e-5)


@pytest.mark.parametrize("raw", [False, True], ids=["typed_keys", "raw_keys"])
def test_a_group_may_carry_a_random_key(raw, flat):
    keys = jax.random.split(jax.random.key(0), 5)
    x = np.random.default_rng(6).normal(size=(5, 2, 3)).astype(np.float32)

    def loss(w, group):
        key = jax.random.wrap_key_data(group["key"]) if raw else group["key"]
        return jnp.mean(group["x"] @ (w * jax.random.normal(key, (3,))))

    groups = {"x": x, "key": jax.random.key_data(keys) if raw else keys}
    _, noise = jax.jit(value_and_grad_noise(loss))(jnp.ones(3), groups)
    draws = np.stack([jax.random.normal(k, (3,)) for k in keys])
    gradients = x.mean(1) * draws
    np.testing.assert_allclose(noise.mean, gradients.mean(0), rtol=1e-5)
    scatter = 2 * ((gradients - gradients.mean(0)) ** 2).sum()
    np.testing.assert_allclose(noise.scatter, scatter, rtol=1e-5)
    assert int(noise.num_examples) == 10


def test_bfloat16_parameters_have_float32_statistics():
    # x and `w - x` are representable in bfloat16: only the accumulation could lose anything.
    x = np.random.default_rng(7).integers(128, 256, (512, 1, 4)).astype(np.float32)
    fn = value_and_grad_noise(location_loss, coordinate_wise=True, inner_products=True)
    _, noise = jax.jit(fn)(jnp.zeros(4, jnp.bfloat16), x)
    assert noise.mean.dtype == jnp.bfloat16
    for part in (noise.scatter, noise.coordinate_scatter, noise.inner_product_scatter):
        assert part.dtype == jnp.float32
    gradients = -x[:, 0].astype(np.float64)
    np.testing.assert_allclose(noise.mean, gradients.mean(0), rtol=2**-8)
    coordinates = gradients.var(0, ddof=1)
    np.testing.assert_allclose(noise.variance(noise.coordinate_scatter), coordinates, rtol=1e-5)
    np.testing.assert_allclose(noise.trace, coordinates.sum(), rtol=1e-5)


def test_tiny_noise_on_a_large_mean_survives_float32():
    x = (1000 + 0.01 * np.random.default_rng(8).normal(size=(256, 1, 5))).astype(np.float32)
    _, noise = jax.jit(value_and_grad_noise(location_loss))(jnp.zeros(5), x)
    true = x[:, 0].astype(np.float64).var(0, ddof=1).sum()
    np.testing.assert_allclose(noise.trace, true, rtol=1e-3)
    mean = x[:, 0].mean(0, dtype=np.float32)
    subtracted = (np.sum(x**2) - np.float32(256) * np.sum(mean**2)) / np.float32(255)
    assert abs(subtracted - true) > 10 * true  # the textbook formula has lost everything


def test_parameters_may_be_python_floats_as_for_jax_value_and_grad():
    value, noise = value_and_grad_noise(lambda w, x: jnp.mean((w - x) ** 2))(1.0, jnp.zeros((4, 2)))
    assert (float(value), float(noise.mean)) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"vectorize": 0}, "vectorize"), ({"vectorize": 2, "lanes": True}, "vectorize=2")],
)
def test_bad_options_are_named(options, argument, regression):
    with pytest.raises(ValueError, match=argument):
        value_and_grad_noise(regression.loss, **options)


@pytest.mark.parametrize(
    ("groups", "keywords", "argument"),
    [
        ((), {}, "groups has no leaves"),
        ((np.ones((3, 2)), np.ones((4, 2))), {}, r"groups .* leading axes \[num_groups\]"),
        ((np.ones((3, 2)), np.ones((3, 4))), {}, r"groups .* pass sizes="),
        (np.ones(3), {}, r"groups .* pass sizes="),
        (np.ones((3, 2)), {"sizes": np.ones(2, int)}, r"sizes must have shape \(3,\), got \(2,\)"),
    ],
    ids=["no_leaves", "leading_axes", "group_sizes", "no_example_axis", "shape_of_sizes"],
)
def test_bad_groups_are_named(groups, keywords, argument):
    fn = value_and_grad_noise(lambda w, g: w * sum(jnp.mean(x) for x in jax.tree.leaves(g)))
    with pytest.raises(ValueError, match=argument):
        fn(jnp.float32(1.0), groups, **keywords)


def test_lanes_need_two_leading_axes():
    fn = value_and_grad_noise(lambda w, x: w * jnp.mean(x), lanes=True)
    with pytest.raises(ValueError, match=r"\[num_loops, num_lanes\]"):
        fn(jnp.float32(1.0), jnp.ones(3))
