"""What devices tell each other: what a data-parallel step tells anyway, and one scalar more."""

from __future__ import annotations

import re
from collections import Counter

import jax
import pytest

import adabatch_jax as adabatch
from tests.devices.eight.problem import (
    first_params,
    flat,
    fused_step,
    groups_of,
    loss_fn,
    mesh_of,
    optimizer,
)

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|"
    r"collective-broadcast|ragged-all-to-all)(?:-start)?\("
)


def reduced(*shapes):
    return Counter(("all-reduce", ",".join(map(str, shape))) for shape in shapes)


PARAMETERS = reduced((5, 12), (1, 12), (12, 2), (1, 2))
LOSS_AND_COUNTS, SCALAR = reduced((4,)), reduced(())


def collectives(step, *arguments):
    """The arrays that collectives of the compiled program give; combined ones count one by one."""
    text = jax.jit(step).lower(*arguments).compile().as_text()
    found = Counter()
    for shapes, operation in COLLECTIVE.findall(text):
        found.update((operation, shape) for shape in re.findall(r"\w+\[([\d,]*)\]", shapes))
    return found


def placed(tree, *spec):
    return jax.device_put(tree, jax.NamedSharding(mesh_of(8), jax.P(*spec)))


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_shard_map_adds_the_reduction_of_one_scalar(checked):
    arguments = placed(first_params()), placed(groups_of(0), None, "data")

    def found_in(step):
        specs = (jax.P(), jax.P(None, "data"))
        step = jax.shard_map(
            step, mesh=mesh_of(8), in_specs=specs, out_specs=jax.P(), check_vma=checked
        )
        return collectives(step, *arguments)

    def plain(params, groups):
        own = jax.lax.pcast(params, "data", to="varying") if checked else params
        batch = jax.tree.map(lambda x: x.reshape((-1, x.shape[-1])), groups)
        return jax.lax.pmean(jax.value_and_grad(loss_fn)(own, batch), "data")

    def measured(params, groups):
        return adabatch.value_and_grad_noise(loss_fn, axis_name="data")(params, flat(groups))

    # The counts of groups and examples travel in one small vector with the loss.
    assert found_in(plain) == PARAMETERS + SCALAR
    assert found_in(measured) == PARAMETERS + LOSS_AND_COUNTS + SCALAR


def test_with_lanes_no_example_and_no_lane_leaves_its_device():
    """Under sharded jit nobody says what to exchange. XLA finds the same, once and outside the loop."""
    params = placed(first_params())
    state, groups = placed(optimizer().init(params)), placed(groups_of(0), None, "data")
    found = collectives(fused_step(lanes=True), params, state, groups)
    assert found == PARAMETERS + LOSS_AND_COUNTS + SCALAR


def test_without_lanes_the_whole_batch_would_be_gathered():
    """The control of the test above: groups sharded along the axis that the loop runs over."""
    params, groups = placed(first_params()), placed(flat(groups_of(0)), "data")
    found = collectives(adabatch.value_and_grad_noise(loss_fn), params, groups)
    assert ("all-gather", "512,8,5") in found
