"""Losses of examples, and their means."""

import jax.numpy as jnp
import pytest

from adabatch_jax.training import masked_mean


def test_masked_mean():
    losses = jnp.array([[1.0, 3.0], [5.0, 7.0], [jnp.inf, jnp.nan]])
    assert masked_mean(losses, 2) == 4.0 and masked_mean(losses, 0) == 0.0
    many = jnp.ones(301, jnp.bfloat16)  # neither the sum nor the number is a bfloat16
    assert masked_mean(many, jnp.int32(301)) == 1.0
    with pytest.raises(ValueError, match="losses must have one loss an example, got a scalar"):
        masked_mean(jnp.float32(1), 1)
