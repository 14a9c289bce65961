"""Host memory that a CUDA device copies to and from by itself: allocated once, at its exact size, page-locked in place.

(torch's own pinned allocations are rounded up to a power of two.) A thread locks it from its beginning on, piece by
piece, while the first parts are used already: gigabytes of new pages take a while. They are asked for in huge ones, and
made outside of the driver, which lets nobody launch or copy while it locks; after each piece others get their turn.
"""

import ctypes
import threading
import time

import torch
from torch import Tensor

from cqsa_stream.errors import NoMemoryError
from cqsa_stream.machine.device import Device
from cqsa_stream.storage.readers.ranges import PAGE

__all__ = ["PageLock", "in_pages", "pages"]

_PIECE_BYTES = 8 << 20  # or a place: a longer one would keep kernels from being launched
_HUGE_PAGES, _POPULATE_WRITE = 14, 23  # sys/mman.h
_libc = ctypes.CDLL(None)


def in_pages(size: int) -> int:
    """Return the size rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def pages(size: int) -> Tensor:
    """Return so many bytes, beginning with a page."""
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    over = -memory.data_ptr() % PAGE
    return memory[over : over + size]


def _advise(memory: Tensor, advice: int) -> None:
    """Tell the system what to do with whole pages; where it does not know the advice, nothing is lost."""
    _libc.madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel()), advice)


class PageLock:
    """Locks places of memory ``[places, bytes]``, each whole pages, while inside, for a device that copies itself.

    At its end no copy may be under way.
    """

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
        with self._device.current():
            for address in self._pieces:
                self._device.unlock(address)
        self._pieces = []

    def _lock(self) -> None:
        places, size = self._memory.shape
        count = max(1, _PIECE_BYTES // max(1, size))
        try:
            with self._device.current():
                if self._device.habits.own_memory:  # all of it will be there: nothing is held that is not used
                    _advise(self._memory, _HUGE_PAGES)
                while self._locked < places and not self._closing:
                    piece = self._memory[self._locked : self._locked + count]
                    if self._device.habits.own_memory:
                        _advise(piece, _POPULATE_WRITE)
                    start = time.monotonic()
                    self._register(piece.data_ptr(), piece.numel())
                    took = time.monotonic() - start
                    with self._changed:
                        self._locked += len(piece)
                        self._changed.notify_all()
                    time.sleep(took)
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
