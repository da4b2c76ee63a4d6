"""What the experiments share: data on the device, and runs that an interruption does not lose."""

from __future__ import annotations

import collections
import csv
import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adabatch_jax.training import load_dataset
from adabatch_jax.training._files import atomic_path, write_json

CSV_OPTION: dict[str, Any] = dict(
    type=Path, help="write the tables here as well, a row for every cell"
)
Result = dict[str, Any]
Wanted = Callable[[dict[str, Result]], list[tuple[str, Callable[[], Result]]]]


@functools.cache
def data(name: str, folder: str | None = None) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Keys train and test: inputs [N, H, W] standardised by the training data, and labels."""
    d = load_dataset(name, folder)
    mean, deviation = d.train_inputs.mean() / 255.0, d.train_inputs.std() / 255.0

    def prepared(x: np.ndarray) -> jax.Array:
        return jnp.asarray((x / np.float32(255.0) - mean) / deviation, jnp.float32)

    return {
        "train": (prepared(d.train_inputs), jnp.asarray(d.train_labels)),
        "test": (prepared(d.test_inputs), jnp.asarray(d.test_labels)),
    }


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over examples."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_accuracy(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`accuracy(params, inputs, labels)`, jitted, a tenth of the examples at a time."""

    @jax.jit
    def accuracy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        def part(xy: tuple[jax.Array, jax.Array]) -> jax.Array:
            return jnp.mean(jnp.argmax(apply(params, xy[0]), axis=-1) == xy[1])

        split = lambda a: a.reshape(10, -1, *a.shape[1:])
        return jnp.mean(jax.lax.map(part, (split(x), split(y))))

    return accuracy


def octaves(low: float, count: int = 8, factor: float = 2.0) -> tuple[float, ...]:
    """`count` values from `low` on, each `factor` times the one before."""
    return tuple(float(f"{low * factor**k:.3g}") for k in range(count))


def run_all(store: Path, wanted: Wanted) -> dict[str, Result]:
    """Makes every run that is wanted and not in the file `store` yet; each result is saved at once.

    `wanted(results so far)` lists (key, run): what comes later may depend on what is known. Keys begin
    with a group, "group | …", whose runs take about the same time.
    """
    done = json.loads(store.read_text()) if store.exists() else {}

    def group(key: str) -> str:
        return key.split(" | ")[0]

    def seconds(key: str) -> float:
        alike = [r["seconds"] for k, r in done.items() if group(k) == group(key)]
        return float(np.mean(alike)) if alike else 30.0

    while waiting := [(key, run) for key, run in wanted(done) if key not in done]:
        key, run = waiting[0]
        start = time.perf_counter()
        result = run()
        done[key] = {**result, "seconds": time.perf_counter() - start}
        write_json(store, done)
        minutes = sum(seconds(k) for k, _ in waiting[1:]) / 60
        shown = "  ".join(
            f"{k} {v:.4g}" for k, v in done[key].items() if isinstance(v, (int, float))
        )
        print(f"{key}: {shown}; {len(waiting) - 1} runs, about {minutes:.0f} min left", flush=True)
    return done


def save_table(
    rows: list[Result],
    table: str,
    folder: Path,
    copy: Path | None = None,
    task: tuple[str, ...] = (),
) -> None:
    """As table.md and table.csv in a folder, and as CSV in a second place; floats with six digits.

    `task` are the columns that name a task: rows of other tasks stay in the second place, so that tasks
    which were run one by one come together there.
    """
    (folder / "table.md").write_text(table.rstrip() + "\n", encoding="utf-8")
    short = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    write_csv(folder / "table.csv", short)
    if copy is not None:
        before = read_csv(copy) if task and copy.exists() else []
        name = lambda row: tuple(str(row[column]) for column in task)
        made = {name(row) for row in short}
        write_csv(copy, [row for row in before if name(row) not in made] + short)


def read_csv(path: Path) -> list[Result]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def save_tables(text: str, folder: Path, copy: Path | None) -> None:
    """`save_table` for a Markdown text with any tables, a row for every cell."""
    save_table(cells_of(text), text, folder, copy)


def cells_of(text: str) -> list[Result]:
    """The tables of a Markdown text, a row for every cell: what is said above, line, column, value.

    Lines are counted through the tables under one title, so that each can be put together again.
    """
    rows, lines = [], collections.Counter[str]()
    title, header, before = "", list[str](), ""
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
            if line and not before:  # a paragraph begins
                title = re.split("[,.]", line)[0].replace("*", "")
        elif not header:
            header = _split(line)
        elif set(line) - set("|- "):
            lines[title] += 1
            at = {"table": title, "line": lines[title]}
            cells = zip(header, _split(line), strict=True)
            rows += [{**at, "column": column, "value": value} for column, value in cells]
        before = line
    return rows


def _split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]
