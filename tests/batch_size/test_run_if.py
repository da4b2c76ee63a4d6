"""A step that is made or not: what it leaves, in which types, and where the work is done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax.batch_size._run_if import run_if, unmoved

GRADIENT = {"w": jnp.arange(3.0), "b": jnp.ones((), jnp.bfloat16)}


def halved(turn, state):
    (gradient,) = unmoved((GRADIENT,), turn)
    return jax.tree.map(lambda g: g / 2, gradient), {"steps": state["steps"] + 1}


@pytest.mark.parametrize("wanted", [False, True])
def test_the_state_moves_only_where_the_step_is_wanted(wanted):
    run = jax.jit(lambda wanted, state: run_if(wanted, halved, GRADIENT, state))
    updates, state = run(jnp.array(wanted), {"steps": jnp.array(4)})
    assert int(state["steps"]) == 4 + wanted
    assert {k: u.dtype for k, u in updates.items()} == {k: g.dtype for k, g in GRADIENT.items()}
    if wanted:
        jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, g / 2), updates, GRADIENT)


def test_each_of_many_under_vmap_decides_for_itself():
    wanted = jnp.array([True, False, True])
    state = {"steps": jnp.array([1, 2, 3])}
    run = jax.vmap(lambda wanted, state: run_if(wanted, halved, GRADIENT, state)[1])
    assert run(wanted, state)["steps"].tolist() == [2, 2, 4]


@pytest.mark.parametrize("wanted", [False, True])
def test_updates_have_the_type_of_the_step_and_the_state_keeps_its_own(wanted):
    def act(turn, state):
        return (GRADIENT["b"].astype(jnp.float32), None), state + jnp.ones((), jnp.float32) / 2

    updates, state = run_if(jnp.array(wanted), act, GRADIENT, jnp.array(1, jnp.bfloat16))
    assert updates[0].dtype == jnp.float32
    assert updates[1] is None
    assert state.dtype == jnp.bfloat16
    assert float(state) == 1 + 0.5 * wanted


def test_what_is_no_array_and_keys_go_through_as_they_are():
    def act(turn, state):
        x, key, function, nothing, word = unmoved(
            (GRADIENT["w"], jax.random.key(3), jnp.sum, None, "word"), turn
        )
        assert (nothing, word) == (None, "word")
        return function(x), jax.random.key_data(key)

    updates, state = run_if(jnp.array(True), act, jnp.zeros(()), jnp.zeros(2, jnp.uint32))
    assert float(updates) == 3.0
    assert state.tolist() == [0, 3]


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("held", [False, True])
def test_nothing_is_computed_before_it_is_wanted(held):
    """The check can fail: without `unmoved` XLA takes the sines first, in every call."""

    def step(wanted, x, state):
        def act(turn, state):
            (seen,) = unmoved((x,), turn) if held else (x,)
            return seen, state + jnp.sin(seen)

        return run_if(wanted, act, x, state)[1]

    x = jnp.ones((64, 64))
    text = jax.jit(step, donate_argnums=2).lower(jnp.array(True), x, x).compile().as_text()
    blocks = {block.split(maxsplit=1)[0]: block for block in text.split("\n\n") if block}
    (entry,) = (block for name, block in blocks.items() if name == "ENTRY")
    sines = [name for name, block in blocks.items() if "sine(" in block and name != "ENTRY"]
    early = "sine(" in entry or any(f"calls={name}" in entry for name in sines)
    assert early == (not held)


def test_updates_of_another_type_are_sharded_as_the_step_leaves_them():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec("d", None)

    def act(turn, state):
        (seen,) = unmoved((x,), turn)
        return seen.astype(jnp.float32), state + 1

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((4, 2), jnp.bfloat16), jax.NamedSharding(mesh, spec))
        updates, _ = jax.jit(lambda x: run_if(jnp.array(True), act, x, jnp.array(0)))(x)
    assert updates.sharding.spec == spec
