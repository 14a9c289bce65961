"""Host memory that a CUDA device copies to and from by itself: allocated once, at its exact size, page-locked in place.

(torch's own pinned allocations are rounded up to a power of two.) Parts are locked one by one when they are first
used: a page must be there to be locked, and making gigabytes of pages takes longer than a run needs to begin.
"""

import threading

import torch
from torch import Tensor

from cqsa_stream.storage.ranges import PAGE

__all__ = ["PageLock", "in_pages", "pages"]


def in_pages(size: int) -> int:
    """Return the size rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def pages(size: int) -> Tensor:
    """Return so many bytes, beginning with a page."""
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    over = -memory.data_ptr() % PAGE
    return memory[over : over + size]


class PageLock:
    """Locks memory for a device until the end of its context; does nothing for the CPU. For any number of threads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._locked: set[int] = set()
        self._taking = threading.Lock()

    def lock(self, memory: Tensor) -> None:
        """Lock whole pages, once, however often it is asked. Raises RuntimeError where that cannot be."""
        address = memory.data_ptr()
        if self._device.type != "cuda" or not memory.numel() or address in self._locked:
            return
        with torch.cuda.device(self._device):
            status = torch.cuda.cudart().cudaHostRegister(address, memory.numel(), 0)  # type: ignore[no-untyped-call]
        if int(status):
            raise RuntimeError(f"page-locking failed (CUDA error {int(status)}); take a smaller host_memory")
        with self._taking:
            self._locked.add(address)

    def __enter__(self) -> "PageLock":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._locked:
            return
        torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device):
            for address in self._locked:
                torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        self._locked.clear()
