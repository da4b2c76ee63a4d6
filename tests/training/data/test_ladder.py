import itertools

import pytest
from hypothesis import given, strategies as st

from adabatch_jax.training import Ladder

sizes = st.integers(2, 5000)


@st.composite
def ladders(draw):
    initial = draw(st.integers(2, 300))
    return Ladder(
        initial_batch_size=initial,
        max_batch_size=initial + draw(st.integers(0, 5000)),
        max_micro_batch_size=draw(st.integers(1, 1024)),
        noise_groups=draw(st.integers(2, 32)),
    )


@given(ladders(), st.data())
def test_every_batch_fits_its_rung(ladder, data):
    b = data.draw(st.integers(ladder.initial_batch_size, ladder.max_batch_size))
    rung = ladder.rung(b)
    assert rung.micro_batch_size * rung.num_groups >= b
    assert rung.micro_batch_size <= ladder.max_micro_batch_size
    assert -(-b // rung.micro_batch_size) >= min(ladder.noise_groups, b)


@given(ladders())
def test_rungs_double_and_are_few(ladder):
    low, high = ladder.initial_batch_size, ladder.max_batch_size
    rungs = [ladder.rung(b) for b in range(low, high + 1)]
    micro = sorted({r.micro_batch_size for r in rungs})
    assert len(set(rungs)) == len(micro), "one shape per micro-batch size"
    assert all(b == 2 * a for a, b in itertools.pairwise(micro))
    assert rungs == sorted(rungs, key=lambda r: r.micro_batch_size), "it only climbs"


@given(ladders())
def test_the_batch_sizes_of_a_rung_are_those_that_come_to_it(ladder):
    for b in range(ladder.initial_batch_size, ladder.max_batch_size + 1):
        low, high = ladder.batch_sizes(ladder.rung(b))
        assert low <= b < high
        assert high > ladder.max_batch_size or ladder.rung(high) != ladder.rung(b)


def test_below_the_top_the_allocation_is_at_most_a_few_times_the_batch():
    ladder = Ladder(
        initial_batch_size=64, max_batch_size=8192, max_micro_batch_size=256, noise_groups=8
    )
    for b in range(64, 2048):
        rung = ladder.rung(b)
        assert rung.micro_batch_size * rung.num_groups <= 2.1 * b


def test_a_batch_beyond_the_largest_has_the_top_rung():
    ladder = Ladder(16, 100, max_micro_batch_size=1024, noise_groups=8)
    assert ladder.rung(5000) == ladder.rung(100) and ladder.after(ladder.rung(100)) is None
    assert ladder.batch_sizes(ladder.rung(100)) == (64, 2**31 - 1)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="Ladder: noise_groups must be a positive integer, got 0"):
        Ladder(16, 100, max_micro_batch_size=1024, noise_groups=0)
