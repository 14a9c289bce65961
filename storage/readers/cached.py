"""Asking Linux whether a part of a file is in the page cache, without bringing any of it there."""

import ctypes
import fcntl
import os

__all__ = ["all_cached", "through_cache"]

_CACHESTAT = 451  # the number of the system call, the same on every architecture; Linux 6.5
_PAGE = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    """struct cachestat, linux/mman.h."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


def all_cached(file: int, start: int, length: int) -> bool:
    """Return whether all of these bytes of an open file are in the page cache; False where the system cannot tell."""
    where, found = _Range(start, length), _Pages()
    if _libc.syscall(_CACHESTAT, file, ctypes.byref(where), ctypes.byref(found), 0):
        return False
    wanted: int = -(-(start + length) // _PAGE) - start // _PAGE
    return int(found.cached) >= wanted


def through_cache(file: int) -> None:
    """Read the open file through the page cache from now on."""
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)
