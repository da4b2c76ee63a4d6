"""200,000 steps of a simulated run: noise at random levels, NaN, devices that drop out.

The noise rises by the factor 2²⁶, so that the batch climbs through all of its range. Every step is
checked, from arrays that the scan returns: a model in NumPy knows the counters, the status and the
averages (float64), and the next batch size from the required one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.signal import lfilter

from adabatch_jax import (
    BatchSizeStatus,
    GradientNoise,
    adapt_batch_size,
    adaptive_multi_steps,
    gradient_noise_scale,
    has_updated,
    metrics,
    norm_test,
)

STEPS, CHUNK, DEVICES = 200_000, 25_000, 8
LARGEST = 48 * 2**24
ETA = 0.5
CONTROLS = {
    "paper": (norm_test(ETA), {}),
    "smoothed": (
        norm_test(ETA),
        {"ema_decay": 0.9, "debias": True, "growth_limit": 2.0, "multiple_of": 8},
    ),
    "shrinking": (
        norm_test(ETA),
        {
            "monotone": False,
            "min_batch_size": 50,
            "multiple_of": 48,
            "growth_limit": 1.5,
            "ema_decay": 0.5,
            "test_interval": 3,
        },
    ),
    "data set": (
        gradient_noise_scale(),
        {"dataset_size": 2**28, "test_interval": 10, "ema_decay": 0.9},
    ),
}
ZERO, NAN, INF, HUGE, SCATTER_NAN, SCATTER_INF = range(1, 7)  # 0: no fault


@functools.cache
def drawn():
    """What happens in each step, whatever the batch size; the fault codes are above."""
    rng = np.random.default_rng(0)
    level = 2.0 ** np.linspace(4, 30, STEPS) * rng.lognormal(0.0, 0.3, STEPS)
    alive = np.where(rng.random(STEPS) < 0.9, DEVICES, rng.integers(0, DEVICES, STEPS))
    return {
        "square": rng.lognormal(0.0, 0.3, STEPS).astype(np.float32),  # ‖∇F‖²
        "level": level.astype(np.float32),  # tr Σ / ‖∇F‖²
        "luck": rng.chisquare(3, STEPS).astype(np.float32) / 3,  # of ‖ḡ‖² − ‖∇F‖², over tr Σ / b
        "alive": alive.astype(np.int32),
        "fault": np.where(rng.random(STEPS) < 0.06, rng.integers(1, 7, STEPS), 0).astype(np.int32),
        "held": rng.random(STEPS) < 0.02,
    }


def noise_of(size, given):
    """The noise of a batch of which the devices that dropped out have taken their share."""
    alive, fault = given["alive"], given["fault"]
    examples = jnp.where(alive > 0, size - size // DEVICES * (DEVICES - alive), 0)
    trace = given["level"] * given["square"]
    share = trace / jnp.maximum(examples, 1).astype(jnp.float32)
    length = jnp.sqrt(given["square"] + given["luck"] * share)
    for code, value in ((ZERO, 0.0), (NAN, jnp.nan), (INF, jnp.inf), (HUGE, 1e30)):
        length = jnp.where(fault == code, value, length)
    length = jnp.where(alive > 0, length, 0.0)
    scatter = trace * jnp.maximum(alive - 1, 0).astype(jnp.float32)
    for code, value in ((SCATTER_NAN, jnp.nan), (SCATTER_INF, jnp.inf)):
        scatter = jnp.where(fault == code, value, scatter)
    mean = jnp.stack([length, jnp.zeros_like(length)])
    return GradientNoise(mean, scatter, examples, alive)


@functools.cache
def soaked(name):
    """(state after every step, with examples and ‖ḡ‖² of the step)."""
    criterion, options = CONTROLS[name]
    link = adapt_batch_size(criterion, initial_batch_size=96, max_batch_size=LARGEST, **options)

    def step(state, given):
        noise = noise_of(state.next_batch_size, given)
        _, state = link.update(noise.mean, state, noise=noise, hold_batch_size=given["held"])
        return state, (state, noise.num_examples, noise.squared_norm)

    run = jax.jit(lambda state, chunk: jax.lax.scan(step, state, chunk))
    state, seen = link.init(jnp.zeros(2)), []
    for start in range(0, STEPS, CHUNK):
        state, out = run(state, {k: v[start : start + CHUNK] for k, v in drawn().items()})
        seen.append(jax.device_get(out))
    return jax.tree.map(lambda *x: np.concatenate(x), *seen)


def options_of(name):
    given = CONTROLS[name][1]
    keys = ("min_batch_size", "multiple_of", "monotone", "test_interval", "debias")
    return dict(zip(keys, (1, 1, True, 1, False), strict=True)) | given


def before(sizes):
    return np.concatenate([[96], sizes[:-1]])


@pytest.mark.soak
@pytest.mark.parametrize("name", CONTROLS)
def test_the_batch_size_keeps_its_promises_in_every_step(name):
    state, _, _ = soaked(name)
    options, sizes = options_of(name), state.next_batch_size.astype(np.int64)
    assert sizes.min() >= options["min_batch_size"] and sizes.max() <= LARGEST
    assert not (sizes % options["multiple_of"]).any()
    change = sizes - before(sizes)
    assert (change >= 0).all() if options["monotone"] else (change < 0).any()
    if limit := options.get("growth_limit"):
        # Rounding up comes after the limit; 1e-7 is the rounding of limit · size in float32.
        assert (sizes <= before(sizes) * limit * (1 + 1e-7) + options["multiple_of"]).all()
    assert len(np.unique(sizes)) > 20 and sizes.max() > 2**24, "it went through its range"
    assert (before(sizes) < LARGEST).mean() > 0.8, "and was at the end of it for the end of the run"


@pytest.mark.soak
@pytest.mark.parametrize("name", CONTROLS)
def test_every_status_and_every_counter_is_that_of_the_model(name):
    state, examples, _ = soaked(name)
    options, given, sizes = options_of(name), drawn(), state.next_batch_size
    wanted = np.where(sizes == before(sizes), BatchSizeStatus.PASSED, BatchSizeStatus.CHANGED)
    wanted[given["fault"] == ZERO] = BatchSizeStatus.ZERO_GRADIENT
    wanted[given["fault"] > ZERO] = BatchSizeStatus.NOT_FINITE
    wanted[given["alive"] < 2] = BatchSizeStatus.TOO_FEW_GROUPS
    unusable = np.isin(
        wanted,
        [BatchSizeStatus.ZERO_GRADIENT, BatchSizeStatus.NOT_FINITE, BatchSizeStatus.TOO_FEW_GROUPS],
    )
    due = np.arange(STEPS) % options["test_interval"] == 0
    full = options["monotone"] & (before(sizes) == LARGEST)
    wanted[given["held"]] = BatchSizeStatus.HELD
    wanted[~due] = BatchSizeStatus.NOT_TESTED
    wanted[full] = BatchSizeStatus.AT_MAXIMUM
    np.testing.assert_array_equal(state.last_size_test.test_status, wanted)
    assert set(np.unique(wanted).tolist()) >= {*map(int, BatchSizeStatus)} - {
        BatchSizeStatus.NOT_TESTED,
        BatchSizeStatus.AT_MAXIMUM,
    }
    tested = due & ~given["held"] & ~full
    np.testing.assert_array_equal(sizes[~tested | unusable], before(sizes)[~tested | unusable])
    np.testing.assert_array_equal(state.last_size_test.skipped_tests, np.cumsum(tested & unusable))
    np.testing.assert_array_equal(state.updates_seen, np.arange(1, STEPS + 1))

    used = before(sizes).astype(np.int64)
    used = np.where(given["alive"] > 0, used - used // DEVICES * (DEVICES - given["alive"]), 0)
    np.testing.assert_array_equal(examples, used)
    clock = state.examples_clock.astype(np.int64)
    np.testing.assert_array_equal(clock[:, 0] * 2**32 + clock[:, 1], np.cumsum(used))
    assert np.sum(used) > 2**40


@pytest.mark.soak
@pytest.mark.parametrize("name", CONTROLS)
def test_every_decision_is_that_of_the_averages_in_float64(name):
    state, examples, square = soaked(name)
    options, given, sizes = options_of(name), drawn(), state.next_batch_size.astype(np.int64)
    decided = np.isin(
        state.last_size_test.test_status, [BatchSizeStatus.PASSED, BatchSizeStatus.CHANGED]
    )
    square, examples = square[decided].astype(np.float64), np.maximum(examples[decided], 1)
    trace = (given["level"] * given["square"])[decided].astype(np.float64)
    population = options.get("dataset_size", np.inf)
    left = np.maximum(1 - examples / population, 0)
    bias = left * trace / examples if options["debias"] or name == "data set" else 0.0
    decay = options.get("ema_decay", 0.0)

    def average(x):
        weight = 1 - decay ** np.arange(1, len(x) + 1)
        return lfilter([1 - decay], [1, -decay], x) / weight

    numerator, denominator = average(trace), average(square - bias)
    rounding = 3e-6 * average(square)  # of a difference of numbers as large as that
    np.testing.assert_allclose(state.last_size_test.test_numerator[decided], numerator, rtol=3e-6)
    assert (np.abs(state.last_size_test.test_denominator[decided] - denominator) <= rounding).all()

    required = state.last_size_test.required_batch_size[decided].astype(np.float64)
    scale = 1.0 if name == "data set" else ETA**2
    clear = denominator > 1e3 * rounding
    ratio = numerator[clear] / (scale * denominator[clear])
    ratio /= 1 + ratio / population
    np.testing.assert_allclose(required[clear], ratio, rtol=2e-3)
    assert not np.isnan(required).any() and clear.mean() > 0.9

    old = before(sizes)[decided]
    limit = options.get("growth_limit", np.inf)
    doubled = np.where(np.isinf(limit), 2.0, limit)
    target = np.minimum(required, np.where(np.isinf(required), doubled, limit) * old)
    target = np.minimum(target, population)

    def rounded_up(target):
        whole = np.clip(np.ceil(target), options["min_batch_size"], LARGEST).astype(np.int64)
        whole = np.minimum(whole + -whole % options["multiple_of"], LARGEST)
        return np.maximum(whole, old) if options["monotone"] else whole

    # What exceeds an integer by the rounding of a division alone may count as that integer.
    least, most = rounded_up(target * (1 - 2.0**-20)), rounded_up(target)
    decisions = sizes[decided]
    off = np.maximum(decisions - most, 0) + np.maximum(least - decisions, 0)
    assert not off[most < 2**20].any(), "exact where float32 is"
    assert (least == most)[most < 2**16].mean() > 0.9
    assert (off <= options["multiple_of"] + 1e-7 * most).all()


@pytest.mark.soak
@pytest.mark.parametrize("name", CONTROLS)
def test_nothing_that_is_not_a_number_enters_the_state(name):
    state, _, _ = soaked(name)
    for leaf in jax.tree.leaves(state):
        assert not np.isnan(leaf).any()
    averages = (*state.size_memory[:2], state.last_size_test.display_ema)
    for leaf in jax.tree.leaves(averages):
        assert np.isfinite(leaf).all()


# The drop-in: four devices, by the name of their axis -------------------------------------------------

CALLS, LANES, MICRO = 40_000, 4, 8


@functools.cache
def dropped_in():
    """(gradients [calls, lanes, 2], what the calls left in the state and their updates)."""
    rng = np.random.default_rng(1)
    spread = 2.0 ** np.linspace(-2, 4, CALLS)[:, None, None]
    gradients = rng.normal(1.0, spread, (CALLS, LANES, 2)).astype(np.float32)
    losses = np.ones((CALLS, LANES), np.float32)
    for number, bad in enumerate((np.nan, np.inf, -1e30)):
        gradients[rng.random((CALLS, LANES)) < 0.02, number % 2] = bad
    losses[rng.random((CALLS, LANES)) < 0.02] = np.nan
    gradients[rng.random(CALLS) < 0.02] = np.nan  # all devices at once
    gradients[rng.random(CALLS) < 0.02] = 0.0

    controller = adapt_batch_size(norm_test(1.0), initial_batch_size=32, max_batch_size=4096)
    optimizer = adaptive_multi_steps(
        optax.chain(controller, optax.adam(1e-3)), micro_batch_size=MICRO, axis_name="lanes"
    )

    def call(state, given):
        gradient, loss = given
        updates, state = optimizer.update(gradient, state, value=loss)
        return state, (state, updates)

    def run(gradients, losses):
        return jax.lax.scan(call, optimizer.init(jnp.zeros(2)), (gradients, losses))[1]

    on_lanes = jax.jit(jax.vmap(run, in_axes=1, out_axes=1, axis_name="lanes"))
    return gradients, losses, jax.device_get(on_lanes(gradients, losses))


@pytest.mark.soak
def test_a_long_run_of_the_drop_in_counts_what_was_good_and_steps_when_the_batch_is_full():
    gradients, losses, (state, updates) = dropped_in()
    for leaf in jax.tree.leaves((state.inner_opt_state, state.gathered_value, updates)):
        assert np.isfinite(leaf).all()
        np.testing.assert_array_equal(leaf, leaf[:, :1].repeat(LANES, 1), "the devices disagree")
    state, updates = jax.tree.map(lambda x: x[:, 0], (state, updates))
    controller = state.inner_opt_state[0]

    square = (gradients.astype(np.float64) ** 2).sum(-1)
    good = (square < np.finfo(np.float32).max) & np.isfinite(losses)
    np.testing.assert_array_equal(state.skipped_micro_batches, np.cumsum((~good).sum(1)))

    wanted, gathered, size, used = [], 0, 32, []
    for found, following in zip(MICRO * good.sum(1), controller.next_batch_size, strict=True):
        gathered += int(found)
        # Without the part of a device a batch might end beyond the largest size: it ends before.
        full = gathered >= size or gathered + LANES * MICRO > 4096
        wanted.append(full)
        assert full or following == size, "the batch size moves with a step alone"
        if full:
            used.append(gathered)
            assert size <= following <= 4096 and gathered < size + LANES * MICRO
            assert gathered <= 4096
            gathered, size = 0, int(following)
    np.testing.assert_array_equal(state.emitted, wanted)
    assert (updates[~state.emitted] == 0).all()
    clock = controller.examples_clock[-1].astype(np.int64)
    assert clock[0] * 2**32 + clock[1] == sum(used)
    assert controller.updates_seen[-1] == len(used) > 300
    assert 512 < size == controller.next_batch_size.max()


def test_the_examples_of_one_batch_are_counted_exactly_beyond_2_to_the_24():
    """A count in float32 would stand still at 2²⁴, and the batch would never be complete."""
    size = 2**24 + 6
    controller = adapt_batch_size(norm_test(1.0), initial_batch_size=size, max_batch_size=2**30)
    optimizer = adaptive_multi_steps(optax.chain(controller, optax.sgd(0.1)), micro_batch_size=2)
    update = jax.jit(optimizer.update)
    state, emitted = optimizer.init(jnp.ones(2)), []
    for number, scatter in [(2**24, 4.0 * 2**27)] + [(1, 0.0)] * 6:
        noise = GradientNoise(
            jnp.array([1.0, 1.0]), jnp.float32(scatter), jnp.int32(number), jnp.int32(2)
        )
        _, state = update(noise.mean, state, noise=noise)
        emitted.append(bool(has_updated(state)))
    assert emitted == [False] * 6 + [True]
    shown = metrics(state)
    assert shown["num_examples"] == size
    # tr Σ / ‖ḡ‖² = 2²⁹/13/2 = 20,648,881.2: beyond 2²⁴ too
    np.testing.assert_allclose(int(shown["next_batch_size"]), np.ceil(2**29 / 13 / 2), rtol=1e-7)


@pytest.mark.parametrize("size", [2**30 + 1, 2**31, 2**40])
def test_a_batch_that_would_not_fit_its_counter_is_refused(size):
    with pytest.raises(ValueError, match=rf"max_batch_size.*{size}"):
        adapt_batch_size(norm_test(1.0), initial_batch_size=64, max_batch_size=size)
