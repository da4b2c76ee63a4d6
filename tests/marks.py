"""Values of a parametrized test that only the slow tests take.

Each compiles a program of its own, and shows of another value what the quick ones show already.
"""

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """The values, each with the marker: `[quick, *slow(others)]`. A tuple has one for each name."""
    given = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=pytest.mark.slow) for value in given]
