"""Losses of a run of 60 steps, shared by the tests of AutoWU, and a smoother that compiles at once."""

import jax.numpy as jnp
import numpy as np

from adabatch_jax.learning_rate import rbf_smoother
from adabatch_jax.learning_rate._posterior_test import Draws

T = 60
FALLING = np.linspace(3.0, 1.0, T)
BOWL = np.where(np.arange(T) < 14, 3.0 - 0.15 * np.arange(T), 0.9 + 0.1 * (np.arange(T) - 14))


def as_they_are():
    """A smoother that does not smooth, for tests of what is around it: a program compiles at once."""

    def test(state, x, y, count, *_):
        lowest = jnp.argmin(jnp.where(jnp.arange(y.size) < count, y, jnp.inf))
        past = (y[count - 1] > y[lowest]).astype(jnp.float32)
        return state, Draws(past[None], x[lowest][None], x[lowest][None])

    return rbf_smoother()._replace(test=test, looks_ahead=False)
