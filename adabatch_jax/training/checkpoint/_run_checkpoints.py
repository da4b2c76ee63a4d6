"""The state of a run on disk: saved while it goes on, and found again after whatever ended it.

OUT/state holds one folder a checkpoint, named by its step: arrays and a description, written by Orbax
beside the run and put in place as a whole. In a run of several processes the first one reads and
writes, and tells the others what it read.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import adabatch_jax
from adabatch_jax._types import PyTree
from adabatch_jax.training._options import said
from adabatch_jax.training._run_state import RunState
from adabatch_jax.training.checkpoint._params import checksum, read_arrays, this_process_alone
from adabatch_jax.training.devices import as_before, on_host

FORMAT = 2  # of the checkpoint as a whole; counted up when a field is added or changes its meaning


class Checkpoints:
    """Saves states of a run and finds the newest that is sound.

    Args:
      folder: where they lie; made when the first one is saved.
      about: what describes the run: its configuration by field. A state of another is refused.
      budget: examples in the run.
      lag: of the run; says how many sizes a state holds.
      keep: the newest so many stay.
      warn: what to do with a line of warning.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        *,
        budget: int,
        lag: int,
        keep: int,
        warn: Callable[[str], None],
    ) -> None:
        self.folder = Path(os.path.abspath(folder))
        self._about = json.loads(json.dumps(dict(about), default=os.fspath))
        self._budget, self._lag, self._keep, self._warn = budget, lag, keep, warn
        self._manager: Any = None
        self.last_saved: int | None = None

    def save(self, state: RunState) -> None:
        """Copies the state and writes it in the background; an earlier one is waited for.

        Raises:
          OSError: this checkpoint, or the one before, cannot be written.
        """
        if state.step == self.last_saved:
            return
        self.last_saved = state.step
        if jax.process_index() != 0:
            return
        import orbax.checkpoint as ocp  # slow to import

        values = self._arrays(state)
        about = self._description(state.position)
        about["checksum"] = _checksum(values, about)
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(values), about=ocp.args.JsonSave(about)
        )
        try:
            if self._manager is None:
                self._manager = self._open()
            self._manager.save(state.step, args=parts)
        except Exception as error:  # of the thread that wrote the one before, too
            raise OSError(f"{self.folder}: a checkpoint cannot be written: {error}") from error

    def close(self) -> None:
        """Waits until everything is written."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def unfinished(self) -> int | None:
        """The step of the newest checkpoint, if its run did not come to its end."""
        steps = self._steps()
        if not steps:
            return None
        try:
            about = self._read_about(steps[-1])
            return None if about["examples"] >= about["budget"] else steps[-1]
        except ValueError:
            return steps[-1]

    def clear(self) -> None:
        """Removes all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def restore(self, first: RunState) -> RunState | None:
        """The newest sound state, as arrays of this process's first device.

        Damaged ones are named in a warning, and removed once a sound one is found.

        Args:
          first: the state at the start of the run, for its structure, shapes and dtypes.

        Returns:
          The state, or None if there is no checkpoint.

        Raises:
          ValueError: the newest checkpoint is of another configuration (the message names the field),
            or of a newer version of this library; none is sound.
        """
        like = self._arrays(first)
        if jax.process_count() == 1:
            found = self._newest(like)
        else:
            found = _from_first_process(lambda: self._newest(like), like)
        if found is None:
            return None
        values = {name: x.item() for name, x in found["run"].items() if name != "decided"}
        decided = tuple(int(x) for x in found["run"]["decided"] if x)
        state = as_before(
            {k: found[k] for k in ("params", "opt_state")},
            {"params": first.params, "opt_state": first.opt_state},
        )
        return RunState(**state, **values, decided=decided)

    def _newest(self, like: PyTree) -> PyTree | None:
        steps = self._steps()
        for number, step in enumerate(reversed(steps)):
            try:
                about = self._read_about(step)
            except ValueError as error:
                self._warn(f"{error}; the one before is tried")
                continue
            self._compare(step, about)
            try:
                found = read_arrays(self.folder / str(step) / "state", like)
                if _checksum(found, about) != about["checksum"]:
                    raise ValueError(f"{self.folder / str(step)}: its checksum does not agree")
            except ValueError as error:
                self._warn(f"{error}; the one before is tried")
                continue
            for damaged in steps[len(steps) - number :]:
                shutil.rmtree(self.folder / str(damaged), ignore_errors=True)
            return found
        if steps:
            raise ValueError(f"{self.folder}: all {len(steps)} checkpoints are damaged")
        return None

    def _compare(self, step: int, about: Mapping[str, Any]) -> None:
        if about["format"] != FORMAT:
            raise ValueError(
                f"{self.folder / str(step)} has format {about['format']}, this version of "
                f"adabatch_jax reads {FORMAT}"
            )
        before = about["config"]
        other = [k for k, v in self._about.items() if before.get(k) != v]
        if other:
            was, now = (", ".join(_said(k, c.get(k)) for k in other) for c in (before, self._about))
            raise ValueError(
                f"{self.folder / str(step)} is of a run with {was}, this one has {now}: give the same, or "
                "start anew with --resume never"
            )
        here = _environment()
        changed = {k: v for k, v in about["environment"].items() if here.get(k) != v}
        if changed:
            told = ", ".join(f"{k} {v} (now {here.get(k)})" for k, v in changed.items())
            self._warn(f"the run began with {told}: its numbers may differ in their last digits")

    def _steps(self) -> list[int]:
        """Complete checkpoints; what Orbax did not come to finish has another name."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(p.name) for p in there if p.name.isdecimal() and p.is_dir())

    def _read_about(self, step: int) -> dict[str, Any]:
        folder = self.folder / str(step)
        try:
            about = json.loads((folder / "about" / "metadata").read_text(encoding="utf-8"))
            for name in (*self._description(0), "checksum"):
                about[name]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: the checkpoint is damaged ({error})") from None
        return about

    def _description(self, position: int) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "examples": position,
            "budget": self._budget,
            "config": self._about,
            "environment": _environment(),
        }

    def _arrays(self, state: RunState) -> dict[str, Any]:
        decided = np.zeros(self._lag + 1, np.int64)
        decided[: len(state.decided)] = state.decided
        run = {
            name: np.asarray(getattr(state, name))
            for name in ("position", "step", "batch_size", "skipped_in_a_row", "seconds")
        }
        trees = on_host({"params": state.params, "opt_state": state.opt_state})
        return {**trees, "run": {**run, "decided": decided}}

    def _open(self) -> Any:
        import orbax.checkpoint as ocp

        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            create=False,
            cleanup_tmp_directories=True,
            multiprocessing_options=this_process_alone(),
        )
        return ocp.CheckpointManager(self.folder, options=options)


def _said(name: str, value: Any) -> str:
    """An option as it is given; what is none has a name of several words."""
    return f"{name} {value}" if " " in name else said(name, value)


def data_checksum(*arrays: np.ndarray) -> str:
    """Tells whether two runs had the same data: CRC-32 of the bytes, in hexadecimal."""
    return f"{int(checksum(list(arrays))):08x}"


def _checksum(values: PyTree, about: Mapping[str, Any]) -> int:
    """Over arrays and description, so that no damaged number goes unnoticed."""
    text = json.dumps({k: v for k, v in about.items() if k != "checksum"}, sort_keys=True)
    return zlib.crc32(text.encode(), int(checksum(values)))


def _environment() -> dict[str, Any]:
    """What decides about the last digits."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "adabatch_jax": adabatch_jax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": cores,
    }


def _from_first_process(read: Callable[[], PyTree | None], like: PyTree) -> PyTree | None:
    """Calls `read` in the first process only, and gives all of them what it returned."""
    leaves: list[np.ndarray]
    form: Any
    leaves, form = jax.tree.flatten(like)
    size = sum(leaf.nbytes for leaf in leaves)
    payload = np.zeros(size + 1, np.uint8)
    error: BaseException | None = None
    if jax.process_index() == 0:
        try:
            found = read()
        except (ValueError, OSError) as reason:
            error, payload[0] = reason, 2
        else:
            if found is not None:
                arrays = [np.ascontiguousarray(x).tobytes() for x in form.flatten_up_to(found)]
                payload = np.frombuffer(b"\x01" + b"".join(arrays), np.uint8)
    # As bytes: a sum of floats would lose the sign of a zero.
    payload = np.asarray(multihost_utils.broadcast_one_to_all(payload))
    if error is not None:
        raise error
    if payload[0] == 2:
        raise ValueError("process 0 cannot resume the run, and says why")
    if payload[0] == 0:
        return None
    result, start = [], 1
    for leaf in leaves:
        piece = payload[start : start + leaf.nbytes]
        result.append(piece.view(leaf.dtype).reshape(leaf.shape).copy())
        start += leaf.nbytes
    return form.unflatten(result)
