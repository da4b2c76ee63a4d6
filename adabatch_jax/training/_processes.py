"""Several processes, perhaps on several hosts, that make one run: `jax.distributed`."""

from __future__ import annotations

import sys

import jax

from adabatch_jax.training._config import TrainConfig
from adabatch_jax.training._options import PATIENCE


def connect(config: TrainConfig) -> None:
    """Finds the other processes, if the run has any, before JAX looks at its devices.

    A process that dies is noticed after `config.patience` seconds without a sign of life; JAX then
    ends all others, with a message of its own.

    Args:
      config: the run. A program that called `jax.distributed.initialize` itself leaves it alone.

    Raises:
      ValueError: the others were not found.
    """
    if config.distributed is None and config.coordinator is None:
        return
    patience = config.patience or PATIENCE
    if not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                heartbeat_timeout_seconds=patience,
                shutdown_timeout_seconds=patience,
            )
        except (RuntimeError, ValueError) as error:
            where = config.coordinator or "--distributed auto"
            raise ValueError(f"train: {where}: the processes did not meet: {error}") from None
    print(
        f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} of "
        f"{jax.device_count()} devices. If one process dies, all stop within {patience} s; "
        "--resume auto goes on from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
