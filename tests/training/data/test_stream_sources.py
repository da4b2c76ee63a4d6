"""Sources of streams: Grain, functions, collections, iterators; and what all streams refuse."""

import json

import grain
import numpy as np
import pytest

from adabatch_jax.training import ArrayStream, GrainStream, IterableStream, Rung

SHAPE = dict(micro_batch_size=3, num_groups=5)


def take(stream, size):
    batch = stream.take(size)
    return batch.groups[np.arange(3) < batch.sizes[:, None]].tolist()


def test_grain_repeats_and_its_workers_do_not_change_the_examples():
    dataset = grain.MapDataset.range(9).seed(3).shuffle().repeat(2)
    stream = GrainStream(dataset, **SHAPE)
    rows = take(stream, 4) + take(stream, 14)
    assert sorted(rows[:9]) == sorted(rows[9:]) == list(range(9))
    assert rows[:9] != rows[9:], "Grain shuffles every epoch anew"
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    threaded = GrainStream(dataset.to_iter_dataset(options), **SHAPE)
    threaded.take(8)
    saved = json.loads(json.dumps(threaded.state()))
    threaded.take(3)
    threaded.restore(saved)
    assert take(threaded, 15) == rows[8:]


def test_a_window_that_grain_shuffles_is_resumed_in_its_middle():
    dataset = grain.MapDataset.range(12).to_iter_dataset()
    dataset = grain.experimental.WindowShuffleIterDataset(dataset, window_size=5, seed=1)
    stream = GrainStream(dataset, **SHAPE)
    rows = take(stream, 7)
    saved = json.loads(json.dumps(stream.state()))
    rest = take(stream, 15)
    assert sorted(rows + rest) == list(range(12)) != rows + rest
    for other in (stream, GrainStream(dataset, **SHAPE)):
        other.restore(saved)
        assert take(other, 1) + take(other, 15) == rest


def test_a_function_is_called_again_for_every_epoch():
    calls = []

    def source():
        calls.append(None)
        return iter(range(4))

    stream = IterableStream(source, epochs=3, **SHAPE)
    assert take(stream, 6) == [0, 1, 2, 3, 0, 1]
    saved = stream.state()
    assert saved == {"stream": "IterableStream", "position": 6, "epoch": 1, "offset": 2}
    assert stream.take(15).sizes.sum() == 6 and len(calls) == 3
    stream.restore(saved)
    assert take(stream, 3) == [2, 3, 0]
    endless = IterableStream(source, epochs=None, **SHAPE)
    for _ in range(5):
        assert endless.take(15).sizes.sum() == 15


def test_a_restored_function_is_read_up_to_the_place_and_no_further():
    read = []

    def source():
        for i in range(10):
            read.append(i)
            yield i

    stream = IterableStream(source, **SHAPE)
    stream.take(4)
    saved = stream.state()
    read.clear()
    stream.restore(saved)
    assert read == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"source has 3 examples, .* offset=4 of them"):
        IterableStream(lambda: range(3), **SHAPE).restore(saved)
    fewer = IterableStream(source, **SHAPE)
    fewer.restore({**saved, "epoch": 1})
    with pytest.raises(StopIteration):
        fewer.take(1)


def test_what_was_dropped_is_not_in_the_state():
    stream = IterableStream(lambda: range(5), epochs=2, drop_remainder=True, **SHAPE)
    stream.take(4)
    saved = stream.state()
    with pytest.raises(StopIteration):
        stream.take(7)
    assert stream.state() == saved
    stream.restore(stream.state())
    assert take(stream, 6) == [4, 0, 1, 2, 3, 4]


def test_an_iterator_can_be_read_but_not_resumed():
    stream = IterableStream(map(float, range(9)), **SHAPE)
    assert take(stream, 2) == [0, 1]
    for call in (stream.state, lambda: stream.restore({})):
        with pytest.raises(
            ValueError, match=r"got the iterator <map .*; give a function that makes"
        ):
            call()
    assert take(stream, 3) == [2, 3, 4], "and goes on"


def test_a_source_that_fails_does_not_lose_examples_in_silence():
    def source():
        yield from range(4)
        raise OSError("the disk is gone")

    stream = IterableStream(source, **SHAPE)
    stream.take(3)
    saved = stream.state()
    with pytest.raises(OSError, match="the disk is gone"):
        stream.take(3)
    assert stream.position == 3 and stream.state() == saved
    with pytest.raises(RuntimeError, match="an earlier take failed; restore a state to go on"):
        stream.take(1)
    stream.restore(saved)
    assert take(stream, 1) == [3]


class LiveState(grain.IterDataset):
    """Counts to 9; its iterator hands out, and keeps, the very dictionary that it counts in."""

    def __iter__(self):
        return LiveIterator()


class LiveIterator(grain.DatasetIterator):
    def __init__(self):
        super().__init__()
        self.live = {"next": 0}

    def __next__(self):
        if self.live["next"] == 9:
            raise StopIteration
        self.live["next"] += 1
        return self.live["next"] - 1

    def get_state(self):
        return self.live

    def set_state(self, state):
        self.live = state


def test_a_saved_state_of_grain_does_not_move_with_the_iterator():
    stream = GrainStream(LiveState(), **SHAPE)
    stream.take(2)
    saved = stream.state()
    for _ in range(2):
        assert take(stream, 3) == [2, 3, 4]
        stream.restore(saved)


def test_grain_has_no_state_after_a_failure():
    def failing(i):
        if i == 4:
            raise OSError("the disk is gone")
        return i

    dataset = grain.MapDataset.range(9).map(failing)
    stream = GrainStream(dataset, **SHAPE)
    assert take(stream, 3) == [0, 1, 2]
    saved = stream.state()
    with pytest.raises(OSError, match="the disk is gone"):
        stream.take(3)
    with pytest.raises(RuntimeError, match="GrainStream: an earlier take failed"):
        stream.state()
    stream.restore(saved)
    assert take(stream, 1) == [3]


def test_a_source_may_use_its_buffer_again():
    def source():
        buffer = np.zeros(())
        for i in range(5):
            buffer[...] = i
            yield buffer

    assert take(IterableStream(source, **SHAPE), 5) == [0, 1, 2, 3, 4]


ONCE = iter([1])
LIKE = r"every example must be like the first"
UNLIKE = {
    "shape": ([np.zeros(2), np.zeros(3)], LIKE + r", float64\[2\], got float64\[3\]"),
    "dtype": ([1, 1.5], LIKE + r", int64\[\], got float64\[\]"),
    "structure": ([{"x": 1}, {"y": 1}], LIKE + r", {'x': 'int64\[\]'}, got {'y': 'int64\[\]'}"),
    "text": (["abc"], "an example must be a pytree of numbers, got 'abc'"),
    "nothing": ([None], "an example must be a pytree of numbers, got None"),
}


@pytest.mark.parametrize(("examples", "message"), UNLIKE.values(), ids=UNLIKE)
def test_examples_that_cannot_be_stacked_are_shown(examples, message):
    with pytest.raises(ValueError, match=message):
        IterableStream(examples, **SHAPE).take(len(examples))


def array_stream(**kwargs):
    return ArrayStream(np.arange(9), **{**SHAPE, **kwargs})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: array_stream(micro_batch_size=0), "ArrayStream: micro_batch_size .* got 0"),
        (lambda: array_stream(num_groups=1.5), "num_groups must be an integer, got 1.5"),
        (lambda: array_stream(process_count=0), "process_count must be at least 1, got 0"),
        (
            lambda: array_stream(process_index=2, process_count=2),
            r"process_index must lie in \[0, 2\), got 2",
        ),
        (lambda: array_stream(seed=-1), "seed .* got -1"),
        (lambda: array_stream(epochs=0), "epochs .* got 0"),
        (lambda: ArrayStream({}, **SHAPE), r"every leaf of data .* got shapes \[\]"),
        (lambda: ArrayStream(np.float32(1), **SHAPE), r"every leaf of data .* got shapes \[\(\)\]"),
        (
            lambda: ArrayStream((np.zeros(2), np.zeros(3)), **SHAPE),
            r"got shapes \[\(2,\), \(3,\)\]",
        ),
        (lambda: ArrayStream(np.zeros(0), **SHAPE), r"the length of data .* got 0"),
        (lambda: array_stream().take(0), "batch_size must be at least 1, got 0"),
        (lambda: array_stream().take(2.0), "batch_size must be an integer, got 2.0"),
        (lambda: array_stream().take(16), r"must be at most .* = 3 \* 5 \* 1, got 16"),
        (lambda: array_stream().take(9, Rung(4, 2)), r"= 4 \* 2 \* 1, got 9"),
        (lambda: array_stream(process_count=2).take(31), r"= 3 \* 5 \* 2, got 31"),
        (lambda: array_stream().take(1, Rung(0, 2)), "micro_batch_size must be at least 1, got 0"),
        (lambda: array_stream().restore(7), "state must come from .* got 7"),
        (
            lambda: array_stream().restore(IterableStream([1], **SHAPE).state()),
            "state must come from .* got {'stream': 'IterableStream'",
        ),
        (
            lambda: array_stream().restore(array_stream(seed=4).state()),
            "seed is 0, but the state has 4",
        ),
        (
            lambda: array_stream().restore(ArrayStream(np.arange(8), **SHAPE).state()),
            "num_examples is 9, but the state has 8",
        ),
        (
            lambda: array_stream().restore({**array_stream().state(), "position": -3}),
            r"state\['position'\] must be at least 0, got -3",
        ),
        (lambda: GrainStream([1, 2], **SHAPE), "dataset must be a grain.MapDataset .* got list"),
        (
            lambda: GrainStream(grain.MapDataset.range(9), **SHAPE).restore(
                {"stream": "GrainStream", "position": 1}
            ),
            "state must have the key 'grain'",
        ),
        (lambda: IterableStream(3, **SHAPE), "source must be iterable or a function, got 3"),
        (lambda: IterableStream([1], epochs=0, **SHAPE), "epochs .* got 0"),
        (lambda: IterableStream(iter([1]), epochs=2, **SHAPE), "epochs must be 1 .* got 2"),
        (lambda: IterableStream(iter([1]), epochs=None, **SHAPE), "epochs must be 1 .* got None"),
        (lambda: IterableStream([], **SHAPE).take(1), "source gave no examples in epoch 0"),
        (
            lambda: IterableStream(lambda it=ONCE: it, epochs=2, **SHAPE).take(3),
            "source gave no examples in epoch 1",
        ),
        (
            lambda: IterableStream([1], **SHAPE).restore({"stream": "IterableStream"}),
            r"state\['position'\] must be an integer, got 'nothing'",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
