"""Every state of ours offers what `_protocols.py` says, under the names that others look for."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import pytest

from adabatch_jax import _protocols
from tests.contract.conftest import TABLE

PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}


def is_state(node):
    """A state, or the class of one."""
    kind = node if isinstance(node, type) else type(node)
    return hasattr(kind, "_fields") and kind.__name__.endswith("State")


def states(node):
    """Every optimizer state in `node`, Optax's and ours, outermost first."""
    if is_state(node):
        yield node
    for part in node.values() if isinstance(node, dict) else node if type(node) is tuple else ():
        yield from states(part)
    for name in getattr(node, "_fields", ()):
        yield from states(getattr(node, name))


def of_ours(row):
    found = states(row.make().init(PARAMS))
    return [state for state in found if type(state).__module__.startswith("adabatch_jax")]


def is_number(tree):
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] == [()]


def test_every_class_of_states_is_looked_at():
    modules = [m for name, m in sys.modules.items() if name.startswith("adabatch_jax.")]
    ours = {
        c
        for m in modules
        if ".training" not in m.__name__
        for c in vars(m).values()
        if isinstance(c, type)
        if is_state(c) and c.__module__ == m.__name__
    }
    assert {type(state) for row in TABLE for state in of_ours(row)} == ours


def test_what_reports_begins_with_a_number(row):
    for state in filter(_protocols.reports_metrics, of_ours(row)):
        assert is_number(state[0]), type(state)
        report = state.report_metrics()
        assert all(isinstance(name, str) for name in report)
        assert all(jnp.ndim(value) == 0 for value in report.values())


def test_states_inside_a_state_are_called_inner(row):
    for state in of_ours(row):
        inside = {name for name in state._fields if any(states(getattr(state, name)))}
        assert inside == set(_protocols.inner_fields(state)), type(state)


def test_what_gathers_or_goes_back_says_so_by_a_number(row):
    for state in of_ours(row):
        if _protocols.emits_steps(state):
            assert state.emitted.shape == () and state.emitted.dtype == bool
            assert state.skipped_call.shape == () and state.skipped_call.dtype == bool
        if _protocols.goes_back(state):
            assert state.returns_made.shape == () and state.returns_made.dtype == jnp.int32


@pytest.mark.parametrize("used_up", [True, False])
def test_a_dropped_step_leaves_a_state_of_the_same_kind(row, used_up):
    for state in filter(_protocols.remembers_dropped_steps, of_ours(row)):
        after = state.after_dropped_step(state, used_up)
        assert type(after) is type(state)
        assert jax.eval_shape(lambda x: x, after) == jax.eval_shape(lambda x: x, state)


def test_numbers_that_steps_must_not_take_back_are_reported(row):
    """Without `report_metrics` a state with floats counts as moments: only a direction's may do so."""
    directions = {"ScaleByAdampState", "ScaleByAdagradNormState"}
    for state in of_ours(row):
        inexact = any(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(state))
        known = _protocols.reports_metrics(state) or _protocols.inner_fields(state)
        if inexact and not known:
            assert type(state).__name__ in directions
