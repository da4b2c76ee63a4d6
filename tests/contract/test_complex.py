"""Complex parameters: steps as of real ones, turned as their gradient is, or a refusal by name."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

W = jnp.array([1.0, -2.0, 0.5])


def test_complex_parameters_are_exact_or_refused(row):
    """Gradients that point along i give i times the steps of real ones, and count as much in every norm.

    One program holds both; what all leaves share is compared with a run of two real leaves, but not where
    a Gaussian process, which sees the loss alone, makes that a second long compilation.
    """
    link, params = row.make(**row.cheaper), {"real": W, "turned": 1j * W}
    try:
        link.init(params)
        refusal = None
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert "complex" in refusal
        return
    updates, state = follow(row, link, params)
    chex.assert_trees_all_close(updates["turned"], 1j * updates["real"], rtol=1e-5)
    if row.by_hand > 1:
        expected, alone = follow(row, link, {"real": W, "turned": W})
        chex.assert_trees_all_close(updates["real"], expected["real"], rtol=1e-5)
        chex.assert_trees_all_close(numbers(state), numbers(alone), rtol=1e-5)


def follow(row, link, params):
    """All updates and the last state, with multiples of the parameters as gradients."""

    def step(state, index):
        gradient = jax.tree.map(lambda w: (index + 1) * w, params)
        updates, state = link.update(gradient, state, params, **row.extra_args(gradient, index))
        return state, updates

    state, updates = jax.jit(lambda: jax.lax.scan(step, link.init(params), jnp.arange(4)))()
    return updates, state


def numbers(state):
    """What is one number for all leaves."""
    return [x for x in jax.tree.leaves(state) if x.ndim == 0]
