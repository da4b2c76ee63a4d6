"""Twelve examples in four groups of three, and an optimizer for either form."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch

GROUPS, ROWS = 4, 3
_rng = np.random.default_rng(0)
X = jnp.asarray(_rng.normal(size=(GROUPS * ROWS, 3)), jnp.float32)
Y = jnp.asarray(_rng.normal(size=(GROUPS * ROWS, 1)), jnp.float32)


@pytest.fixture(scope="session")
def data():
    """Inputs [4, 3, 3] and targets [4, 3, 1]: groups of three rows."""
    return adabatch.split_groups((X, Y), GROUPS)


@pytest.fixture(scope="session")
def chain():
    """Plain gradient descent at rate 1 behind a controller: the update is the gradient, turned round."""

    def chain(*links, initial=GROUPS * ROWS):
        controller = adabatch.adapt_batch_size(
            adabatch.norm_test(1.0), initial_batch_size=initial, max_batch_size=1 << 20
        )
        return optax.chain(controller, *links, optax.sgd(1.0))

    return chain


@pytest.fixture(scope="session")
def drop_in(chain):
    """The same, gathered from micro-batches of three rows."""

    def drop_in(*links, **options):
        return adabatch.adaptive_multi_steps(chain(*links, **options), micro_batch_size=ROWS)

    return drop_in
