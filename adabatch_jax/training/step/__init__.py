"""What is done with a batch? The compiled step, one at a time or many in one call.

`make_step` builds the fused step: gradient and noise, then decision and update. `make_gradient` and
`make_update` are its two halves, of which only the first depends on the shape of a batch.
`CompiledSteps` compiles them ahead, in the background. `make_device_loop` puts a step into a loop on the
device. `make_evaluation` measures loss and accuracy.
"""

from adabatch_jax.training.step._compile_ahead import CompiledSteps
from adabatch_jax.training.step._device_loop import (
    LoopPlace,
    LoopResult,
    loop_place,
    make_device_loop,
)
from adabatch_jax.training.step._step import (
    make_evaluation,
    make_gradient,
    make_step,
    make_update,
)

__all__ = [
    "CompiledSteps",
    "LoopPlace",
    "LoopResult",
    "loop_place",
    "make_device_loop",
    "make_evaluation",
    "make_gradient",
    "make_step",
    "make_update",
]
