"""Several processes, perhaps on several hosts, that make one run: `jax.distributed`."""

from __future__ import annotations

import sys

import jax

PATIENCE = 60  # seconds


def connect(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    patience: int | None = None,
) -> None:
    """Finds the other processes of a run, before JAX looks at its devices.

    A process that dies is noticed after `patience` seconds without a sign of life; JAX then ends all
    others, with a message of its own. In a program that called `jax.distributed.initialize` already,
    the processes have met and nothing is changed.

    Args:
      coordinator: HOST:PORT, where the first process listens; None: as Cloud TPU, Slurm and the like
        know them, and so for the other two.
      num_processes: processes in the run.
      process_id: which of them this is, from 0.
      patience: seconds; None: 60.

    Raises:
      ValueError: the others were not found.
    """
    patience = patience or PATIENCE
    if not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                heartbeat_timeout_seconds=patience,
                shutdown_timeout_seconds=patience,
            )
        except (RuntimeError, ValueError) as error:
            where = coordinator or "--distributed auto"
            raise ValueError(f"train: {where}: the processes did not meet: {error}") from None
    print(
        f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} of "
        f"{jax.device_count()} devices. If one process dies, all stop within {patience} s; "
        "--resume auto goes on from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
