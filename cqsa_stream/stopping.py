"""When to stop: a time limit, or a signal. The first signal asks to stop at the next safe point, the second kills."""

import signal
import threading
import time
from types import FrameType
from typing import Any

__all__ = ["Stopper"]


class Stopper:
    """Called between steps; gives the reason to stop, or None. As a context manager it listens to signals."""

    def __init__(self, max_seconds: float | None, signals: tuple[signal.Signals, ...]) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._max_seconds = max_seconds
        listening = threading.current_thread() is threading.main_thread()
        self._signals = signals if listening else ()
        self._before: dict[signal.Signals, Any] = {}
        self.received: signal.Signals | None = None

    def __call__(self) -> str | None:
        if self.received is not None:
            return f"stopped by {self.received.name}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"stopped after {self._max_seconds:g} s (max_seconds)"
        return None

    def __enter__(self) -> "Stopper":
        for number in self._signals:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for listened in self._signals:
            signal.signal(listened, signal.SIG_DFL)
