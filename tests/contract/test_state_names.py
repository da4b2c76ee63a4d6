"""`optax.tree.get` finds what it finds in Optax's own states, also where ours stand around them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

import adabatch_jax as adabatch

NAMES = ("mu", "nu", "count", "trace", "sum_of_squares", "hyperparams", "learning_rate")
CONTROLLER = {"initial_batch_size": 16, "max_batch_size": 4096}


def found(state, name):
    """What has this name; Optax itself keeps a schedule beside its hyperparameter, by the same name."""
    pairs = optax.tree.get_all_with_path(state, name)
    return [x for path, x in pairs if "hyperparams_states" not in jax.tree_util.keystr(path)]


def test_no_name_occurs_twice(row):
    """Parameters have names of their own, in every tree that is like them; they are left out here."""
    state = row.make().init({"w": jnp.ones(2)})
    fields = [
        key.name
        for path, _ in jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: x is None)
        for key in path[-1:]
        if hasattr(key, "name")
    ]
    assert len(fields) == len(set(fields))
    for name in NAMES:
        assert len(found(state, name)) <= 1, name


def automatic():
    return adabatch.automatic(
        optax.scale_by_adam(),
        total_examples=10_000,
        autowu_options={"num_tests": 5, "max_losses": 16},
        **CONTROLLER,
    )


AROUND_ADAM = {
    "automatic": automatic,
    "return_to_minimum": lambda: adabatch.return_to_minimum(
        optax.chain(
            optax.scale_by_adam(), adabatch.scale_by_autowu(total_steps=50, steps_per_test=5)
        )
    ),
    "adaptive_multi_steps": lambda: adabatch.adaptive_multi_steps(
        optax.chain(
            adabatch.adapt_batch_size(adabatch.norm_test(0.5), **CONTROLLER), optax.scale_by_adam()
        ),
        micro_batch_size=8,
    ),
    "all of them": lambda: adabatch.adaptive_multi_steps(automatic(), micro_batch_size=8),
}


@pytest.mark.parametrize("name", AROUND_ADAM)
def test_the_moments_of_adam_are_found_and_set(name):
    params = {"w": jnp.ones(3)}
    state = AROUND_ADAM[name]().init(params)
    assert int(optax.tree.get(state, "count")) == 0
    for moment in ("mu", "nu"):
        assert optax.tree.get(state, moment)["w"].tolist() == [0.0, 0.0, 0.0]
    changed = optax.tree.set(state, mu={"w": jnp.full(3, 2.0)})
    assert optax.tree.get(changed, "mu")["w"].tolist() == [2.0, 2.0, 2.0]
    assert jax.tree.structure(changed) == jax.tree.structure(state)


def test_an_injected_rate_is_found_and_set():
    schedule = adabatch.scale_by_autowu(total_steps=50, steps_per_test=5)
    direction = optax.inject_hyperparams(optax.scale_by_adam)(b1=0.8)
    state = adabatch.return_to_minimum(optax.chain(direction, schedule)).init(jnp.ones(2))
    assert set(optax.tree.get(state, "hyperparams")) == {"b1", "b2", "eps", "eps_root"}
    assert float(optax.tree.get(optax.tree.set(state, b1=0.5), "b1")) == 0.5
