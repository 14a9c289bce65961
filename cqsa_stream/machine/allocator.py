"""Keeping freed memory from staying resident: a budget is kept by what the process holds, not by what it uses.

glibc raises the size from which it returns freed blocks to the system whenever such a block is freed, up to 32 MiB, so
a loop over tiles of a few MiB ends up with several times their size in its heaps. While a session with a host budget
runs, blocks from 64 KiB on go back at once, and small ones when the computing begins: what planning leaves is in pieces
all over the heap. Other C libraries are left as they are.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["return_small_blocks", "returning_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL = 64 << 10
_LARGE = 32 << 20  # where glibc's own adjustment ends: it cannot be asked where it stood
_lock = threading.Lock()
_sessions = 0


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Return large freed blocks to the system at once, inside this context, of which several may overlap."""
    libc = ctypes.CDLL(None)
    if getattr(libc, "mallopt", None) is None:
        yield
        return
    _count(libc, 1)
    try:
        yield
    finally:
        _count(libc, -1)


def return_small_blocks() -> None:
    """Return whole free pages to the system, where a session runs in ``returning_freed_memory``."""
    if _sessions:
        ctypes.CDLL(None).malloc_trim(0)


def _count(libc: ctypes.CDLL, change: int) -> None:
    global _sessions
    with _lock:
        _sessions += change
        if _sessions == 0 or (_sessions, change) == (1, 1):
            size = _SMALL if _sessions else _LARGE
            libc.mallopt(_M_MMAP_THRESHOLD, size)
            libc.mallopt(_M_TRIM_THRESHOLD, 2 * size)
            if not _sessions:
                libc.malloc_trim(0)
