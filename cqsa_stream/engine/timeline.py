"""What a session's threads and its device did, and when: a span for each read, wait, copy, kernel call and write.

Spans of threads are taken by the clock. Those of a device are between events of its streams, which are read when all is
done: nothing waits for them. A session keeps its first spans, so that a long one does not grow: few where kernels
compute in host memory, which is planned to the MiB. The seconds of each kind are summed up of all, those of a device
when they are over.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cqsa_stream.events import Span
from cqsa_stream.machine.device import Device, Tick

__all__ = ["Timeline"]

_MOST, _MOST_IN_PLACE = 20_000, 1_000  # of threads, and as many of the device
_PENDING = 64
_SHOWN_S = 5e-5  # shorter spans of threads are not kept: nobody waited


class Timeline:
    """Collects spans, in seconds from its making on. Threads may share it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._most = _MOST if device.habits.own_memory else _MOST_IN_PLACE
        self._start = time.monotonic()
        self._first = device.tick()
        device.synchronize()
        self._device_start_s = time.monotonic() - self._start
        self._spans: list[Span] = []
        self._on_device: list[tuple[str, str, Tick, Tick]] = []
        self._pending: deque[tuple[str, str, Tick, Tick]] = deque()  # not yet summed up
        self._until: dict[str, float] = {}  # the end of what was summed up, of each kind on the device
        self._seconds: dict[str, float] = {}
        self._adding = threading.Lock()

    @contextmanager
    def span(self, kind: str, about: str = "") -> Iterator[None]:
        """Record what this thread does inside."""
        start = time.monotonic()
        try:
            yield
        finally:
            stop = time.monotonic()
            self._add(kind, stop - start)
            if stop - start > _SHOWN_S and len(self._spans) < self._most:
                where = threading.current_thread().name
                self._spans.append(Span(kind, where, start - self._start, stop - self._start, about))

    @contextmanager
    def on_device(self, kind: str, about: str = "") -> Iterator[None]:
        """Record when the device does what is issued inside on the current stream."""
        start = self._device.tick()
        yield
        done = kind, about, start, self._device.tick()
        if len(self._on_device) < self._most:
            self._on_device.append(done)
        self._pending.append(done)
        if len(self._pending) >= _PENDING:
            self._sum_up()

    def busy_s(self, kind: str) -> float:
        """Return the seconds of a kind so far, of all threads together; without waiting for the device."""
        self._sum_up()
        return self._seconds.get(kind, 0.0)

    def _sum_up(self) -> None:
        """Add up what the device has done by now: what its streams do at the same time counts once."""
        while self._pending and self._device.has_passed(self._pending[0][3]):
            kind, _, start, stop = self._pending.popleft()
            start_s, stop_s = (self._device.between_s(self._first, tick) for tick in (start, stop))
            since = max(start_s, self._until.get(kind, 0.0))
            self._add(kind, max(0.0, stop_s - since))
            self._until[kind] = max(since, stop_s)

    def _add(self, kind: str, seconds: float) -> None:
        with self._adding:
            self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def spans(self) -> tuple[Span, ...]:
        """Return all spans, by their start, once the device is done; those of threads alone where it failed."""

        def at(tick: Tick) -> float:
            return self._device_start_s + self._device.between_s(self._first, tick)

        where, on_device = str(self._device), list[Span]()
        with suppress(RuntimeError):  # what has gone wrong with the device is told by whoever used it
            self._device.synchronize()
            on_device = [Span(kind, where, at(start), at(stop), about) for kind, about, start, stop in self._on_device]
        return tuple(sorted((*self._spans, *on_device), key=lambda span: span.start_s))
