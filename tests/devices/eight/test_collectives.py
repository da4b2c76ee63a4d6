"""What devices tell each other: what a data-parallel step tells anyway, and one scalar more."""

from __future__ import annotations

import math
import re
from collections import Counter

import jax
import optax
import pytest

import adabatch_jax as adabatch
from tests.devices.eight.problem import (
    as_fsdp,
    drop_in,
    first_params,
    flat,
    fused_step,
    groups_of,
    loss_fn,
    mesh_of,
    micro_step,
    optimizer,
    whole,
)

pytestmark = pytest.mark.usefixtures("optimized")
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|"
    r"collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
WIDE = 1024  # hidden units: of small models XLA gathers the parameters by itself


def array(operation, shape, dtype="f32"):
    """XLA transposes and drops axes of length one as it likes."""
    return operation, dtype, tuple(sorted(n for n in shape if n > 1))


def arrays(operation, *shapes):
    return Counter(array(operation, shape) for shape in shapes)


def shapes_of(hidden=16):
    return [x.shape for x in first_params(hidden).values()]


PARAMETERS = arrays("all-reduce", *shapes_of())
LOSS_AND_COUNTS, SCALAR = arrays("all-reduce", (4,)), arrays("all-reduce", ())


def program(step, *arguments):
    return jax.jit(step).lower(*arguments).compile().as_text()


def collectives_in(text):
    """The arrays that the program's collectives give; combined ones count one by one."""
    found = Counter()
    for shapes, operation in COLLECTIVE.findall(text):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            found[array(operation, map(int, re.findall(r"\d+", shape)), dtype)] += 1
    return found


def collectives(step, *arguments):
    return collectives_in(program(step, *arguments))


def numbers(found):
    """How many numbers the arrays hold in all."""
    return sum(times * math.prod(shape) for (*_, shape), times in found.items())


def first_loop():
    """What one call of the drop-in gets."""
    return jax.tree.map(lambda x: x[:1], groups_of(0))


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


def plain_step(mesh=None):
    """What data-parallel training does anyway: one gradient of the whole batch."""
    link = optax.sgd(0.15, momentum=0.5)

    def step(params, state, groups):
        batch = jax.tree.map(lambda x: x[0].reshape((-1, x.shape[-1])), groups)
        value, gradient = jax.value_and_grad(loss_fn)(whole(params, mesh), batch)
        updates, state = link.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step, link


@pytest.mark.parametrize("way", ["fused", "drop-in"])
def test_with_lanes_no_example_and_no_lane_leaves_its_device(way):
    """Under sharded jit nobody says what to exchange. XLA finds the same, once and outside the loop."""
    params, groups = placed(first_params()), placed(groups_of(0), None, "data")
    step, link = plain_step()
    plain = collectives(step, params, placed(link.init(params)), groups)
    if way == "fused":
        state, step = optimizer().init(params), fused_step(lanes=True)
    else:
        state, step = drop_in().init(params), micro_step(lanes=True)
        groups = placed(first_loop(), None, "data")
    found = collectives(step, params, placed(state), groups)
    assert plain == PARAMETERS + SCALAR
    assert found == PARAMETERS + LOSS_AND_COUNTS + SCALAR
    more = found.total() - plain.total()
    assert more == 1 and numbers(found) - numbers(plain) <= len(params)


def test_without_lanes_the_whole_batch_would_be_gathered():
    """The control of the test above: groups sharded along the axis that the loop runs over."""
    params, groups = placed(first_params()), placed(flat(groups_of(0)), "data")
    found = collectives(adabatch.value_and_grad_noise(loss_fn), params, groups)
    assert array("all-gather", (512, 8, 5)) in found


def fsdp_program(step, link, groups=None):
    mesh, params = mesh_of(8), first_params(WIDE)
    arguments = params, link.init(params), groups or groups_of(0)
    return program(as_fsdp(step, mesh, *arguments), *arguments)


def inside_loops(text):
    """The text of the bodies of all loops."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert bodies
    computations = re.split(r"\n(?=%?[\w.\-]+ \(|ENTRY )", text)
    found = [c for c in computations if re.match(r"%?([\w.\-]+)", c).group(1) in bodies]
    assert len(found) == len(bodies)
    return "\n".join(found)


def test_with_fsdp_the_mean_gradient_is_gathered_once():
    """S − N·q would not gather it, but is the difference of two large sums.

    A plain FSDP step gathers the parameters; ours gathers them once, whatever the number of loops,
    and then the mean gradient, to which every device compares that of its lanes. XLA for GPU and TPU
    may make of the gradient's all-reduce a reduce-scatter, so that with the gather it is one all-reduce.
    """
    split = [shape for shape in shapes_of(WIDE) if WIDE in shape]
    gathered, gradient = arrays("all-gather", *split), arrays("all-reduce", *shapes_of(WIDE))
    step, link = plain_step(mesh_of(8))
    assert collectives_in(fsdp_program(step, link)) == gathered + gradient + SCALAR

    text = fsdp_program(fused_step(lanes=True, mesh=mesh_of(8)), optimizer())
    found = collectives_in(text)
    scalars = Counter({key: n for key, n in found.items() if key in SCALAR})
    assert found - scalars == gathered + gathered + gradient + LOSS_AND_COUNTS
    # The scatter, and ‖ḡ‖² of the shards in the test: twice, since XLA does not see that it is the same.
    assert scalars.total() <= 1 + 2 * len(split)
    assert not collectives_in(inside_loops(text))

    # The wrapper adds the distance of two sharded means, and so scalars only.
    step = micro_step(lanes=True, mesh=mesh_of(8))
    wrapped = collectives_in(fsdp_program(step, drop_in(), first_loop()))
    assert +Counter({key: n for key, n in wrapped.items() if key not in SCALAR}) == found - scalars


def test_with_fsdp_and_without_the_gather_lanes_are_exchanged_in_the_loop():
    """The control of the test above: XLA then splits the model, and every device needs all examples."""
    found = collectives_in(inside_loops(fsdp_program(fused_step(lanes=True), optimizer())))
    assert array("all-gather", (8, 8, 5)) in found
