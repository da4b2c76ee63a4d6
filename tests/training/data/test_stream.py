"""Streams: the same examples however they are cut, shared or resumed, and nothing made up."""

import functools
import itertools
import json

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

import adabatch_jax as adabatch
from adabatch_jax.training import (
    ArrayStream,
    Feed,
    GrainStream,
    IterableStream,
    Ladder,
    Rung,
    masked_mean,
)

NUMBER = 23
SHAPE = dict(micro_batch_size=3, num_groups=5)
NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def example(i):
    return {"x": np.array([i, 10.0 * i], np.float32), "y": i % 4}


def arrays():
    examples = [example(i) for i in range(NUMBER)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)


def grain_map():
    return grain.MapDataset.range(NUMBER).seed(3).shuffle().map(example)


def grain_filtered():
    # 26 numbers, 23 of which stay: the place in the data is not the number of examples.
    dataset = grain.MapDataset.range(26).to_iter_dataset(NO_THREADS)
    return dataset.filter(lambda i: i % 7 != 6).map(example)


def grain_window():
    dataset = grain.MapDataset.range(NUMBER).to_iter_dataset(NO_THREADS)
    shuffled = grain.experimental.WindowShuffleIterDataset(dataset, window_size=5, seed=1)
    return shuffled.map(example)


def generator():
    return map(example, range(NUMBER))


# Each makes a stream of 23 examples: how, and what it reads.
STREAMS = {
    "arrays": lambda **kwargs: ArrayStream(arrays(), seed=5, epochs=1, **kwargs),
    "grain map": lambda **kwargs: GrainStream(grain_map(), **kwargs),
    "grain filter": lambda **kwargs: GrainStream(grain_filtered(), **kwargs),
    "grain window": lambda **kwargs: GrainStream(grain_window(), **kwargs),
    "function": lambda **kwargs: IterableStream(generator, **kwargs),
    "collection": lambda **kwargs: IterableStream(list(generator()), **kwargs),
}
every_stream = pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
# Window shuffling takes 10 ms an example; what Hypothesis would try is tried once, with the sources.
QUICK = {name: make for name, make in STREAMS.items() if name != "grain window"}
every_quick_stream = pytest.mark.parametrize("make", QUICK.values(), ids=QUICK)
ALONE = dict(process_index=0, process_count=1)


def real(batch):
    """The real examples in order, as rows (x₀, x₁, y)."""
    columns = batch.groups["x"].shape[1]
    keep = np.arange(columns) < batch.sizes[:, None]
    return np.concatenate([batch.groups["x"][keep], batch.groups["y"][keep][:, None]], axis=1)


def drain(stream, sizes, rung=None):
    """All examples that are left, cut into batches of these sizes again and again."""
    pieces = [np.empty((0, 3))]
    for size in itertools.cycle(sizes):
        try:
            pieces.append(real(stream.take(size, rung)))
        except StopIteration:
            return np.concatenate(pieces)
    raise AssertionError


@functools.cache
def whole(make):
    return drain(make(**SHAPE), [1])


@every_stream
def test_one_pass_gives_every_example_once(make):
    stream = make(**SHAPE)
    rows = drain(stream, [4, 15, 2])
    expected = np.array([[i, 10 * i, i % 4] for i in rows[:, 0]])
    np.testing.assert_array_equal(rows, expected)
    assert len(np.unique(rows[:, 0])) == len(rows) == stream.position == NUMBER


@every_quick_stream
@given(sizes=st.lists(st.integers(1, 15), min_size=1, max_size=6))
def test_the_stream_does_not_depend_on_how_it_is_cut(make, sizes):
    np.testing.assert_array_equal(drain(make(**SHAPE), sizes), whole(make))


@every_stream
def test_shapes_are_static_and_sizes_say_what_is_real(make):
    stream = make(**SHAPE)
    for size, sizes, used in (
        (7, [3, 3, 1, 0, 0], 3),
        (1, [1, 0, 0, 0, 0], 1),
        (12, [3, 3, 3, 3, 0], 4),
    ):
        batch = stream.take(size)
        assert batch.groups["x"].shape == (5, 3, 2) and batch.groups["y"].shape == (5, 3)
        assert batch.sizes.tolist() == sizes and batch.sizes.dtype == np.int32
        assert batch.used == used and batch.used.dtype == np.int32
        # What fills the shape is an example of the batch, never an invention such as zeros.
        x = batch.groups["x"].reshape(-1, 2)
        assert set(x[:, 0]) == set(real(batch)[:, 0])
    assert stream.position == 20 and type(stream.position) is int


@every_stream
def test_a_take_may_name_another_shape(make):
    stream = make(**SHAPE)
    batch = stream.take(6, Rung(micro_batch_size=2, num_groups=4))
    assert batch.groups["x"].shape == (4, 2, 2) and batch.sizes.tolist() == [2, 2, 2, 0]
    np.testing.assert_array_equal(np.concatenate([real(batch), drain(stream, [5])]), whole(make))


@every_stream
def test_the_last_batch_is_short_and_then_the_stream_stops(make):
    stream = make(**SHAPE)
    stream.take(NUMBER - 13)
    last = stream.take(15)
    assert last.sizes.sum() == 13 and last.used == 5 and stream.position == NUMBER
    for _ in range(2):
        with pytest.raises(StopIteration, match=f"{type(stream).__name__}: .* after {NUMBER} exam"):
            stream.take(1)
    assert stream.position == NUMBER


@every_stream
def test_the_last_batch_is_dropped_if_so_wished(make):
    stream = make(drop_remainder=True, **SHAPE)
    first = real(stream.take(NUMBER - 13))
    with pytest.raises(StopIteration):
        stream.take(14)
    assert stream.position == NUMBER - 13 == len(first)
    exact = make(drop_remainder=True, **SHAPE)
    exact.take(NUMBER - 13)
    assert exact.take(13).sizes.sum() == 13, "a last batch that is full is no remainder"


@every_quick_stream
@given(before=st.lists(st.integers(1, 6), max_size=4), further=st.integers(0, 8))
def test_a_restored_stream_goes_on_as_if_nothing_had_happened(make, before, further):
    stream = make(**SHAPE)
    for size in before:
        stream.take(size)
    saved = stream.state()
    text = json.dumps(saved)
    position = stream.position
    if further:
        stream.take(further)
    assert json.dumps(saved) == text, "what was saved stays as it was"
    rest = whole(make)[position:]
    for other in (make(**SHAPE), stream):
        other.restore(json.loads(text))
        assert other.position == position
        np.testing.assert_array_equal(drain(other, [4]), rest)


@every_stream
def test_a_state_from_the_end_is_an_end(make):
    stream = make(**SHAPE)
    drain(stream, [15])
    other = make(**SHAPE)
    other.restore(json.loads(json.dumps(stream.state())))
    with pytest.raises(StopIteration):
        other.take(1)


@every_stream
@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_share_the_groups_of_the_same_batch(make, process_count):
    alone = make(**SHAPE, **ALONE)
    shape = dict(micro_batch_size=3, num_groups=-(-5 // process_count))
    processes = [
        make(**shape, process_index=i, process_count=process_count) for i in range(process_count)
    ]
    for size in (15, 4, 3, 1):  # 23 in all
        batch = alone.take(size)
        shares = [process.take(size) for process in processes]
        assert {process.position for process in processes} == {alone.position}
        assert {int(share.used) for share in shares} == {-(-int(batch.used) // process_count)}
        for g, group_size in enumerate(batch.sizes):
            share, j = shares[g % process_count], g // process_count
            assert share.sizes[j] == group_size
            x = share.groups["x"][j][:group_size]
            np.testing.assert_array_equal(x, batch.groups["x"][g][:group_size])
        assert sum(share.sizes.sum() for share in shares) == batch.sizes.sum()


@every_stream
def test_a_state_does_not_know_how_many_processes_there_were(make):
    two = [make(**SHAPE, process_index=i, process_count=2) for i in range(2)]
    for process in two:
        process.take(8)
    assert two[0].state() == two[1].state()
    three = [make(**SHAPE, process_index=i, process_count=3) for i in range(3)]
    for process in three:
        process.restore(two[0].state())
    rows = np.concatenate([real(process.take(7)) for process in three])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, whole(make)[8:15]))


def test_processes_are_those_of_jax_unless_said(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert ArrayStream(np.arange(9), **SHAPE).take(8).sizes.tolist() == [3, 0, 0, 0, 0]


@given(st.integers(1, 40), st.integers(0, 2**64 - 1), st.lists(st.integers(1, 15), max_size=12))
def test_arrays_come_in_the_order_of_the_feed_over_any_number_of_epochs(number, seed, sizes):
    stream = ArrayStream({"x": np.arange(number)}, seed=seed, **SHAPE)
    feed = Feed(number, seed)
    for size in sizes:
        start = stream.position
        batch = stream.take(size)
        rows = batch.groups["x"][np.arange(3) < batch.sizes[:, None]]
        np.testing.assert_array_equal(rows, feed.indices(start, size))
    assert stream.position == sum(sizes)


def test_positions_of_arrays_do_not_wrap():
    stream = ArrayStream(np.arange(10), seed=1, **SHAPE)
    far = 10 * 2**40 + 3
    stream.restore({**stream.state(), "position": far})
    batch = stream.take(15)
    np.testing.assert_array_equal(batch.groups.reshape(-1), Feed(10, 1).indices(far, 15))
    assert stream.position == far + 15 == stream.state()["position"]


def test_epochs_bound_the_passes_over_arrays():
    stream = ArrayStream(np.arange(10), epochs=3, **SHAPE)
    assert [int(stream.take(15).sizes.sum()) for _ in range(2)] == [15, 15]
    with pytest.raises(StopIteration, match="after 30 examples"):
        stream.take(1)
    longer = ArrayStream(np.arange(10), epochs=4, **SHAPE)
    longer.restore(stream.state())
    assert sorted(longer.take(10).groups.reshape(-1)[:10]) == list(range(10))


def test_after_a_dropped_remainder_of_arrays_a_smaller_batch_fits():
    stream = ArrayStream(np.arange(10), epochs=1, drop_remainder=True, **SHAPE)
    stream.take(8)
    with pytest.raises(StopIteration):
        stream.take(3)
    assert stream.take(2).sizes.sum() == 2


def test_memory_mapped_arrays_are_read_row_by_row(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12.0).reshape(6, 2))
    stream = ArrayStream(np.load(tmp_path / "x.npy", mmap_mode="r"), epochs=1, **SHAPE)
    assert stream.take(6).groups[:2].sum() == 66


def test_the_statistics_are_those_of_the_real_examples():
    # Ragged groups of every kind, with values that would show if a filler were counted.
    x = np.exp(np.arange(NUMBER) / 3).astype(np.float32)

    def loss_fn(w, group):
        values, size = group
        return masked_mean(0.5 * (w - values) ** 2, size)

    fn = jax.jit(adabatch.value_and_grad_noise(loss_fn))
    stream = ArrayStream(x, seed=2, epochs=1, micro_batch_size=3, num_groups=5)
    start = 0
    for size in (7, 3, 11, 9):
        batch = stream.take(size)
        rows = x[Feed(NUMBER, 2).indices(start, stream.position - start)].astype(np.float64)
        start = stream.position
        value, noise = fn(0.0, (batch.groups, batch.sizes), sizes=batch.sizes, count=batch.used)
        assert int(noise.num_examples) == len(rows)
        np.testing.assert_allclose(value, np.mean(0.5 * rows**2), rtol=1e-5)
        np.testing.assert_allclose(noise.mean, -np.mean(rows), rtol=1e-5)
        groups = [rows[i : i + 3] for i in range(0, len(rows), 3)]
        scatter = sum(len(g) * (g.mean() - rows.mean()) ** 2 for g in groups)
        np.testing.assert_allclose(noise.scatter, scatter, rtol=1e-4, atol=1e-6)
    assert fn._cache_size() == 1, "the number of examples changes, the shape does not"


def test_the_ladder_gives_the_shapes():
    ladder = Ladder(4, 64, max_micro_batch_size=8, noise_groups=4)
    stream = ArrayStream(np.arange(100), micro_batch_size=1, num_groups=1)
    for size in (4, 9, 33, 64):
        batch = stream.take(size, ladder.rung(size))
        assert batch.sizes.sum() == size
