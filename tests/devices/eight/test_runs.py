"""A run whose batch grows at least 16-fold is the same on 1, 2, 4, 8 devices, however they are used."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from tests.devices.eight.conftest import Row
from tests.devices.eight.problem import (
    FIRST,
    GROUP,
    INNER,
    LANES,
    fused_step,
    mesh_of,
    micro_step,
    on_devices,
    train_drop_in,
    train_fused,
)

KINDS = ["pmap", "shard_map checked", "shard_map unchecked", "sharded jit", "FSDP"]
DEVICES = [1, 2, 4, 8]


def difference(run, reference):
    """The largest difference of any parameter tensor at any step, relative to the tensor's largest."""
    pairs = itertools.chain.from_iterable(
        zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        for a, b in zip(run.params, reference.params, strict=True)
    )
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def compare(mode, devices, run, references, table, inner="sgd", tolerance=1e-5):
    reference = references[inner]
    apart = difference(run, reference)
    table.append(Row(inner, mode, devices, apart, run.sizes == reference.sizes))
    assert run.sizes == reference.sizes
    assert apart < tolerance


def options(kind, devices):
    """How a step is told where it runs."""
    if kind in ("sharded jit", "FSDP"):
        return dict(lanes=True, mesh=mesh_of(devices) if kind == "FSDP" else None)
    return dict(axis_name="data")


@pytest.mark.parametrize("inner", INNER)
def test_the_reference_grows_in_steps_that_do_not_hang_on_rounding(inner, references):
    reference = references[inner]
    assert reference.sizes[-1] >= 16 * FIRST
    assert np.count_nonzero(np.diff([FIRST, *reference.sizes])) >= 5
    tested = np.array([x for x in reference.required if x > 0]) / (LANES * GROUP)
    assert np.abs(tested - np.round(tested)).min() > 0.01  # batch sizes are rounded up to these


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_step(kind, devices, references, table):
    step = on_devices(kind, fused_step(**options(kind, devices)), devices)
    compare(f"fused, {kind}", devices, train_fused(step), references, table)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_adaptive_multi_steps(kind, devices, references, table):
    cast = dict(cast=True) if kind == "shard_map checked" else {}
    step = on_devices(kind, micro_step(**options(kind, devices), **cast), devices)
    compare(f"drop-in, {kind}", devices, train_drop_in(step, devices), references, table)


def test_adaptive_multi_steps_without_any_axis(references, table):
    run = train_drop_in(jax.jit(micro_step()), devices=1)
    compare("drop-in, plain jit", 1, run, references, table)


@pytest.mark.parametrize("inner", [name for name in INNER if name != "sgd"])
@pytest.mark.parametrize("kind", ["shard_map checked", "sharded jit", "FSDP"])
def test_with_an_inner_state_of_one_number_per_parameter(kind, inner, references, table):
    """Adam and AdaGrad divide by small numbers, which magnifies rounding."""
    step = on_devices(kind, fused_step(**options(kind, 8), inner=inner))
    run = train_fused(step, inner)
    compare(f"fused, {kind}", 8, run, references, table, inner, tolerance=1e-4)
