"""Where is it computed? The devices of a run, its processes, and the signals that end it.

`connect` finds the other processes of a run, before JAX looks at its devices. `Devices` hands data and
parameters to every device and deals out the groups of a batch; `on_host` copies arrays back, `as_before`
undoes that. `between_steps` notes a signal until the step that is being computed has ended, and
`RunInterrupted` says that one ended the run.
"""

from adabatch_jax.training.devices._devices import AXIS, Devices, as_before, on_host
from adabatch_jax.training.devices._interrupt import RunInterrupted, between_steps
from adabatch_jax.training.devices._processes import connect

__all__ = [
    "AXIS",
    "Devices",
    "RunInterrupted",
    "as_before",
    "between_steps",
    "connect",
    "on_host",
]
