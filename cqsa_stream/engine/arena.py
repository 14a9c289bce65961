"""Host memory that a CUDA device copies to and from by itself: allocated once, at its exact size, page-locked in place.

(torch's own pinned allocations are rounded up to a power of two.) A thread locks it from its beginning on, in pieces
that grow, while the first parts are used already: each call costs milliseconds, and gigabytes of new pages cost more.
"""

import threading

import torch
from torch import Tensor

from cqsa_stream.errors import NoMemoryError
from cqsa_stream.machine.device import Device
from cqsa_stream.storage.readers.ranges import PAGE

__all__ = ["PageLock", "in_pages", "pages"]

_FIRST_BYTES, _MOST_BYTES = 16 << 20, 128 << 20  # of a piece: a longer one would keep kernels from being launched


def in_pages(size: int) -> int:
    """Return the size rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def pages(size: int) -> Tensor:
    """Return so many bytes, beginning with a page."""
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    over = -memory.data_ptr() % PAGE
    return memory[over : over + size]


class PageLock:
    """Locks places of memory ``[places, bytes]``, each whole pages, while inside, for a device that copies itself."""

    def __init__(self, memory: Tensor, device: Device) -> None:
        self._memory, self._device = memory, device
        self._pieces: list[int] = []
        self._locked = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._lock, name="cqsa-lock", daemon=True)

    def __enter__(self) -> "PageLock":
        self._thread.start()
        return self

    def wait(self, place: int) -> None:
        """Wait until a place is locked. Raises NoMemoryError where it cannot be."""
        with self._changed:
            self._changed.wait_for(lambda: place < self._locked or self._error is not None)
        if place >= self._locked and self._error is not None:
            raise self._error

    def __exit__(self, *_: object) -> None:
        if self._thread.ident is None:
            return
        self._closing = True
        self._thread.join()
        self._device.synchronize()
        with self._device.current():
            for address in self._pieces:
                self._device.unlock(address)
        self._pieces = []

    def _lock(self) -> None:
        places, size = self._memory.shape
        count, most = max(1, _FIRST_BYTES // size), max(1, _MOST_BYTES // size)
        try:
            with self._device.current():
                while self._locked < places and not self._closing:
                    piece = self._memory[self._locked : self._locked + count]
                    self._register(piece.data_ptr(), piece.numel())
                    with self._changed:
                        self._locked += len(piece)
                        self._changed.notify_all()
                    count = min(2 * count, most)
        except BaseException as error:  # handed to whoever waits
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _register(self, address: int, size: int) -> None:
        if status := self._device.lock(address, size):
            raise NoMemoryError(
                f"page-locking {size / 2**20:.0f} MiB of host memory failed (CUDA error {status}): take a smaller "
                "host_memory, or allow more locked memory (ulimit -l)"
            )
        self._pieces.append(address)
