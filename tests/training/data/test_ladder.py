import itertools

from hypothesis import given
from hypothesis import strategies as st

from adabatch_jax.training import rung_for
from adabatch_jax.training.data import batch_sizes_of

sizes = st.integers(2, 5000)


@st.composite
def ladders(draw):
    initial = draw(st.integers(2, 300))
    return dict(
        initial_batch_size=initial,
        max_batch_size=initial + draw(st.integers(0, 5000)),
        max_micro_batch_size=draw(st.integers(1, 1024)),
        noise_groups=draw(st.integers(2, 32)),
    )


@given(ladders(), st.data())
def test_every_batch_fits_its_rung(ladder, data):
    b = data.draw(st.integers(ladder["initial_batch_size"], ladder["max_batch_size"]))
    rung = rung_for(b, **ladder)
    assert rung.micro_batch_size * rung.num_groups >= b
    assert rung.micro_batch_size <= ladder["max_micro_batch_size"]
    assert -(-b // rung.micro_batch_size) >= min(ladder["noise_groups"], b)


@given(ladders())
def test_rungs_double_and_are_few(ladder):
    low, high = ladder["initial_batch_size"], ladder["max_batch_size"]
    rungs = [rung_for(b, **ladder) for b in range(low, high + 1)]
    micro = sorted({r.micro_batch_size for r in rungs})
    assert len(set(rungs)) == len(micro), "one shape per micro-batch size"
    assert all(b == 2 * a for a, b in itertools.pairwise(micro))
    assert rungs == sorted(rungs, key=lambda r: r.micro_batch_size), "it only climbs"


@given(ladders())
def test_the_batch_sizes_of_a_rung_are_those_that_come_to_it(ladder):
    for b in range(ladder["initial_batch_size"], ladder["max_batch_size"] + 1):
        low, high = batch_sizes_of(rung_for(b, **ladder), **ladder)
        assert low <= b < high
        assert high > ladder["max_batch_size"] or rung_for(high, **ladder) != rung_for(b, **ladder)


def test_below_the_top_the_allocation_is_at_most_a_few_times_the_batch():
    ladder = dict(
        initial_batch_size=64, max_batch_size=8192, max_micro_batch_size=256, noise_groups=8
    )
    for b in range(64, 2048):
        rung = rung_for(b, **ladder)
        assert rung.micro_batch_size * rung.num_groups <= 2.1 * b
