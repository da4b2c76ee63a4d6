"""Eight devices, the run on one of them that all others must equal, and a table of how they compare."""

from __future__ import annotations

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

from tests.devices.eight.problem import Run, fused_step, train_fused  # noqa: E402

ROWS: list[tuple[str, Run, float]] = []


@pytest.fixture(scope="session")
def reference() -> Run:
    """One device, plain jit, one group after the other."""
    run = train_fused(jax.jit(fused_step()))
    ROWS.append(("one device, plain jit", run, 0.0))
    return run


@pytest.fixture
def table() -> list[tuple[str, Run, float]]:
    return ROWS


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section("batch sizes, and the largest relative difference of the parameters")
    for name, run, difference in ROWS:
        sizes = " ".join(str(size) for size in dict.fromkeys(run.sizes))
        terminalreporter.line(f"{name:44s} {difference:8.1e}  {sizes}")
