"""One small problem for all: the digits, in micro-batches of eight, by a loop that nobody changed."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import adabatch_jax as adabatch

MICRO, FIRST, LARGEST = 8, 16, 128


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """These tests spend their time in the compiler, and their arithmetic is small."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def digits():
    """1,024 of the digits: images [1024, 64] and labels [1024]."""
    images, labels = load_digits(return_X_y=True)
    drawn = np.random.default_rng(0).permutation(len(labels))[:1024]
    return np.float32((images[drawn] - 4.9) / 6.0), np.int32(labels[drawn])


@pytest.fixture(scope="session")
def first_params():
    """64 → 16 → 10."""
    rng = np.random.default_rng(1)
    first = {
        "hidden": {"w": rng.normal(size=(64, 16)) / 8.0, "b": np.zeros(16)},
        "out": {"w": rng.normal(size=(16, 10)) / 4.0, "b": np.zeros(10)},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), first)


def cross_entropy(logits, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.fixture(scope="session")
def loss_fn():
    """The mean loss of `first_params`'s network on some examples."""

    def loss_fn(params, x, y):
        hidden = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
        return cross_entropy(hidden @ params["out"]["w"] + params["out"]["b"][None], y)

    return loss_fn


@pytest.fixture(scope="session")
def controller():
    def controller(**options):
        sizes = dict(initial_batch_size=FIRST, max_batch_size=LARGEST, multiple_of=MICRO)
        options = dict(growth_limit=1.5) | sizes | options
        return adabatch.adapt_batch_size(adabatch.norm_test(0.8), **options)

    return controller


@pytest.fixture(scope="session")
def around():
    """The wrapper of the README's first example."""
    return lambda inner: adabatch.adaptive_multi_steps(inner, micro_batch_size=MICRO)


class Proof(NamedTuple):
    """What a run leaves: its last carry, and of every micro-batch the loss, the batch size before
    it, and whether it ended a batch."""

    carry: Any
    losses: np.ndarray
    sizes: np.ndarray
    moved: np.ndarray


@pytest.fixture(scope="session")
def prove(digits):
    """One epoch of somebody's step: what every combination has to show.

    `step(carry, x, y)` gives the next carry and the loss, `state(carry)` the optimizer's state, and
    `after(number, carry)` may replace a carry.
    """

    def prove(step, carry, state, *, jit=jax.jit, data=None, after=lambda *_: None):
        traces, seen, images, labels = [], [], *(data or digits)

        def counted(carry, x, y):
            traces.append(1)
            size = adabatch.get_batch_size(state(carry))
            carry, value = step(carry, x, y)
            return carry, (value, size, adabatch.has_updated(state(carry)))

        compiled = jit(counted)
        for number, start in enumerate(range(0, len(labels), MICRO)):
            rows = slice(start, start + MICRO)
            carry, numbers = compiled(carry, images[rows], labels[rows])
            seen.append(numbers)
            replaced = after(number, carry)
            carry = carry if replaced is None else replaced
        assert len(traces) == 1, "the step was compiled more than once"
        losses, sizes, moved = map(np.array, zip(*jax.device_get(seen), strict=True))
        assert sizes[0] == FIRST and (np.diff(sizes) >= 0).all() and len(set(sizes)) >= 4, sizes
        assert losses[-20:].mean() < 0.7 * losses[:20].mean(), losses
        return Proof(carry, losses, sizes, moved)

    return prove
