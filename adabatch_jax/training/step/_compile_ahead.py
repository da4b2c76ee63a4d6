"""Steps compiled for the rungs of the ladder, in the background while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from adabatch_jax.training.data import Rung

_UPDATE = "update"


class CompiledSteps:
    """The step of each rung of the ladder, compiled once: when first needed, or before in the background.

    Only XLA works in the background. Tracing stays on the caller's thread, whose JAX settings it obeys.

    Attributes:
      seconds_waited: by the caller, for programs to be traced, and to be compiled.
    """

    def __init__(
        self, make: Callable[[Rung], Callable[..., Any]], update: Callable[..., Any] | None = None
    ) -> None:
        """What is to be compiled; parameters and optimizer state will be donated.

        Args:
          make: builds the step of a rung, or with `update` only its first half.
          update: the second half, `update(params, opt_state, data, *results of the first half)`, which
            every rung shares: it is compiled once.
        """
        self._make, self._update = make, update
        self._compiled: dict[Rung | str, Future[Callable[..., Any]]] = {}
        self._background = ThreadPoolExecutor(2, thread_name_prefix="compilation")
        self.seconds_waited = 0.0

    @property
    def compilations(self) -> int:
        """How many programs have been compiled, what is under way included."""
        return len(self._compiled)

    def __contains__(self, rung: Rung) -> bool:
        return rung in self._compiled

    def prepare(self, rung: Rung, *arguments: Any) -> None:
        """Starts to compile the step of this rung, if nobody has; `arguments` as for the call."""
        if rung in self._compiled:
            return
        start = time.perf_counter()
        function = self._make(rung)
        self._begin(rung, function, arguments, donated=() if self._update else (0, 1))
        if self._update and _UPDATE not in self._compiled:
            half = jax.eval_shape(function, *arguments)
            self._begin(_UPDATE, self._update, (*arguments[:3], *half), donated=(0, 1))
        self.seconds_waited += time.perf_counter() - start

    def __call__(self, rung: Rung, *arguments: Any) -> Any:
        """Runs the step of this rung."""
        self.prepare(rung, *arguments)
        start = time.perf_counter()
        program = self._compiled[rung].result()
        update = self._compiled[_UPDATE].result() if self._update else None
        self.seconds_waited += time.perf_counter() - start
        result = program(*arguments)
        return update(*arguments[:3], *result) if update else result

    def close(self) -> None:
        """Waits for a compilation that nobody needs any more, and begins no other."""
        self._background.shutdown(cancel_futures=True)

    def _begin(
        self,
        name: Rung | str,
        function: Callable[..., Any],
        arguments: Any,
        donated: tuple[int, ...],
    ) -> None:
        lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
        self._compiled[name] = self._background.submit(_compile, lowered)


def _compile(lowered: Any) -> Callable[..., Any]:
    return lowered.compile()
