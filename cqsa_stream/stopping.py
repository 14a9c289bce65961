"""When to stop: a time limit, or a signal. The first signal asks to stop at the next safe point, the second kills."""

import signal
import threading
import time
from types import FrameType
from typing import Any

__all__ = ["Stopper"]


class Stopper:
    """Called between steps; gives the reason to stop, or None. As a context manager, entered once or twice, it listens.

    The time limit counts from its making: what comes before the computing is in it.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (), max_seconds: float | None = None) -> None:
        self._max_seconds = max_seconds
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        listening = threading.current_thread() is threading.main_thread()
        self._signals = signals if listening else ()
        self._before: dict[signal.Signals, Any] = {}
        self._depth = 0
        self.received: signal.Signals | None = None

    def __call__(self, early_s: float = 0.0) -> str | None:
        """Return the reason; a time limit less than ``early_s`` away counts as reached."""
        if self.received is not None:
            return f"stopped by {self.received.name}"
        if self._deadline is not None and time.monotonic() + early_s >= self._deadline:
            return f"stopped after {self._max_seconds:g} s (max_seconds)"
        return None

    def __enter__(self) -> "Stopper":
        self._depth += 1
        for number in self._signals if self._depth == 1 else ():
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for listened in self._signals:
            signal.signal(listened, signal.SIG_DFL)
