"""`update(batch_size_multiple=…)`: the sizes that whole calls add up to, below the maximum."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from adabatch_jax import (
    BatchSizeStatus,
    adapt_batch_size,
    adaptive_multi_steps,
    get_batch_size,
    has_updated,
    metrics,
    needs_noise,
    norm_test,
)


def sizes_of(make_noise, traces, calls, **options):
    """The batch sizes after tests that ask for so many examples, and the last state."""
    options = {"initial_batch_size": 64, "max_batch_size": 1000} | options
    link = adapt_batch_size(norm_test(1.0), **options)
    update = jax.jit(partial(link.update, batch_size_multiple=calls))
    state, sizes = link.init(jnp.zeros(2)), []
    for trace in traces:
        noise = make_noise(trace=trace, num_examples=int(get_batch_size(state)))
        _, state = update(noise.mean, state, noise=noise)
        sizes.append(int(get_batch_size(state)))
    return sizes, state


@pytest.mark.parametrize(
    ("calls", "multiple_of", "largest", "sizes"),
    [
        (None, 1, 1000, [65, 301, 1000]),
        (16, 1, 1000, [80, 304, 992]),
        (16, 8, 1000, [80, 304, 992]),
        (8, 16, 1008, [80, 304, 1008]),
        (32, 1, 1000, [96, 320, 992]),
    ],
)
def test_sizes_are_whole_calls(make_noise, calls, multiple_of, largest, sizes):
    options = {"multiple_of": multiple_of, "max_batch_size": largest}
    found, state = sizes_of(make_noise, (65, 301, 1e9), calls, **options)
    assert found == sizes
    assert not needs_noise(state)


def test_the_least_common_multiple_counts(make_noise):
    options = {"initial_batch_size": 48, "max_batch_size": 1008, "multiple_of": 24}
    assert sizes_of(make_noise, (49, 1e9), 16, **options)[0] == [96, 1008]


def test_at_the_largest_whole_size_the_test_is_off(make_noise):
    _, state = sizes_of(make_noise, (1e9, 1e9), 16)
    assert metrics(state)["test_status"] == BatchSizeStatus.AT_MAXIMUM
    assert metrics(state)["batch_size"] == metrics(state)["next_batch_size"] == 992


def test_a_minimum_and_shrinking_keep_to_whole_calls(make_noise):
    found, _ = sizes_of(make_noise, (500, 1, 40), 16, monotone=False, min_batch_size=20)
    assert found == [512, 32, 48]


@pytest.mark.parametrize(("size", "after"), [(40, 48), (1000, 992)])
def test_a_size_from_before_other_calls_is_rounded(make_noise, size, after):
    link = adapt_batch_size(norm_test(1.0), initial_batch_size=40, max_batch_size=1000)
    noise = make_noise(trace=1)
    state = link.init(noise.mean)._replace(next_batch_size=jnp.int32(size))
    _, state = link.update(
        noise.mean, state, noise=noise, batch_size_multiple=16, hold_batch_size=True
    )
    assert int(get_batch_size(state)) == after


def test_what_is_promised_is_used_and_shown():
    optimizer = adaptive_multi_steps(
        optax.chain(
            adapt_batch_size(norm_test(0.3), initial_batch_size=64, max_batch_size=1000),
            optax.sgd(0.0),
        ),
        micro_batch_size=16,
    )

    def step(state, key):
        gradient = 0.15 + jax.random.normal(key, (20,))
        _, new = optimizer.update(gradient, state, jnp.zeros(20), batch_size_multiple=16)
        return new, (get_batch_size(state), has_updated(new), metrics(new))

    keys = jax.random.split(jax.random.key(0), 400)
    _, (promised, updated, shown) = jax.jit(lambda state: jax.lax.scan(step, state, keys))(
        optimizer.init(jnp.zeros(20))
    )
    promised, used = promised[updated], shown["batch_size"][updated]
    assert (promised == used).all()
    assert (used.cumsum() == shown["num_examples"][updated]).all()
    assert used[-1] == used.max() == 992
    assert (shown["next_batch_size"][updated][:-1] == used[1:]).all()
