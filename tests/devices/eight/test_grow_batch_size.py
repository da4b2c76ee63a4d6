"""The one line with parameters and state sharded over eight devices: as on one device, and no worse."""

from __future__ import annotations

import jax
import numpy as np
import optax

import adabatch_jax as adabatch
from tests.devices.eight.problem import (
    GROUP,
    LANES,
    LOOPS,
    as_fsdp,
    first_params,
    fsdp,
    groups_of,
    loss_fn,
    mesh_of,
    whole,
)

CALL, WIDE = 2 * LANES, 64  # examples of a call, hidden units
BASE, EXAMPLES = 2 * CALL, 2 * LOOPS * LANES * GROUP
SCHEDULE = optax.warmup_cosine_decay_schedule(0.001, 0.02, 12, EXAMPLES // BASE, 0.0002)
GROWN = dict(base_batch_size=BASE, max_batch_size=16 * BASE, micro_batch_size=CALL)


def calls_of(size):
    """All examples, a row a call: x [calls, size, 5] and y, whose second axis is spread."""
    parts = zip(groups_of(0), groups_of(1), strict=True)
    return tuple(np.concatenate(part).reshape(EXAMPLES // size, size, -1) for part in parts)


def training(link, mesh):
    """The loop that nobody changed, over all calls."""

    def train(params, state, calls):
        def step(carry, call):
            params, state = carry
            value, gradient = jax.value_and_grad(loss_fn)(whole(params, mesh), call)
            updates, state = link.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, state), calls)[0]

    return train


def trained(link, size, mesh=None):
    params, calls = first_params(WIDE), calls_of(size)
    if mesh is None:
        return jax.jit(training(link, None))(params, link.init(params), calls)
    placement = fsdp(jax.eval_shape(lambda p: (p, link.init(p)), params), mesh)
    params = jax.device_put(params, placement[0])
    state = jax.jit(link.init, out_shardings=placement[1])(params)
    calls = jax.device_put(calls, jax.NamedSharding(mesh, jax.P(None, "data")))
    train = as_fsdp(training(link, mesh), mesh, params, state, calls)
    return jax.block_until_ready(train(params, state, calls))


def test_grown_under_fsdp():
    grown = adabatch.grow_batch_size(optax.adamw, learning_rate=SCHEDULE, **GROWN)
    mesh = mesh_of(LANES)
    before, _ = trained(optax.adamw(SCHEDULE), BASE, mesh)
    params, state = trained(grown, CALL, mesh)

    same = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim),
        (params, state),
        fsdp((params, state), mesh),
    )
    assert all(jax.tree.leaves(same)), "parameters and moments stay where they were"
    alone, state_alone = trained(grown, CALL)
    assert int(state.gradient_step) == int(state_alone.gradient_step)
    for name, expected in alone.items():
        np.testing.assert_allclose(params[name], expected, rtol=1e-3, atol=1e-4)

    held_out = [x.reshape(-1, x.shape[-1]) for x in groups_of(2)]
    loss_before, loss = (float(loss_fn(jax.device_get(p), held_out)) for p in (before, params))
    steps = int(state.gradient_step)
    print(f"before {loss_before:.4f}, after {loss:.4f}, {steps} of {EXAMPLES // BASE} steps")
    assert loss < loss_before + 0.02
    assert steps < 0.8 * EXAMPLES / BASE
