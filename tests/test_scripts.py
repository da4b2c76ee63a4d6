"""The experiments and benchmarks at least start: what they need is there, and says what it is."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = [
    path
    for folder in ("experiments", "benchmarks")
    for path in sorted((HERE / folder).glob("*.py"))
    if "argparse" in path.read_text(encoding="utf-8")
]
# One process for all of them: each would import JAX anew. Their own modules they do not share.
ALL = """
import contextlib, io, json, pathlib, runpy, sys, traceback
paths, found, before = sys.argv[1:], {}, sys.path[:]
for path in map(pathlib.Path, paths):
    sys.argv, sys.path = [str(path), "--help"], [str(path.parent), *before]
    known, printed, error = set(sys.modules), io.StringIO(), "it did not end"
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            error = "" if not end.code else f"it ended with {end.code}"
        except BaseException:
            error = traceback.format_exc()
    found[str(path)] = printed.getvalue(), error
    for name in set(sys.modules) - known:
        if str(path.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
print(json.dumps(found))
"""


def test_every_script_shows_its_help(subtests):
    paths = [str(path) for path in SCRIPTS]
    done = subprocess.run(
        [sys.executable, "-c", ALL, *paths], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for path in SCRIPTS:
        with subtests.test(path.name):
            printed, error = found[str(path)]
            assert not error, error
            assert printed.startswith(f"usage: {path.name}")


def test_there_are_scripts():
    assert len(SCRIPTS) >= 7
