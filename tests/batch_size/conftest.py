"""Shared by the tests of `batch_size`: noise with given statistics, and a controller to feed it to."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import (
    BatchSizeStatus,
    GradientNoise,
    adapt_batch_size,
    adaptive_multi_steps,
    get_batch_size,
    has_updated,
    metrics,
)


def _noise(
    trace: float = 1.0,
    square: float = 1.0,
    *,
    num_examples: int = 64,
    num_groups: int = 8,
    along: float | None = None,
) -> GradientNoise:
    """Noise of a two-dimensional gradient with this tr Σ, this ‖ḡ‖² and this Var⟨g_i, ḡ⟩."""
    degrees = max(num_groups - 1, 1)
    return GradientNoise(
        mean=jnp.array([np.sqrt(square), 0.0], jnp.float32),
        scatter=jnp.float32(trace * degrees),
        num_examples=jnp.int32(num_examples),
        num_groups=jnp.int32(num_groups),
        inner_product_scatter=None if along is None else jnp.float32(along * degrees),
    )


FEW = 3


class Controller:
    """`adapt_batch_size` together with its state.

    The first updates run operation by operation: a program for each operation serves all tests, while
    that of an update serves one test. A long run is compiled.
    """

    def __init__(self, criterion: Any, params: Any = None, **options: Any) -> None:
        options = {"initial_batch_size": 64, "max_batch_size": 8192} | options
        self.link = adapt_batch_size(criterion, **options)
        self.state = self.link.init(jnp.zeros(2) if params is None else params)
        self._update, self._fed = jax.jit(self.link.update), 0

    def feed(self, noise: GradientNoise, **extra: Any) -> int:
        """One update; the batch size after it."""
        self._fed += 1
        with jax.disable_jit(self._fed <= FEW):
            _, self.state = self._update(noise.mean, self.state, noise=noise, **extra)
        return self.batch_size

    @property
    def batch_size(self) -> int:
        return int(get_batch_size(self.state))

    @property
    def status(self) -> BatchSizeStatus:
        return BatchSizeStatus(int(self.metrics["test_status"]))

    @property
    def metrics(self) -> dict[str, Any]:
        return metrics(self.state)


@cache
def _wrapped(optimizer: Any, **options: Any) -> Any:
    wrapped = adaptive_multi_steps(optimizer, **options)
    return wrapped.init, jax.jit(wrapped.update)


class DropIn:
    """`adaptive_multi_steps` with its state; the update of an optimizer is compiled once."""

    def __init__(self, optimizer: Any, params: Any, **options: Any) -> None:
        init, self._update = _wrapped(optimizer, **{"micro_batch_size": 8} | options)
        self.params, self.state = params, init(params)

    def feed(self, gradient: Any, **extra: Any) -> Any:
        """One micro-batch; its updates."""
        updates, self.state = self._update(gradient, self.state, self.params, **extra)
        return updates

    def feed_all(self, gradients: Any, **extra: Any) -> list[bool]:
        """Several micro-batches, with a leading axis: for each, whether it completed a batch."""
        return [self.feed(g, **extra) is not None and self.emitted for g in gradients]

    @property
    def emitted(self) -> bool:
        return bool(has_updated(self.state))

    @property
    def metrics(self) -> dict[str, Any]:
        return metrics(self.state)


@pytest.fixture(scope="session")
def drop_in() -> Any:
    """A drop-in optimizer with its state."""
    return DropIn


@pytest.fixture(scope="session")
def make_noise() -> Any:
    """Noise with given statistics."""
    return _noise


@pytest.fixture(scope="session")
def controller() -> Any:
    """A controller from 64 to 8192, unless told otherwise."""
    return Controller
