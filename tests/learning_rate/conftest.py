"""Shared by the tests of `learning_rate`: the noise of a batch of given size."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

from adabatch_jax import GradientNoise


@pytest.fixture(scope="session")
def noise_of_batch() -> Any:
    """Noise that was measured on so many examples."""
    return lambda num_examples: GradientNoise(
        jnp.ones(2), jnp.float32(1), jnp.int32(num_examples), jnp.int32(2)
    )
