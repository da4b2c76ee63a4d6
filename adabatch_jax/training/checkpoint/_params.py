"""The trained parameters on disk: one Orbax checkpoint, replaced as a whole."""

from __future__ import annotations

import os
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adabatch_jax._types import PyTree
from adabatch_jax.training._files import PathLike


def save_params(path: PathLike, params: PyTree) -> None:
    """Saves parameters with Orbax, with a checksum; a checkpoint that was there before is replaced.

    Written beside `path` first: whatever happens meanwhile, what lies at `path` is complete.

    Args:
      path: folder of the checkpoint; the folder above it is created if it is missing.
      params: pytree of arrays.
    """
    target = Path(os.path.abspath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    values = jax.device_get(params)
    mark = uuid.uuid4().hex
    new, old = (target.with_name(f".{target.name}.{mark}.{which}") for which in ("new", "old"))
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(new, {"params": values, "checksum": checksum(values)})
        # A folder that is not empty cannot be replaced in one call, so the old one steps aside.
        if target.exists():
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_params(path: PathLike, like: PyTree) -> PyTree:
    """Loads what `save_params` saved.

    Args:
      path: folder of the checkpoint.
      like: pytree of arrays whose structure, shapes and dtypes the checkpoint must have.

    Returns:
      A pytree like `like`, on the host.

    Raises:
      ValueError: there is no checkpoint, it is damaged, or it holds other parameters; in one line.
    """
    folder = Path(os.path.abspath(path))
    if not folder.is_dir():
        raise ValueError(f"{path}: no checkpoint")
    result = read_arrays(folder, {"params": like, "checksum": np.uint32(0)})
    if checksum(result["params"]) != result["checksum"]:
        raise ValueError(f"{path}: the checkpoint is damaged (its checksum does not agree)")
    return result["params"]


def read_arrays(folder: Path, like: PyTree) -> PyTree:
    """Reads what Orbax wrote to `folder`, as NumPy arrays.

    Args:
      folder: absolute path.
      like: pytree of arrays whose structure, shapes and dtypes are expected.

    Returns:
      A pytree like `like`.

    Raises:
      ValueError: the files are damaged, or hold something else; in one line.
    """
    import orbax.checkpoint as ocp

    with_paths: Any
    form: Any
    with_paths, form = jax.tree_util.tree_flatten_with_path(like)
    leaves = [leaf for _, leaf in with_paths]
    found = []
    with _checkpointer() as checkpointer:
        # One array at a time: where several fail at once, Orbax lets all but one print a traceback.
        for number, leaf in enumerate(leaves):
            one = [leaf if i == number else ocp.PLACEHOLDER for i in range(len(leaves))]
            plain = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves)
            arguments = ocp.args.PyTreeRestore(form.unflatten(one), form.unflatten(plain))
            try:
                restored = checkpointer.restore(folder, args=arguments)
            except Exception as error:  # of many types, from JSON to TensorStore
                why = str(error).strip().split("\n")[0][:200]
                raise ValueError(
                    f"{folder}: the checkpoint is damaged, or of another model ({why})"
                ) from None
            array = np.asarray(form.flatten_up_to(restored)[number])
            if array.shape != leaf.shape or array.dtype != leaf.dtype:
                name = jax.tree_util.keystr(with_paths[number][0], simple=True, separator=".")
                raise ValueError(
                    f"{folder}: the checkpoint is of another model: {name} is "
                    f"{array.dtype}{list(array.shape)}, expected {leaf.dtype}{list(leaf.shape)}"
                )
            found.append(array)
    return form.unflatten(found)


def this_process_alone() -> Any:
    """Orbax's option for a checkpoint that one process reads or writes while others do something else."""
    import orbax.checkpoint as ocp

    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"adabatch_{own}"
    )


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    alone = this_process_alone()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def checksum(tree: PyTree) -> np.uint32:
    """CRC-32 over the bytes of all arrays. TensorStore's own check lets some flipped bits pass."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return np.uint32(value)
