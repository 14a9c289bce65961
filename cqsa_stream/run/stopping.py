"""When to stop: a time limit, or a signal. The first signal asks to stop at the next safe point, the second ends all.

In somebody's process only a signal's handler is borrowed: the second Ctrl-C is a KeyboardInterrupt, as ever. Our own
command ends its process at once: Python runs a handler only when the main thread is back from what it called, which may
be a long kernel, so there a thread reads what the system itself writes into a pipe at each signal.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from cqsa_stream.errors import RunInterrupted, RunStopped

__all__ = ["Stopper"]


class Stopper:
    """Called between steps; gives the reason to stop, or None. As a context manager, entered once or twice, it listens.

    The time limit counts from its making: what comes before the computing is in it. ``owns_process``: it is the command
    line's. A signal that is ignored, or handled by C code, stays so.
    """

    def __init__(
        self, signals: tuple[signal.Signals, ...] = (), max_seconds: float | None = None, *, owns_process: bool = False
    ) -> None:
        self._began = time.monotonic()
        self.limit(max_seconds)
        self._signals, self._owns_process = signals, owns_process
        self._before: dict[signal.Signals, Any] = {}
        self._depth = 0
        self._asked: str | None = None
        self.received: signal.Signals | None = None

    def ask(self, reason: str) -> None:
        """Stop at the next safe point, for this reason."""
        self._asked = reason

    def limit(self, max_seconds: float | None) -> None:
        """Stop so many seconds after the making; None: never for the time."""
        self._max_seconds = max_seconds

    def __call__(self, early_s: float = 0.0) -> str | None:
        """Return the reason; a time limit less than ``early_s`` away counts as reached."""
        if self.received is not None:
            return f"stopped by {self.received.name}"
        if self._asked is not None:
            return self._asked
        if self._max_seconds is not None and time.monotonic() + early_s - self._began >= self._max_seconds:
            return f"stopped after {self._max_seconds:g} s (max_seconds)"
        return None

    def pass_on(self) -> None:
        """Hand a signal that came too late to stop anything to the handler that the caller has for it."""
        if self.received is not None:
            signal.raise_signal(self.received)

    def error(self, reason: str) -> RunStopped:
        """Return what a run that stops for this reason raises."""
        return RunInterrupted(reason) if self.received == signal.SIGINT else RunStopped(reason)

    def __enter__(self) -> "Stopper":
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth or not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self._owns_process:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe)
            self._listener.join()
            os.close(self._told)

    def _listen(self) -> None:
        ours = [n for n in self._signals if signal.getsignal(n) not in (None, signal.SIG_IGN)]
        if ours and self._owns_process:
            self._told, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            self._listener = threading.Thread(target=self._read, args=(ours,), name="cqsa-signals", daemon=True)
            self._listener.start()
            self._wakeup = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        for number in ours:
            self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._owns_process:
            return  # the thread knows already
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def _read(self, ours: list[signal.Signals]) -> None:
        while told := os.read(self._told, 1):
            if told[0] not in ours:
                continue
            if self.received is not None:
                os._exit(RunInterrupted.exit_code if told[0] == signal.SIGINT else RunStopped.exit_code)
            self.received = signal.Signals(told[0])
