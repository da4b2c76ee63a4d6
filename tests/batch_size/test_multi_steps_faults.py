"""`adaptive_multi_steps` with numbers that go wrong: the table is that of training/test_faults.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax import BatchSizeStatus
from tests.marks import slow

INNER = {
    "adam": optax.adam(0.1),
    "adagrad": optax.adagrad(0.1),
    "adagrad norm": optax.chain(adabatch.scale_by_adagrad_norm(), optax.scale(-0.1)),
}
BATCH, MOST_CALLS = 32, 20
start = jnp.array([1.0, -2.0, 0.5])


@functools.cache
def dropped_in(name="adam", axis_name=None, **options):
    controller = adabatch.adapt_batch_size(
        adabatch.norm_test(0.3), initial_batch_size=BATCH, max_batch_size=4096, **options
    )
    optimizer = adabatch.adaptive_multi_steps(
        optax.chain(controller, INNER[name]), micro_batch_size=8, axis_name=axis_name
    )

    def step(carry, given):
        params, state = carry
        gradient, value = given
        updates, state = optimizer.update(gradient, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    def run(gradients, values):
        return jax.lax.scan(step, (start, optimizer.init(start)), (gradients, values))[1]

    return jax.jit(run if axis_name is None else jax.vmap(run, axis_name=axis_name))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


def calls(number, seed=3):
    """Gradients and losses of micro-batches."""
    gradients = np.random.default_rng(seed).normal(1.0, 1.0, (number, 3)).astype(np.float32)
    return gradients, np.ones(number, np.float32)


def feed(name, gradients, values):
    """Parameters and state after these calls; after which of them a step was made; the batch sizes."""
    rest = MOST_CALLS - len(values)  # one length, one compilation
    gradients = np.concatenate([gradients, np.zeros((rest, 3), np.float32)])
    history = dropped_in(name)(gradients, np.pad(values, (0, rest)))
    params, state = jax.tree.map(lambda x: np.asarray(x)[: len(values)], history)
    sizes = state.inner_opt_state[0].next_batch_size
    return *jax.tree.map(lambda x: x[-1], (params, state)), state.emitted, sizes


BAD = {
    "nan": ([1, np.nan, 1], 1.0),
    "inf": ([1, 1, -np.inf], 1.0),
    "loss alone nan": ([5, 5, 5], np.nan),
    "loss alone inf": ([5, 5, 5], np.inf),
    "square": ([1e25, 0, 0], 1.0),
    "four of them overflow": ([1.2e19, 0, 0], 1.0),
    "largest": ([np.finfo(np.float32).max] * 3, 1.0),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("name", INNER)
def test_a_micro_batch_with_a_fault_is_left_out_and_counted(fault, name):
    """First, in the middle, and first of the next batch: the optimizer never hears of them."""
    gradients, values = calls(12)
    gradient, value = BAD[fault]
    places = (0, 2, 4)
    spoilt = np.insert(gradients, places, np.float32(gradient), axis=0)
    losses = np.insert(values, places, value)
    params, state, emitted, sizes = feed(name, spoilt, losses)
    expected = feed(name, gradients, values)
    assert_same((params, state.inner_opt_state), (expected[0], expected[1].inner_opt_state))
    good = np.delete(np.arange(15), [place + i for i, place in enumerate(places)])
    assert np.array_equal(emitted[good], expected[2])
    assert expected[2].any() and sizes[-1] > BATCH
    shown = adabatch.metrics(state)
    assert shown["skipped_micro_batches"] == 3 and shown["skipped_tests"] == 0
    assert np.isfinite(state.gathered_value)
    assert_finite((params, state.inner_opt_state))


@pytest.mark.parametrize("name", INNER)
def test_without_one_good_micro_batch_no_step_is_made_and_the_count_says_so(name):
    gradients, values = calls(MOST_CALLS)
    gradients[4:] = np.nan
    params, state, emitted, sizes = feed(name, gradients, values)
    one_batch = feed(name, gradients[:4], values[:4])
    assert np.flatnonzero(emitted).tolist() == [3] and sizes[-1] == one_batch[3][-1]
    assert_same((params, state.inner_opt_state), (one_batch[0], one_batch[1].inner_opt_state))
    shown = adabatch.metrics(state)
    assert shown["num_examples"] == BATCH
    assert shown["micro_batches"] == shown["skipped_micro_batches"] == MOST_CALLS - 4


@pytest.mark.parametrize("watched", [True, *slow(False)])
def test_autowu_in_the_drop_in_is_told_when_every_micro_batch_is_broken(watched):
    """As in the fused step: it goes back if it may. Otherwise its state stays out of it, too."""
    schedule = adabatch.scale_by_autowu(
        total_steps=60, steps_per_test=1, smoother="as they are", watch_divergence=watched
    )
    controller = adabatch.adapt_batch_size(
        adabatch.norm_test(1.0), initial_batch_size=16, max_batch_size=16
    )
    inner = adabatch.return_to_minimum(optax.chain(controller, optax.scale_by_adam(), schedule))
    optimizer = adabatch.adaptive_multi_steps(inner, micro_batch_size=8)
    gradients, values = calls(28)
    gradients[20:23] = np.nan  # the second would have filled a batch; AutoWU reacts to the next
    values[:20], values[20:23] = 3.0 - 0.05 * np.arange(20), np.nan

    def call(carry, given):
        params, state = carry
        updates, state = optimizer.update(given[0], state, params, value=given[1])
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    begin = start, optimizer.init(start)
    params, state = jax.jit(lambda x: jax.lax.scan(call, begin, x)[1])((gradients, values))
    shown, outer = adabatch.metrics(jax.tree.map(lambda x: x[-1], state)), state.inner_opt_state
    assert state.skipped_micro_batches[19:24].tolist() == [0, 1, 2, 3, 3]
    assert_finite((params, outer.snapshot_params, outer.snapshot_moments))
    assert shown["snapshots_taken"] > 0 and shown["skipped_micro_batches"] == 3
    if watched:
        assert outer.returns_made[19:24].tolist() == [0, 0, 0, 1, 1]
        assert state.micro_batches[19:24].tolist() == [0, 1, 2, 0, 1]
        np.testing.assert_allclose(params[22], outer.snapshot_params[22], rtol=1e-6)
        assert np.abs(params[22] - params[21]).max() > 1e-6
        assert shown["warmup_end"] == adabatch.WarmupEnd.DIVERGED
    else:
        rest = jax.tree.map(lambda x: x[19:24], (params, outer))
        assert_same(rest, jax.tree.map(lambda x: x[:1].repeat(5, axis=0), rest))
        assert state.micro_batches[19:25].tolist() == [0, 1, 2, 3, 4, 0]
        assert shown["returns_made"] == 0


@pytest.mark.parametrize("name", INNER)
def test_gradients_whose_scatter_would_overflow_are_left_out(name):
    """Each square is finite; 8 · the squared gap of two is not. Four clean ones make the batch."""
    gradients, values = calls(6)
    gradients[:2] = np.float32([[9e18] * 3, [-9e18] * 3])
    params, state, emitted, _ = feed(name, gradients, values)
    assert np.flatnonzero(emitted).tolist() == [5]
    assert adabatch.metrics(state)["skipped_micro_batches"] == 2
    assert adabatch.metrics(state)["test_status"] != BatchSizeStatus.NOT_FINITE
    assert_finite((params, state.inner_opt_state))
    expected = feed(name, gradients[2:], values[2:])
    assert_same((params, state.inner_opt_state), (expected[0], expected[1].inner_opt_state))


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("kind", ["zero", "repeated"])
def test_gradients_without_signal_or_without_noise_hold_the_batch(kind, name):
    gradients, values = calls(8)
    gradients[:] = 0.0 if kind == "zero" else gradients[0]
    params, state, emitted, sizes = feed(name, gradients, values)
    assert np.flatnonzero(emitted).tolist() == [3, 7] and (sizes == BATCH).all()
    shown = adabatch.metrics(state)
    wanted = {"zero": BatchSizeStatus.ZERO_GRADIENT, "repeated": BatchSizeStatus.PASSED}[kind]
    assert shown["test_status"] == wanted
    assert shown["skipped_tests"] == (2 if kind == "zero" else 0)
    assert_finite((params, state.inner_opt_state))
    assert np.array_equal(params, start) == (kind == "zero")


@pytest.mark.parametrize("fault", ["nan", "square", "loss alone nan", "all", "zero"])
def test_what_goes_wrong_on_some_devices_stays_there(fault):
    """Four devices, by the name of their axis; one of them is broken in the first call."""
    gradients, values = (v.reshape(4, 3, *v.shape[1:]) for v in calls(12))
    spoilt, losses = gradients.copy(), values.copy()
    if fault == "all":
        spoilt[:, 0] = np.nan
    elif fault == "zero":
        spoilt[:] = 0.0
    else:
        spoilt[2, 0], losses[2, 0] = BAD[fault]
    history = dropped_in("adam", "data")(spoilt, losses)
    params, state = jax.tree.map(lambda x: np.asarray(x)[:, -1], history)
    emitted, sizes = (history[1].emitted, history[1].inner_opt_state[0].next_batch_size)
    assert len(np.unique(np.asarray(params), axis=0)) == 1, "the devices disagree"
    assert_finite((params, state.inner_opt_state))
    shown = adabatch.metrics(jax.tree.map(lambda x: x[0], state))
    assert shown["averaged_gradients"] == 0
    if fault == "zero":
        assert shown["test_status"] == BatchSizeStatus.ZERO_GRADIENT and (sizes == BATCH).all()
        return
    broken = 4 if fault == "all" else 1
    assert shown["skipped_micro_batches"] == broken
    # One call fills a batch of 32. One group short takes a second call, and one of four again.
    assert np.asarray(emitted)[0].tolist() == [False, True, False]
    used = [gradients[:, 1]]
    if fault != "all":
        used.append(np.delete(gradients[:, 0], 2, axis=0))
    used = np.concatenate(used).astype(np.float64)
    assert shown["num_examples"] == 8 * len(used)
    trace = 8 * used.var(0, ddof=1).sum()
    np.testing.assert_allclose(shown["noise_numerator"], trace, rtol=1e-5)
