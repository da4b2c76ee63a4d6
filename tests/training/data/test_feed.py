"""The feed: the stream does not depend on how it is cut, and every epoch is a permutation."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from adabatch_jax.training.data import Feed, _feed

SIZES = st.integers(1, 50)
SEEDS = st.integers(0, 2**64 - 1)


@given(SIZES, SEEDS, st.integers(0, 200), st.lists(st.integers(0, 120), max_size=8))
def test_the_stream_does_not_depend_on_the_batches(num_examples, seed, start, lengths):
    feed = Feed(num_examples, seed)
    whole = feed.indices(start, sum(lengths))
    starts = start + np.cumsum([0, *lengths])[:-1]
    pieces = [feed.indices(s, n) for s, n in zip(starts, lengths, strict=True)]
    np.testing.assert_array_equal(np.concatenate([whole[:0], *pieces]), whole)


@given(SIZES, SEEDS, st.integers(0, 2**40))
def test_every_epoch_holds_every_example_once(num_examples, seed, epoch):
    order = Feed(num_examples, seed).indices(epoch * num_examples, num_examples)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_examples))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(Feed(60, seed).indices(60 * epoch, 60)) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    forwards = Feed(30, 7)
    for position in range(0, 300, 17):  # fills and empties the cache
        forwards.indices(position, 17)
    np.testing.assert_array_equal(forwards.indices(60, 30), Feed(30, 7).indices(60, 30))


def test_the_order_is_frozen():
    # A checkpoint of an earlier release, or of another NumPy, continues with the same examples.
    two_epochs = [0, 2, 1, 5, 4, 3, 6, 7, 5, 3, 7, 2, 4, 1, 0, 6]
    assert Feed(8, 0).indices(0, 16).tolist() == two_epochs


def test_every_order_is_equally_likely():
    # 6 orders of 3 examples over 6000 epochs: chi-square with 5 degrees of freedom, 99.99 % at 26.
    epochs = Feed(3, 1).indices(0, 18_000).reshape(-1, 3)
    _, counts = np.unique(epochs, axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.sum((counts - 1000.0) ** 2 / 1000.0) < 26


def test_positions_do_not_wrap():
    feed = Feed(10, 3)
    far = 10 * 2**40 + 5
    low = far % 2**32
    assert not np.array_equal(feed.indices(far, 100), feed.indices(low, 100))
    np.testing.assert_array_equal(feed.indices(far + 1, 99), feed.indices(far, 100)[1:])
    np.testing.assert_array_equal(feed.indices(np.int64(far), np.int32(4)), feed.indices(far, 4))


def test_the_caller_may_change_what_it_gets():
    feed = Feed(6, 0)
    first = feed.indices(0, 6)
    first[:] = -1
    assert feed.indices(0, 6).min() == 0
    assert not _feed._order(6, 0, 0).flags.writeable, "the shared order is out of reach"


def test_dtypes():
    indices, sizes = Feed(6, 0).grouped(0, 5, 2, 3)
    assert Feed(6, 0).indices(0, 0).dtype == np.int32
    assert Feed(6, 0).indices(0, 20).dtype == indices.dtype == sizes.dtype == np.int32


@given(st.integers(0, 100), st.integers(1, 9), st.integers(1, 9), st.data())
def test_groups_hold_the_stretch_row_by_row(start, columns, rows, data):
    feed = Feed(13, 5)
    length = data.draw(st.integers(0, rows * columns))
    indices, sizes = feed.grouped(start, length, columns, rows)
    assert indices.shape == (rows, columns)
    assert sizes.shape == (rows,)
    real = np.arange(columns) < sizes[:, None]
    np.testing.assert_array_equal(indices[real], feed.indices(start, length))
    assert sizes.sum() == length
    assert np.all(indices[~real] == 0)
    # Full groups, then at most one ragged group, then empty ones.
    np.testing.assert_array_equal(sizes, np.sort(sizes)[::-1])
    assert np.sum((sizes > 0) & (sizes < columns)) <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Feed(0, 0), r"num_examples must lie in \[1, 2147483648\), got 0"),
        (lambda: Feed(2**31, 0), "num_examples .* got 2147483648"),
        (lambda: Feed(2.5, 0), "num_examples must be an integer, got 2.5"),
        (lambda: Feed(4, -1), "seed .* got -1"),
        (lambda: Feed(4, 2**64), "seed .* got 18446744073709551616"),
        (lambda: Feed(4, 0).indices(-1, 2), "start .* got -1"),
        (lambda: Feed(4, 0).indices(0, -2), "length must be at least 0, got -2"),
        (lambda: Feed(4, 0).indices(1.0, 2), "start must be an integer, got 1.0"),
        (lambda: Feed(4, 0).grouped(0, 7, 2, 3), r"length must be at most .* = 2 \* 3, got 7"),
        (lambda: Feed(4, 0).grouped(0, 1, 0, 3), "micro_batch_size must be at least 1, got 0"),
        (lambda: Feed(4, 0).grouped(0, 1, 2, 0), "num_groups must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_feeds_are_values():
    assert Feed(4, 1) == Feed(4, 1)
    assert Feed(4, 1) != Feed(4, 2)
    assert len({Feed(4, 1), Feed(4, 1), Feed(5, 1)}) == 2
    with pytest.raises(AttributeError):
        Feed(4, 1).seed = 2
