"""Signals that wait for the step that is being computed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def between_steps(*numbers: signal.Signals) -> Iterator[Callable[[], signal.Signals | None]]:
    """Notes signals instead of obeying them at once: the device must not be left in the middle.

    Args:
      numbers: the signals, such as SIGINT (Ctrl-C). One that comes twice does not wait.

    Returns:
      A context manager that yields a function to call between steps: the signal that came, or None.
      Signals reach the main thread only; in any other nothing is noted.
    """
    came: signal.Signals | None = None
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: Any) -> None:
        nonlocal came
        came = signal.Signals(number)
        signal.signal(came, before[came])

    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunInterrupted(KeyboardInterrupt):
    """A signal ended a run between two steps.

    Args:
      number: the signal.
      step: the last step that was made.
      saved: whether the state after that step was saved, so that the run can be resumed.
    """

    def __init__(self, number: signal.Signals, step: int, saved: bool) -> None:
        left = (
            "its state is saved: --resume goes on" if saved else "metrics.csv holds the steps made"
        )
        super().__init__(f"stopped by {number.name} after step {step}; {left}")
        self.number, self.step, self.saved = number, step, saved
