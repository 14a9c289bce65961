"""Host memory that a CUDA device copies to and from by itself: allocated once, at its exact size, page-locked in place.

(torch's own pinned allocations are rounded up to a power of two.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cqsa_stream.storage.ranges import PAGE

__all__ = ["page_locked", "pages"]


def pages(size: int) -> Tensor:
    """Return so many bytes, whole pages, beginning with one."""
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    over = -memory.data_ptr() % PAGE
    return memory[over : over + size]


@contextmanager
def page_locked(memory: Tensor, device: torch.device) -> Iterator[None]:
    """Lock the memory's pages while inside, where the device is a CUDA device. Raises RuntimeError where it cannot."""
    if device.type != "cuda" or not memory.numel():
        yield
        return
    _check(_cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    try:
        yield
    finally:
        torch.cuda.synchronize(device)
        _check(_cudart().cudaHostUnregister(memory.data_ptr()))


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(status: Any) -> None:
    code = int(status)
    if code != 0:
        raise RuntimeError(f"page-locking host memory failed (CUDA error {code}); take a smaller host_memory")
