"""Shared by the tests of `learning_rate`: the noise of a batch of given size."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

from adabatch_jax import GradientNoise
from adabatch_jax.learning_rate import _autowu
from tests.learning_rate.losses import as_they_are


@pytest.fixture(scope="session")
def noise_of_batch() -> Any:
    """Noise that was measured on so many examples."""
    return lambda num_examples: GradientNoise(
        jnp.ones(2), jnp.float32(1), jnp.int32(num_examples), jnp.int32(2)
    )


@pytest.fixture(autouse=True, scope="session")
def _smoother_for_tests() -> Any:
    """`smoother="as they are"`: for what is around the Gaussian process, which compiles long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_autowu.SMOOTHERS, "as they are", as_they_are)
        yield
