"""Steps that nobody tests do not measure the noise: `measure=` and `needs_noise`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2)


@pytest.fixture
def params():
    return {"w": jnp.array([0.5, -1.0, 2.0], jnp.float32)}


@pytest.fixture
def groups():
    rng = np.random.default_rng(0)
    return rng.normal(size=(6, 4, 3)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)


OPTIONS = (
    {},
    {"vectorize": 4},
    {"lanes": True},
    {"coordinate_wise": True, "inner_products": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_measured_or_not_value_and_gradient_are_the_same(params, groups, options):
    if options.get("lanes"):
        groups = jax.tree.map(lambda a: a.reshape(3, 2, *a.shape[1:]), groups)
    fn = adabatch.value_and_grad_noise(loss_fn, **options)
    traced = jax.jit(lambda params, groups, wanted: fn(params, groups, measure=wanted))
    always = fn(params, groups)
    measured, not_measured = (traced(params, groups, jnp.bool_(w)) for w in (True, False))
    assert traced._cache_size() == 1
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), measured, always
    )
    value, noise = not_measured
    np.testing.assert_array_equal(value, measured[0])
    np.testing.assert_array_equal(noise.mean["w"], measured[1].mean["w"])
    assert (int(noise.num_examples), int(noise.num_groups)) == (24, 6)
    for statistic in (noise.scatter, *jax.tree.leaves(noise[4:])):
        assert np.all(statistic == -1)
        assert np.all(np.isnan(noise.variance(statistic)))


@pytest.mark.usefixtures("optimized")
def test_what_is_known_while_compiling_leaves_no_choice_in_the_program(params, groups):
    def program(measure):
        fn = adabatch.value_and_grad_noise(loss_fn)
        given = () if measure is not None else (jnp.bool_(False),)
        run = jax.jit(lambda p, g, m=measure: fn(p, g, measure=m))
        return run.lower(params, groups, *given).compile()

    traced, known = program(None), program(False)
    assert "conditional(" in traced.as_text() and "conditional(" not in known.as_text()
    jax.tree.map(
        np.testing.assert_array_equal,
        known(params, groups),
        traced(params, groups, jnp.bool_(False)),
    )


def controlled(**options):
    given = {"initial_batch_size": 8, "max_batch_size": 32, "multiple_of": 4, **options}
    return optax.chain(adabatch.adapt_batch_size(adabatch.norm_test(0.1), **given), optax.sgd(0.01))


def test_it_is_needed_at_every_interval_and_until_the_maximum(params, groups):
    optimizer = controlled(test_interval=3, growth_limit=2.0)
    fn = adabatch.value_and_grad_noise(loss_fn)

    @jax.jit
    def step(params, state):
        measure = adabatch.needs_noise(state)
        _, noise = fn(params, groups, measure=measure)
        updates, state = optimizer.update(noise.mean, state, params, noise=noise)
        return optax.apply_updates(params, updates), state, measure

    state, seen, sizes = optimizer.init(params), [], []
    for _ in range(12):
        params, state, measure = step(params, state)
        seen.append(bool(measure))
        sizes.append(int(adabatch.get_batch_size(state)))
    assert sizes[:7] == [16, 16, 16, 32, 32, 32, 32]
    assert seen == [True, False, False, True] + [False] * 8
    assert int(adabatch.metrics(state)["skipped_tests"]) == 0


def test_a_controller_that_may_shrink_needs_it_at_the_maximum_too(params):
    for monotone in (True, False):
        state = controlled(initial_batch_size=32, monotone=monotone).init(params)
        assert bool(adabatch.needs_noise(state)) is not monotone


@pytest.mark.parametrize("noise", [False, True], ids=["measured inside", "handed in"])
def test_the_drop_in_trains_on_when_nothing_is_measured_any_more(params, groups, noise):
    optimizer = adabatch.adaptive_multi_steps(
        controlled(initial_batch_size=8, max_batch_size=8), micro_batch_size=4
    )
    fn = adabatch.value_and_grad_noise(loss_fn)
    state, moved = optimizer.init(params), 0.0
    for batch in zip(*groups, strict=True):
        value, gradient = jax.value_and_grad(loss_fn)(params, batch)
        more = {}
        if noise:
            halves = adabatch.split_groups(batch, 2)
            more["noise"] = fn(params, halves, measure=adabatch.needs_noise(state))[1]
        updates, state = optimizer.update(gradient, state, params, value=value, **more)
        moved += float(jnp.sum(jnp.abs(updates["w"])))
    shown = adabatch.metrics(state)
    assert moved > 0
    assert int(shown["num_examples"]) == 24
    assert int(shown["skipped_micro_batches"]) == 0
    assert int(shown["test_status"]) == adabatch.BatchSizeStatus.AT_MAXIMUM


def test_noise_that_was_not_measured_although_needed_is_a_counted_skip(params, groups):
    optimizer = controlled()
    state = optimizer.init(params)
    _, noise = adabatch.value_and_grad_noise(loss_fn)(params, groups, measure=False)
    updates, state = optimizer.update(noise.mean, state, params, noise=noise)
    shown = adabatch.metrics(state)
    assert int(shown["test_status"]) == adabatch.BatchSizeStatus.NOT_FINITE
    assert int(shown["skipped_tests"]) == 1
    assert int(shown["next_batch_size"]) == 8
    assert float(jnp.sum(jnp.abs(updates["w"]))) > 0
