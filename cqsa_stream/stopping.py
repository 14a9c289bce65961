"""When to stop: a time limit, or a signal. The first signal asks to stop at the next safe point, the second ends all.

Python runs a handler only when the main thread is back from what it called, which may be a long kernel; what the system
itself writes into a pipe at each signal is read by a thread that need not wait.
"""

import os
import signal
import threading
import time
from typing import Any

__all__ = ["Stopper"]

_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 3}


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
        if self._depth == 1 and self._signals:
            self._told, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            self._listener = threading.Thread(target=self._listen, name="cqsa-signals", daemon=True)
            self._listener.start()
            self._wakeup = signal.set_wakeup_fd(self._pipe)
            for number in self._signals:
                self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._signals:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe)
            self._listener.join()
            os.close(self._told)

    def _listen(self) -> None:
        while told := os.read(self._told, 1):
            if told[0] not in self._signals:
                continue
            if self.received is not None:
                os._exit(_EXIT_CODES.get(signal.Signals(told[0]), 1))
            self.received = signal.Signals(told[0])
