"""Keeping freed memory from staying resident: a budget is kept by what the process holds, not by what it uses.

glibc raises the size from which it returns freed blocks to the system whenever such a block is freed, up to 32 MiB, so
a loop over tiles of a few MiB ends up with several times their size in its heaps. While a session runs, blocks from
64 KiB on go back at once. Other C libraries are left as they are.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["returning_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL = 64 << 10
_LARGE = 32 << 20  # where glibc's own adjustment ends


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Return large freed blocks to the system at once, inside this context."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _SMALL)
    mallopt(_M_TRIM_THRESHOLD, 2 * _SMALL)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)
