"""A run whose batch grows 32-fold is the same on every number of devices, however they are used."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from tests.devices.eight.problem import (
    GROUP,
    LANES,
    fused_step,
    micro_step,
    on_devices,
    train_drop_in,
    train_fused,
)


def difference(run, reference):
    """The largest difference of any parameter tensor at any step, relative to the tensor's largest."""
    pairs = itertools.chain.from_iterable(
        zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        for a, b in zip(run.params, reference.params, strict=True)
    )
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def compare(name, run, reference, table):
    apart = difference(run, reference)
    table.append((name, run, apart))
    assert run.sizes == reference.sizes
    assert apart < 1e-5


def test_the_reference_grows_in_steps_that_do_not_hang_on_rounding(reference):
    assert reference.sizes[-1] >= 16 * 128
    assert len(set(reference.sizes) - {128}) >= 5
    tested = np.array([x for x in reference.required if np.isfinite(x)]) / (LANES * GROUP)
    assert np.abs(tested - np.round(tested)).min() > 0.01  # batch sizes are rounded up to these


FUSED = [
    *(("shard_map checked", n) for n in (1, 2, 4, 8)),
    *(("sharded jit", n) for n in (1, 2, 4, 8)),
    *(("pmap", n) for n in (2, 8)),
    ("shard_map unchecked", 8),
]


@pytest.mark.parametrize(("kind", "devices"), FUSED)
def test_fused(kind, devices, reference, table):
    lanes = kind == "sharded jit"
    step = on_devices(kind, fused_step(None if lanes else "data", lanes=lanes), devices)
    compare(f"fused, {kind}, {devices}", train_fused(step), reference, table)


DROP_IN = [
    ("pmap", 8),
    ("shard_map checked", 8),
    ("shard_map checked", 2),
    ("shard_map unchecked", 8),
]


@pytest.mark.parametrize(("kind", "devices"), DROP_IN)
def test_adaptive_multi_steps(kind, devices, reference, table):
    step = on_devices(kind, micro_step("data", cast=kind == "shard_map checked"), devices)
    compare(f"drop-in, {kind}, {devices}", train_drop_in(step, devices), reference, table)


def test_adaptive_multi_steps_on_one_device(reference, table):
    run = train_drop_in(jax.jit(micro_step()), devices=1)
    compare("drop-in, one device, plain jit", run, reference, table)
