"""The test of `adapt_batch_size` by itself: pure functions, no optimizer around them."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from adabatch_jax import BatchSizeStatus, norm_test
from adabatch_jax.batch_size._decide import Rules, Usable, WayOut, decide, next_size, two_groups
from adabatch_jax.batch_size._sizes import Sizes
from adabatch_jax.batch_size._state import Decision, SizeMemory, SizeRecord

MAY_SHRINK = Sizes(1, 1024, 1, None, monotone=False, population=None)
MAY_GROW = Sizes(1, 1024, 1, None, monotone=True, population=None)
YES, NO = jnp.bool_(True), jnp.bool_(False)


def before(size):
    memory = SizeMemory((), jnp.float32(0), jnp.int32(0))
    numbers = dict.fromkeys(SizeRecord._fields, jnp.float32(0))
    numbers |= dict.fromkeys(("test_status", "skipped_tests"), jnp.int32(0))
    record = SizeRecord(**numbers | {"display_ema": jnp.zeros(2, jnp.float32)})
    return Decision(jnp.int32(size), memory, record)


def sized(sizes, size, required, usable=YES, way_out=None):
    moved, least = next_size(
        sizes, jnp.int32(size), jnp.float32(required), jnp.int32(0), usable, way_out
    )
    return int(moved), int(least)


@pytest.mark.parametrize(
    ("sizes", "required", "usable", "expected"),
    [
        (MAY_GROW, 100.5, YES, 101),
        (MAY_GROW, 10.0, YES, 64),
        (MAY_SHRINK, 10.0, YES, 10),
        (MAY_GROW, 5000.0, YES, 1024),
        (MAY_GROW, 100.5, NO, 64),
    ],
)
def test_the_next_size(sizes, required, usable, expected):
    assert sized(sizes, 64, required, usable)[0] == expected


def test_one_group_is_enlarged_to_two_and_stays_there(make_noise):
    noise = make_noise(num_examples=64, num_groups=1)
    pair, needed = two_groups(noise, noise.squared_norm, jnp.int32(64))
    assert int(pair) == 128 and bool(needed)
    assert sized(MAY_SHRINK, 64, 1.0, NO, WayOut(pair, needed)) == (128, 128)
    # Two groups need no way out, and the next may be as large as these.
    noise = make_noise(num_examples=64, num_groups=2)
    pair, needed = two_groups(noise, noise.squared_norm, jnp.int32(64))
    assert int(pair) == 64 and not needed


@pytest.mark.parametrize(
    ("usable", "moved", "status"),
    [
        (Usable(YES, YES, YES), NO, BatchSizeStatus.PASSED),
        (Usable(YES, YES, YES), YES, BatchSizeStatus.CHANGED),
        (Usable(YES, YES, NO), NO, BatchSizeStatus.ZERO_GRADIENT),
        (Usable(YES, NO, NO), NO, BatchSizeStatus.NOT_FINITE),
        (Usable(NO, NO, NO), YES, BatchSizeStatus.TOO_FEW_GROUPS),
    ],
)
def test_the_status_names_the_first_thing_that_is_wrong(usable, moved, status):
    assert int(usable.status(moved)) == status


def test_a_decision_without_smoothing_is_that_of_the_criterion(make_noise):
    noise, rules = make_noise(trace=100, square=4), Rules(norm_test(0.5), None, debias=False)
    after = decide(rules, MAY_GROW, None, noise, {}, before(8))
    assert int(after.next_batch_size) == 100  # 100 / (0.25 · 4)
    assert int(after.last_size_test.test_status) == BatchSizeStatus.CHANGED
    assert float(after.last_size_test.required_batch_size) == 100
    assert after.size_memory.evidence_ema == ()
