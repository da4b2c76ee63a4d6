"""The experiments and benchmarks at least start: what they need is there, and says what it is."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = [
    path
    for folder in ("experiments", "benchmarks")
    for path in sorted((HERE / folder).glob("*.py"))
    if "argparse" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_shows_its_help(script):
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script.name}")


def test_there_are_scripts():
    assert len(SCRIPTS) >= 7
