"""All benchmarks, one after the other, each in a process of its own.

    pip install ".[test,peers]"
    tests/benchmarks/peers.sh .venv-peers     # the peers that need an environment of their own
    python -m tests.benchmarks --peers-python .venv-peers/bin/python

Tables are printed; the numbers are kept in runs/benchmarks/*.json, and what is there is not repeated by
the longer ones. A little more than an hour on two cores that have nothing else to do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (  # what each compares is in its docstring
    "accumulation.py",
    "noise_estimators.py",
    "noise_peers.py",
    "curvature_peers.py",
    "autowu_decision.py",
    "ladder.py",
    "host_overhead.py",
    "device_scaling.py",
    "adoption_cost.py",
    "checkpoint_overhead.py",
)
PEERS = {"noise_peers.py": "--peers-python", "curvature_peers.py": "--pyhessian-python"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers-python", help="of the environment that peers.sh makes")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    options = parser.parse_args()
    failed = []
    for script in options.only:
        print(f"\n## {script}\n", flush=True)
        command = [sys.executable, str(HERE / script)]
        if options.peers_python and script in PEERS:
            command += [PEERS[script], options.peers_python]
        if subprocess.run(command).returncode:
            failed.append(script)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
