"""Parameters and state sharded over the axis of the data: what each device holds, step after step."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import adabatch_jax as adabatch
from tests.devices.eight.problem import (
    FIRST,
    INNER,
    LANES,
    LOOPS,
    as_fsdp,
    drop_in,
    first_params,
    fsdp,
    fused_step,
    groups_of,
    mesh_of,
    micro_step,
    optimizer,
)

WIDE, CALLS = 1024, 4  # hidden units, calls of the step


def share_of(tree, device):
    """The bytes that one device holds, as a part of all."""
    leaves = jax.tree.leaves(tree)
    shards = (shard for leaf in leaves for shard in leaf.addressable_shards)
    held = sum(shard.data.nbytes for shard in shards if shard.device == device)
    return held / sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("way", ["fused", "drop-in"])
def test_each_device_keeps_an_eighth_and_nothing_is_compiled_twice(way, inner):
    mesh, options = mesh_of(LANES), dict(lanes=True, inner=inner)
    if way == "fused":
        link, step, loops = optimizer(inner), fused_step(mesh=mesh, **options), LOOPS
    else:
        link, step, loops = drop_in(inner=inner), micro_step(mesh=mesh, **options), 1

    first = first_params(WIDE)
    placement = fsdp(jax.eval_shape(lambda p: (p, link.init(p)), first), mesh)
    params = jax.device_put(first, placement[0])
    state = jax.jit(link.init, out_shardings=placement[1])(params)
    by_lanes = jax.NamedSharding(mesh, jax.P(None, "data"))
    groups = jax.device_put(tuple(x[:loops] for x in groups_of(0)), by_lanes)
    compiled = as_fsdp(step, mesh, params, state, groups)
    for _ in range(CALLS):
        params, state = jax.block_until_ready(compiled(params, state, groups))
        same = jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), (params, state), placement
        )
        assert all(jax.tree.leaves(same)), same
    assert compiled._cache_size() == 1
    assert int(adabatch.metrics(state)["num_examples"]) >= FIRST
    assert np.abs(params["w1"] - first["w1"]).max() > 0.01
    for device in mesh.devices.flat:
        assert 0.125 <= share_of(params, device) < 0.126  # the bias of the outputs is whole
        assert 0.125 <= share_of(state, device) < 0.135  # and so are the numbers of the controller


def test_a_leaf_is_split_along_its_longest_axis_that_the_devices_divide():
    mesh = mesh_of(LANES)
    shapes = {
        (16, 24): (None, "data"),
        (40, 24): ("data",),
        (16, 9): ("data",),
        (12, 30): (),
        (8,): (),
    }
    for shape, spec in shapes.items():
        found = fsdp(np.zeros(shape), mesh)
        assert found == jax.NamedSharding(mesh, jax.P(*spec)), shape
