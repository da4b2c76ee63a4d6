"""Eight devices, the run on one of them that all others must equal, and a table of how they compare."""

from __future__ import annotations

from typing import NamedTuple

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

from tests.devices.eight.problem import INNER, Run, fused_step, train_fused  # noqa: E402


class Row(NamedTuple):
    """How one run compares with that of one device under plain jit."""

    inner: str
    mode: str
    devices: int
    apart: float  # largest relative difference of the parameters
    same_sizes: bool


REFERENCES: dict[str, Run] = {}
ROWS: list[Row] = []


@pytest.fixture(scope="session")
def references() -> dict[str, Run]:
    """One device, plain jit, one group after the other, for every inner optimizer."""
    for inner in INNER:
        REFERENCES[inner] = train_fused(jax.jit(fused_step(inner=inner)), inner)
    return REFERENCES


@pytest.fixture
def table() -> list[Row]:
    return ROWS


def pytest_terminal_summary(terminalreporter):
    write = terminalreporter.line
    for inner in dict.fromkeys(row.inner for row in ROWS):
        terminalreporter.section(f"{inner}: largest relative difference of the parameters")
        rows = [row for row in ROWS if row.inner == inner]
        counts = sorted({row.devices for row in rows})
        write(f"{'devices':32s}" + "".join(f"{n:>12d}" for n in counts) + "  batch sizes")
        for mode in dict.fromkeys(row.mode for row in rows):
            found = {row.devices: row for row in rows if row.mode == mode}
            cells = "".join(f"{found[n].apart:12.1e}" if n in found else " " * 12 for n in counts)
            same = all(row.same_sizes for row in found.values())
            write(f"{mode:32s}{cells}  {'equal' if same else 'DIFFERENT'}")
        write("batch sizes on one device: " + " ".join(map(str, REFERENCES[inner].sizes)))
