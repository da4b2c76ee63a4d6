"""How does it outlive the process? Trained parameters, and the whole state of a run, on disk.

`save_params` and `load_params` keep what was trained. `Checkpoints` saves the state of a run while it
goes on, and finds the newest sound one again; `data_checksum` tells whether two runs had the same data.
Orbax writes both, and is imported when it is first needed.
"""

from adabatch_jax.training.checkpoint._params import load_params, save_params
from adabatch_jax.training.checkpoint._run_checkpoints import Checkpoints, data_checksum

__all__ = ["Checkpoints", "data_checksum", "load_params", "save_params"]
