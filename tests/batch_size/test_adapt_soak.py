"""`adapt_batch_size` under anything at all: the promises hold whatever the noise says."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from adabatch_jax import (
    BatchSizeStatus,
    GradientNoise,
    adapt_batch_size,
    get_batch_size,
    gradient_noise_scale,
    metrics,
    norm_test,
)
from adabatch_jax.batch_size import augmented_inner_product_test, coordinate_norm_test

STEPS = 24
CONTROLS = {
    "paper": (norm_test(0.5), {}),
    "shrinking": (
        norm_test(1.0),
        {"monotone": False, "ema_decay": 0.9, "debias": True, "min_batch_size": 16},
    ),
    "coordinates": (coordinate_norm_test(0.9), {"ema_decay": 0.5, "growth_limit": 1.5}),
    "inner_products": (
        augmented_inner_product_test(0.9, 5.0),
        {"monotone": False, "multiple_of": 8, "growth_limit": 3.0},
    ),
    "noise_scale": (gradient_noise_scale(), {"test_interval": 3, "dataset_size": 500}),
}
UNUSABLE = {
    BatchSizeStatus.TOO_FEW_GROUPS,
    BatchSizeStatus.NOT_FINITE,
    BatchSizeStatus.ZERO_GRADIENT,
}
ordinary = st.floats(0, 1e4, width=32)
anything = st.one_of(ordinary, st.floats(width=32), st.sampled_from([0.0, np.nan, np.inf, -np.inf]))


@functools.cache
def compiled(name):
    """(noises with a leading axis of steps, held) → what every step left in the state."""
    criterion, options = CONTROLS[name]
    link = adapt_batch_size(criterion, initial_batch_size=64, max_batch_size=512, **options)

    def step(state, given):
        noise, hold = given
        _, state = link.update(noise.mean, state, noise=noise, hold_batch_size=hold)
        shown = {k: v for k, v in metrics(state).items() if k != "num_examples"}
        return state, shown

    return jax.jit(lambda noises, held: jax.lax.scan(step, link.init(jnp.zeros(3)), (noises, held)))


@st.composite
def noises(draw):
    numbers = arrays(np.float32, (STEPS, 8), elements=draw(st.sampled_from([ordinary, anything])))
    x = draw(numbers)
    counts = draw(arrays(np.int32, (STEPS, 2), elements=st.integers(0, 1000)))
    groups = counts[:, 1] % 12
    return GradientNoise(x[:, :3], x[:, 3], counts[:, 0], groups, x[:, 4:7], x[:, 7])


@pytest.mark.parametrize("name", CONTROLS)
@settings(max_examples=60)
@given(given_noises=noises(), held=arrays(bool, STEPS))
def test_no_noise_breaks_a_promise(name, given_noises, held):
    options = {"min_batch_size": 1, "multiple_of": 1, "monotone": True} | CONTROLS[name][1]
    state, shown = compiled(name)(given_noises, held)
    sizes = np.concatenate([[64], shown["next_batch_size"]])
    status = shown["test_status"]

    assert sizes.min() >= options["min_batch_size"]
    assert sizes.max() <= 512
    assert not np.any(sizes % options["multiple_of"])
    if options["monotone"]:
        assert np.all(np.diff(sizes) >= 0)
    if limit := options.get("growth_limit"):
        largest = np.ceil(limit * sizes[:-1]) + options["multiple_of"] - 1
        assert np.all((sizes[1:] <= largest)[status != BatchSizeStatus.TOO_FEW_GROUPS])

    moved = np.diff(sizes) != 0
    if not options["monotone"]:  # one group alone may enlarge the batch
        way_out = status == BatchSizeStatus.TOO_FEW_GROUPS
        assert np.all(np.diff(sizes)[way_out] >= 0)
        moved &= ~way_out
    assert np.array_equal(moved, status == BatchSizeStatus.CHANGED)
    assert np.array_equal(shown["batch_size"], given_noises.num_examples)
    assert not any(np.isnan(x).any() for x in shown.values())
    unusable = np.isin(status, list(UNUSABLE))
    assert np.array_equal(shown["skipped_tests"], np.cumsum(unusable))
    due = np.arange(STEPS) % options.get("test_interval", 1) == 0
    tested = unusable | np.isin(status, [BatchSizeStatus.PASSED, BatchSizeStatus.CHANGED])
    full = options["monotone"] & (sizes[:-1] == 512)
    assert np.array_equal(tested, due & ~held & ~full)

    assert metrics(state)["num_examples"] == given_noises.num_examples.sum()
    assert int(get_batch_size(state)) == sizes[-1]
    for leaf in jax.tree.leaves((state.size_memory, state.last_size_test.display_ema)):
        assert np.all(np.isfinite(leaf))  # NaN never gets into an average
