"""Parameters in bfloat16 and float16 are trained as those in float32 are, however long the run."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

STEPS = 4000
KINDS = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
UNIT = 2.0**-24  # of float16 near zero; a link after another may multiply what it rounds away


def params_of(kinds):
    """The same numbers in each; the square of the second is no float16."""
    return {name: jnp.asarray([1.0, 2.0**-13], dtype) for name, dtype in kinds.items()}


def follow(row, params):
    """The last state, and all updates, with the parameters themselves as gradient."""
    link = row.make(**row.cheaper)

    def step(state, index):
        updates, state = link.update(params, state, params, **row.extra_args(params, index))
        return state, jax.tree.map(lambda u: u.astype(jnp.float32), updates)

    return jax.jit(lambda: jax.lax.scan(step, link.init(params), jnp.arange(STEPS)))()


def numbers(state):
    """What is one number for all leaves."""
    return [x for x in jax.tree.leaves(state) if x.ndim == 0]


def test_narrow_floats_follow_float32(row):
    """4,000 times the same gradient, in three dtypes, leads to the same steps and to the same numbers.

    So many, because a sum of ones stays at 256 in bfloat16 and at 2,048 in float16: AdaGrad's last step
    would be 4 times too long, and after some hundred steps all would still be well. One program has the
    three dtypes as leaves of one tree, since compiling is what these tests spend their time on. Numbers
    that all leaves share are compared with those of leaves in float32 alone. Two kinds of rows are spared
    this second program: where a Gaussian process is fitted, for it compiles longest and sees the loss
    alone, and where a curvature is measured, for that is as exact as the model's own dtype.
    """
    state, updates = follow(row, params_of(KINDS))
    expected = updates.pop("float32")
    if row.narrow is not None:
        allowed = row.narrow * jnp.max(jnp.abs(expected), axis=0, keepdims=True) + 512 * UNIT
        for name, found in updates.items():
            assert jnp.all(jnp.abs(found - expected) <= allowed), name
    if row.by_hand > 1 and not row.measures:
        alone, others = follow(row, params_of(dict.fromkeys(KINDS, jnp.float32)))
        chex.assert_trees_all_close(expected, others["float32"], rtol=1e-4)
        chex.assert_trees_all_close(numbers(state), numbers(alone), rtol=1e-4)
