"""Lines that tests reach, by room; and the lines of the core that only tests beside the default reach.

`make coverage` runs the tests and then this, which reads what `coverage` has recorded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import coverage

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adabatch_jax"
ROOMS = ("noise", "batch_size", "curvature", "learning_rate", "optimizers", "training")


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first if first in ROOMS else "others"


def missing_in(recording: str) -> dict[Path, tuple[set[int], set[int]]]:
    """For every file its statements, and those that were not reached."""
    recorded = coverage.Coverage(data_file=recording)
    recorded.load()
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        _, statements, _, missing, _ = recorded.analysis2(str(path))
        found[path] = set(statements), set(missing)
    return found


def shares(missing: dict[Path, tuple[set[int], set[int]]]) -> dict[str, str]:
    """Percent of the statements of every room that were reached."""
    given = {}
    for room in (*ROOMS, "others"):
        files = [both for path, both in missing.items() if room_of(path) == room]
        total, left = (sum(len(both[i]) for both in files) for i in (0, 1))
        given[room] = f"{100 * (1 - left / total):.1f} %"
    return given


def main(default: str, rest: str) -> None:
    of_default, of_rest = missing_in(default), missing_in(rest)
    of_all = {path: (lines, left & of_rest[path][1]) for path, (lines, left) in of_default.items()}
    rows = {"default": shares(of_default), "all": shares(of_all)}
    print(f"{'':8}" + "".join(f"{room:>15}" for room in rows["all"]))
    for name, row in rows.items():
        print(f"{name:8}" + "".join(f"{share:>15}" for share in row.values()))
    print("\nLines of the core that the default tests do not reach, and others do:")
    for path, (_, left) in of_default.items():
        late = sorted(left - of_all[path][1])
        if late and room_of(path) != "training":
            print(f"{path.relative_to(ROOT)}: {', '.join(map(str, late))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
