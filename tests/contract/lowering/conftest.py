"""Exports a program for TPU and CUDA, and reads in its text what an accelerator should not be given.

Our own products must be float32 at precision HIGHEST: the default is bfloat16 on a TPU and TF32 on
CUDA. So the losses here have no products of their own: every product of a program is ours.
"""

from __future__ import annotations

import contextlib
import re
import types

import jax
import numpy as np
import pytest

from tests.marks import slow

PLATFORMS = ("tpu", "cuda")
# Eigenvalues and Cholesky, where XLA has no operation of its own. None of them asks the host.
LIBRARY = {"Eigh", "cusolver_syevd_ffi", "cusolver_potrf_ffi"}
CALL = re.compile(r'custom_call(?: @|.*call_target_name = ")([\w.]+)')
HOST = re.compile(r"stablehlo\.(infeed|outfeed|send|recv)\b")
PRODUCT = re.compile(r"stablehlo\.(dot_general|dot|convolution)\b")
# With x64 on, Python's numbers are float64 on their way to float32. This is the way.
LITERAL = re.compile(r"stablehlo\.(constant|convert|select)\b|\bcall @|func\.func|\breturn\b")
MODES = {"float32": contextlib.nullcontext, "x64": lambda: jax.enable_x64(True)}


def text_of(function, *given, platforms=PLATFORMS) -> str:
    """The one program that holds what each platform needs, without the places in the source."""
    exported = jax.export.export(jax.jit(function), platforms=platforms)(*given)
    assert exported.platforms == tuple(platforms)
    return re.sub(r" loc\(.*", "", exported.mlir_module())


def products(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if PRODUCT.search(line)]


def is_exact(product: str) -> bool:
    """Whether both operands are float32, or both float64, at precision HIGHEST.

    A convolution never is: we have none.
    """
    operands = product.rsplit(" : ", 1)[1].split("->")[0]
    alike = 2 in (operands.count("f32>"), operands.count("f64>"))
    return alike and "precision = [HIGHEST, HIGHEST]" in product


def findings(
    text: str, *, x64: bool = False, scalars: bool = True, float64: bool = False
) -> list[str]:
    """What should not be there.

    `scalars=False`: with x64, one float64 number may be computed with. `float64=True`: as many as there
    are, but not with their bits, the one operation that XLA does not emulate on a TPU.
    """
    found = []
    for line in map(str.strip, text.splitlines()):
        if HOST.search(line):
            found.append(f"host: {line}")
        if "custom_call" in line and not set(CALL.findall(line)) & LIBRARY:
            found.append(f"call: {line}")
        if re.search(r"tensor<(\d+x)*\?", line):
            found.append(f"shape: {line}")
        if PRODUCT.search(line) and not is_exact(line):
            found.append(f"product: {line}")
        literal = x64 and "xf64>" not in line and (LITERAL.search(line) or not scalars)
        meant = float64 and "bitcast_convert" not in line
        if "f64>" in line and not (literal or meant):
            found.append(f"float64: {line}")
    return found


@pytest.fixture
def params():
    weights = np.float32([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    return {"b": np.float32([0.5, -1.0]), "w": weights}


@pytest.fixture(params=["float32", *slow("x64")])
def check(request):
    """`check(function, *given)`: exports it, finds nothing, returns its products; x64 off and on."""

    def run(function, *given, **options):
        with MODES[request.param]():
            text = text_of(function, *given)
        assert findings(text, x64=request.param == "x64", **options) == []
        return products(text)

    return run


@pytest.fixture
def reader():
    """The parts of `check`, for tests that look for something else."""
    parts = dict(text_of=text_of, products=products, is_exact=is_exact, findings=findings)
    return types.SimpleNamespace(**parts)
