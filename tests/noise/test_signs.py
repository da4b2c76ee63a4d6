"""`value_and_grad_signs`: random balanced signs instead of groups."""

from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adabatch_jax as adabatch
from adabatch_jax import merge_noise, split_groups
from adabatch_jax.noise import _signs, value_and_grad_signs
from tests.marks import slow

NUM_GROUPS, GROUP_SIZE = 4, 6


def location_losses(w, x):
    """Half the squared distances: the gradient of one example is `w - x`."""
    return 0.5 * jnp.sum((w[None] - x) ** 2, axis=-1)


def regression_losses(params, group):
    """The single losses behind `Regression.loss`; without its mask."""
    return 0.5 * (group["x"] @ params["w"] + params["b"] - group["y"]) ** 2


def losses_and_aux(params, group):
    losses = regression_losses(params, group)
    seen = jnp.sum(group["real"]).astype(jnp.int32)
    return losses, {"double": 2 * jnp.mean(losses), "seen": (seen, seen > 1)}


def gradients_of(regression, groups):
    """Of every example of every group, float64 [num_groups, group_size, parameters]."""
    x, y = (np.asarray(groups[k], np.float64) for k in ("x", "y"))
    b, w = (np.asarray(regression.params[k], np.float64) for k in ("b", "w"))
    return (x @ w + b - y)[..., None] * np.concatenate([np.ones_like(x[..., :1]), x], -1)


def errors(samples, true):
    """The distance of the mean from the truth, in standard errors."""
    samples = np.asarray(samples, np.float64)
    return np.abs(samples.mean(0) - true) / (samples.std(0, ddof=1) / np.sqrt(len(samples)))


def traces_of(losses_fn, params, draw, number, **options):
    """The trace over `number` keys, each with examples of its own."""
    fn = value_and_grad_signs(losses_fn, **options)

    def one(key):
        examples, signs = jax.random.split(key)
        return fn(params, draw(examples), signs)[1].trace

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(7), number))


def test_two_examples_have_one_pair_of_signs():
    x = jnp.array([[[1.0, 0.0], [4.0, 4.0]]])
    value, noise = value_and_grad_signs(location_losses)(jnp.zeros(2), x, jax.random.key(0))
    assert float(value) == 0.5 * (1 + 32) / 2
    assert noise.mean.tolist() == [-2.5, -2.0]
    assert float(noise.trace) == 25 / 2  # of two numbers: half the squared distance
    assert (int(noise.num_examples), int(noise.num_groups)) == (2, 2)
    assert noise.coordinate_scatter is None
    assert noise.inner_product_scatter is None


@pytest.mark.parametrize("size", [4, 5])
def test_the_mean_over_all_signs_is_the_trace_exactly(monkeypatch, size):
    """With rows behind the real ones, and of an odd number one example in turn left out."""
    x = np.random.default_rng(0).normal(3.0, 1.0, (7, 3)).astype(np.float32)
    half = size // 2
    every = [s for s in product((-1, 0, 1), repeat=size) if s.count(1) == half == s.count(-1)]
    assert len(every) == {4: 6, 5: 30}[size]
    rows = np.zeros((len(every), 7), int)
    rows[:, :size] = every

    @jax.vmap
    def one(signs):
        monkeypatch.setattr(_signs, "_balanced_signs", lambda *_: signs[None])
        fn = value_and_grad_signs(location_losses, coordinate_wise=True)
        key, sizes = jax.random.key(0), jnp.array([size])
        noise = fn(jnp.zeros(3), jnp.asarray(x)[None], key, sizes=sizes)[1]
        return noise.trace, noise.variance(noise.coordinate_scatter)

    traces, coordinates = map(np.asarray, jax.jit(one)(jnp.asarray(rows)))
    expected = x[:size].astype(np.float64).var(0, ddof=1)
    assert np.std(traces) > 0.1
    np.testing.assert_allclose(np.mean(traces, dtype=np.float64), expected.sum(), rtol=1e-6)
    np.testing.assert_allclose(np.mean(coordinates, 0, dtype=np.float64), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [2, 5])
def test_every_balanced_vector_is_drawn_equally_often(size):
    real = jnp.arange(8) < size
    keys = jax.random.split(jax.random.key(3), 4000)
    signs = jax.vmap(lambda k: _signs._balanced_signs(k, 2, real, jnp.int32(size)))(keys)
    signs = np.asarray(signs)
    assert np.all(signs.sum(-1) == 0)
    assert np.all(np.abs(signs).sum(-1) == size - size % 2)
    assert not signs[..., size:].any()
    assert np.all(errors(signs[:, 0, :size], 0.0) < 4)
    if size == 2:
        return
    share = (size - size % 2) / size
    assert np.all(errors(signs[:, 0, :1] * signs[:, 0, 1:size], -share / (size - 1)) < 4)
    # The vectors of one micro-batch know nothing of each other.
    assert errors(signs[:, 0, 0] * signs[:, 1, 0], 0.0) < 4
    assert len(np.unique(signs[:, 0], axis=0)) == 30


def test_unbiased_for_the_scatter_of_the_examples_at_hand(regression, flat):
    groups = regression.draw(1, 1, 24)
    gradients = gradients_of(regression, groups)[0]
    fn = value_and_grad_signs(regression_losses, num_signs=2, coordinate_wise=True)

    def one(key):
        _, noise = fn(regression.params, groups, key)
        c = noise.coordinate_scatter
        return noise.trace, jnp.append(c["b"], c["w"]) / 2, noise.mean

    traces, coordinates, means = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 3000))
    expected = gradients.var(0, ddof=1)
    assert errors(traces, expected.sum()) < 4
    assert np.all(errors(coordinates, expected) < 4)
    assert errors(traces, expected.sum() * 23 / 24) > 4  # ddof 0 would be noticed
    np.testing.assert_allclose(coordinates.sum(1), traces, rtol=1e-5)
    first = jax.tree.map(lambda m: m[0], means)
    np.testing.assert_allclose(flat(first), gradients.mean(0), rtol=1e-5)


@pytest.mark.parametrize(("rank", "num_signs", "size"), [(1, 3, 5), *slow((1, 1, 16), (20, 2, 16))])
def test_the_standard_error_is_as_documented(rank, num_signs, size):
    """Gaussian gradients on a line, and isotropic ones: relative variance 2/(rank · ν)."""

    def draw(key):
        return 2.0 + jax.random.normal(key, (1, size, rank))

    number = 4000
    traces = traces_of(location_losses, jnp.zeros(rank), draw, number, num_signs=num_signs)
    assert errors(traces, rank) < 4
    freedom = 1 / (1 / num_signs + (1 - 1 / num_signs) / (size - 1))
    expected = 2 / (rank * freedom)
    squares = (np.asarray(traces, np.float64) / rank - 1) ** 2
    assert errors(squares, expected) < 4
    # Enough keys to tell: a fifth more or less would be noticed.
    assert errors(squares, 1.25 * expected) > 4 or rank * freedom < 2


def test_degrees_of_freedom_are_rounded():
    number, size = np.meshgrid(np.arange(1, 40), np.arange(2, 40))
    exact = 1 / (1 / number + (1 - 1 / number) / (size - 1))
    rounded = _signs.freedom_of_signs(number, size)
    assert np.all(np.abs(rounded - exact) <= 0.5 + 1e-9)
    assert np.all((rounded >= 1) & (rounded <= np.minimum(number, size - 1)))
    assert not np.any(_signs.freedom_of_signs(np.arange(1, 40), 1))


@pytest.mark.parametrize("sizes", [[5, 0, 1, 4], *slow([6, 6, 6, 6])])
def test_micro_batches_count_the_scatter_between_them_once(sizes):
    """Unbiased with a scatter between that is large beside the one within, and with ragged sizes."""
    sizes = np.array(sizes)

    def draw(key):
        return jax.random.normal(key, (NUM_GROUPS, GROUP_SIZE, 2))

    fn = value_and_grad_signs(location_losses, num_signs=2)

    def one(key):
        examples, signs = jax.random.split(key)
        noise = fn(jnp.zeros(2), draw(examples), signs, sizes=sizes)[1]
        return noise.trace, noise.num_groups

    traces, groups = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), 2500))
    assert errors(traces, 2.0) < 4
    exact = np.array([2 * (n - 1) / n for n in sizes if n])  # of two vectors: 1.67, 1.6, 1.5 or 0
    counted = np.round(exact)
    between = np.sum(sizes > 0) - 1
    assert np.all(np.asarray(groups) == counted.sum() + between + 1)
    # Rank two, so that the relative variance of each part is one over its degrees of freedom.
    parts = np.sum(counted**2 / np.maximum(exact, 1)) + between
    expected = parts / (counted.sum() + between) ** 2
    assert errors((np.asarray(traces) / 2 - 1) ** 2, expected) < 4


def test_between_micro_batches_of_equal_examples_the_scatter_is_that_of_groups(
    regression, assert_same
):
    groups = regression.draw(2, NUM_GROUPS, GROUP_SIZE)
    groups = jax.tree.map(lambda x: np.repeat(x[:, :1], GROUP_SIZE, 1), groups)
    fn = jax.jit(value_and_grad_signs(regression_losses, num_signs=2, coordinate_wise=True))
    _, noise = fn(regression.params, groups, jax.random.key(2))
    expected = regression.expected(groups)
    assert int(noise.num_groups) == NUM_GROUPS * 3
    assert_same(noise._replace(num_groups=expected.num_groups), expected, rtol=1e-4)
    halves = [jax.tree.map(lambda x, s=s: x[s::2], groups) for s in (0, 1)]
    joint = merge_noise(*(fn(regression.params, h, jax.random.key(3))[1] for h in halves))
    assert_same(joint, noise, rtol=1e-4)


def test_value_gradient_and_aux_are_those_of_the_whole_batch(regression, flat):
    sizes = np.array([6, 3, 0, 5])
    groups = regression.draw(3, NUM_GROUPS, GROUP_SIZE)
    sums = {"double": False, "seen": True}
    fn = jax.jit(value_and_grad_signs(losses_and_aux, has_aux=True, sum_aux=sums))
    (value, aux), noise = fn(regression.params, groups, jax.random.key(0))
    batch = {k: v.reshape((-1, *v.shape[2:])) for k, v in groups.items()}
    true, gradient = jax.value_and_grad(regression.loss)(regression.params, batch)
    np.testing.assert_allclose(value, true, rtol=1e-6)
    np.testing.assert_allclose(flat(noise.mean), flat(gradient), rtol=1e-5)
    np.testing.assert_allclose(aux["double"], 2 * value, rtol=1e-6)
    assert [int(x) for x in aux["seen"]] == [NUM_GROUPS * GROUP_SIZE, NUM_GROUPS]
    # Ragged: the rows behind are ignored, and an empty micro-batch may be NaN.
    ragged = regression.draw(3, NUM_GROUPS, GROUP_SIZE, sizes)
    for name in ("x", "y"):
        ragged[name][2] = np.nan
    (value, _), noise = fn(regression.params, ragged, jax.random.key(0), sizes=sizes)
    ragged = {k: np.nan_to_num(v) for k, v in ragged.items()}
    expected = regression.expected(ragged)
    np.testing.assert_allclose(value, expected.value, rtol=1e-5)
    np.testing.assert_allclose(flat(noise.mean), expected.mean, rtol=1e-5)
    assert int(noise.num_examples) == expected.num_examples
    assert np.isfinite(noise.trace)


def test_one_trace_serves_every_count_and_all_sizes(regression):
    groups = regression.draw(4, NUM_GROUPS, GROUP_SIZE)
    fn = value_and_grad_signs(regression_losses)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, groups, key, count, sizes):
        return fn(params, groups, key, count=count, sizes=sizes)

    for count in range(NUM_GROUPS + 1):
        for size in (1, 2, GROUP_SIZE):
            sizes = np.full(NUM_GROUPS, size, np.int32)
            key = jax.random.key(count)
            value, noise = step(regression.params, groups, key, np.int32(count), sizes)
            assert int(noise.num_examples) == count * size
            assert int(noise.num_groups) == count * min(size, 2)
            assert bool(np.isnan(value)) == (count == 0)
            assert bool(np.isnan(noise.trace)) == (count * min(size, 2) < 2)
            plain = jax.tree.map(lambda x, n=count, m=size: x[:n, :m], groups)
            if count:
                expected = regression.expected(plain)
                np.testing.assert_allclose(value, expected.value, rtol=1e-5)


def test_jit_changes_nothing_and_the_key_decides(regression, assert_same):
    groups = regression.draw(5, 2, GROUP_SIZE)
    fn = value_and_grad_signs(regression_losses, num_signs=2, coordinate_wise=True)
    raw = jax.random.key_data(jax.random.key(1))
    _, plain = fn(regression.params, groups, raw)
    _, jitted = jax.jit(fn)(regression.params, groups, jax.random.key(1))
    assert_same(jitted, plain)
    _, other = jax.jit(fn)(regression.params, groups, jax.random.key(2))
    assert abs(float(other.scatter) - float(plain.scatter)) > 0.01 * float(plain.scatter)


def test_bfloat16_parameters_have_float32_statistics():
    """In a dtype in which 1/n is inexact. The three examples are equally far from each other."""
    x = 128 * jnp.eye(3, dtype=jnp.bfloat16)[None]
    fn = jax.jit(value_and_grad_signs(location_losses, num_signs=2, coordinate_wise=True))
    value, noise = fn(jnp.zeros(3, jnp.bfloat16), x, jax.random.key(0))
    assert noise.mean.dtype == jnp.bfloat16
    for part in (value, noise.scatter, noise.coordinate_scatter):
        assert part.dtype == jnp.float32
    np.testing.assert_allclose(value, 0.5 * 128**2, rtol=1e-6)
    np.testing.assert_allclose(noise.trace, 128**2, rtol=1e-6)
    np.testing.assert_allclose(noise.mean.astype(jnp.float32), -128 / 3, rtol=2**-7)


def test_a_large_mean_gradient_leaves_nothing_in_the_scatter():
    """Even where the signs have no exact share: nine equal examples, one of them without a sign."""
    x = jnp.full((1, 9, 4), 96.0, jnp.float16)
    _, noise = value_and_grad_signs(location_losses)(jnp.zeros(4, x.dtype), x, jax.random.key(0))
    assert float(noise.squared_norm) > 4 * 95**2
    assert float(noise.trace) < 1e-6 * 96**2


def test_many_devices_merge_as_micro_batches_do(regression, flat):
    """Under vmap with a name a device is a lane."""
    groups = regression.draw(6, 4, 8)
    apart = jax.tree.map(lambda x: x.reshape(4, 1, *x.shape[1:]), groups)
    over = value_and_grad_signs(regression_losses, axis_name="data", coordinate_wise=True)
    lanes = jax.vmap(over, in_axes=(None, 0, None), axis_name="data")

    def one(key):
        return lanes(regression.params, apart, key)

    values, noise = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 1000))
    expected = regression.expected({k: v.reshape((1, 32, *v.shape[2:])) for k, v in groups.items()})
    np.testing.assert_allclose(values, np.float32(expected.value), rtol=1e-5)
    first = jax.tree.map(lambda m: m[0, 0], noise.mean)
    np.testing.assert_allclose(flat(first), expected.mean, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(noise.num_groups) == 8)
    assert np.ptp(noise.scatter, axis=1).max() == 0
    gradients = gradients_of(regression, groups)
    means = gradients.mean(1)
    within = sum(g.var(0, ddof=1).sum() for g in gradients)
    assert errors(noise.scatter[:, 0], within + 8 * np.sum((means - means.mean(0)) ** 2)) < 4


def test_no_two_devices_draw_the_same_signs(regression):
    """Four devices with equal examples: the scatter of all is the sum of four that differ."""
    group, key = regression.draw(6, 1, 8), jax.random.key(0)
    over = value_and_grad_signs(regression_losses, axis_name="data")
    lanes = jax.jit(jax.vmap(over, in_axes=(None, None, None), axis_name="data", axis_size=4))
    _, noise = lanes(regression.params, group, key)
    alone = jax.jit(value_and_grad_signs(regression_losses))
    keys = [jax.random.fold_in(key, device) for device in range(4)]
    scatters = [float(alone(regression.params, group, k)[1].scatter) for k in keys]
    np.testing.assert_allclose(noise.scatter[0], sum(scatters), rtol=1e-5)
    assert np.ptp(scatters) > 0.1 * np.mean(scatters)


def test_under_shard_maps_varying_check(regression):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    groups, key = regression.draw(7, 2, 4), jax.random.key(0)
    fn = value_and_grad_signs(regression_losses, num_signs=2, axis_name="data")
    mapped = jax.shard_map(
        lambda p, g, k: fn(p, g, k),
        mesh=mesh, in_specs=(jax.P(), jax.P("data"), jax.P()), out_specs=jax.P(),
    )  # fmt: skip
    found = jax.jit(mapped)(regression.params, groups, key)
    alone = jax.jit(value_and_grad_signs(regression_losses, num_signs=2))
    expected = alone(regression.params, groups, jax.random.fold_in(key, 0))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    same = jax.shard_map(fn, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())
    with pytest.raises(ValueError, match="groups is the same on all devices of axis 'data'"):
        jax.jit(same)(regression.params, groups, key)


def test_a_batch_that_cannot_be_split():
    """Examples of different lengths packed into one array: the losses are fewer than the rows."""
    owner = jnp.array([0, 0, 0, 1, 2, 2, 2, 3])
    rows = jax.random.normal(jax.random.key(0), (8, 3))

    def losses_fn(w, packed):
        rows, owner = packed
        sums = jax.nn.one_hot(owner, 4).T @ rows
        return 0.5 * jnp.sum((w[None] - sums) ** 2, -1)

    fn = value_and_grad_signs(losses_fn)
    keys = jax.random.split(jax.random.key(0), 500)
    packed = split_groups((rows, owner), 1)
    noise = jax.jit(jax.vmap(lambda k: fn(jnp.zeros(3), packed, k)[1]))(keys)
    sums = np.stack([np.asarray(rows)[np.asarray(owner) == i].sum(0) for i in range(4)])
    assert np.all(np.asarray(noise.num_examples) == 4)
    assert errors(noise.trace, sums.var(0, ddof=1).sum()) < 4


def test_a_controller_takes_signs_for_groups(regression):
    """De-biased or not, its two statistics are the trace and the squared norm."""
    groups = regression.draw(8, 1, 16)
    fn = value_and_grad_signs(regression_losses, num_signs=8, coordinate_wise=True)
    _, noise = jax.jit(fn)(regression.params, groups, jax.random.key(0))
    trace, square = float(noise.trace), float(noise.squared_norm)
    np.testing.assert_allclose(adabatch.norm_test(0.5)(noise), trace / (0.25 * square), rtol=1e-5)
    scale = trace / (square - trace / 16)
    expected = scale if scale > 0 else np.inf
    np.testing.assert_allclose(adabatch.gradient_noise_scale()(noise), expected, rtol=1e-4)
    assert float(adabatch.coordinate_norm_test(0.5)(noise)) > 0
    sizes = dict(initial_batch_size=16, max_batch_size=64)
    link = adabatch.adapt_batch_size(adabatch.norm_test(0.5), **sizes)
    _, state = link.update(noise.mean, link.init(regression.params), noise=noise)
    assert int(adabatch.metrics(state)["degrees_of_freedom"]) == 5  # 8 · 15 / 22
    with pytest.raises(ValueError, match="inner_product_scatter"):
        adabatch.inner_product_test(0.9)(noise)


@pytest.mark.parametrize(
    ("losses_fn", "groups", "keywords", "argument"),
    [
        (location_losses, (), {}, "groups needs leaves"),
        (location_losses, (np.ones((2, 3, 1)), np.ones((1, 3))), {}, "groups needs leaves"),
        (location_losses, np.ones((0, 3, 1)), {}, "groups needs leaves"),
        (location_losses, np.ones((2, 3, 1)), {"sizes": [3]}, r"sizes must have shape \(2,\)"),
        (lambda w, x: jnp.mean(w * x), np.ones((2, 3)), {}, r"losses \[B\] .* got shape \(\)"),
    ],
    ids=["no_leaves", "leading_axes", "empty", "sizes", "mean_loss"],
)
def test_bad_arguments_are_named(losses_fn, groups, keywords, argument):
    fn = value_and_grad_signs(losses_fn)
    keywords = {k: np.asarray(v) for k, v in keywords.items()}
    with pytest.raises(ValueError, match=argument):
        fn(jnp.ones(1), groups, jax.random.key(0), **keywords)


def test_a_bad_number_of_signs_is_named():
    with pytest.raises(ValueError, match="num_signs must be a positive integer, got 0"):
        value_and_grad_signs(location_losses, num_signs=0)
