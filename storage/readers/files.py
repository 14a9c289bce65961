"""Files of a known size, opened past the system's page cache or through it; what Linux tells of that cache."""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cqsa_stream.storage.errors import ArrayError

__all__ = ["CURE", "StoredFile", "all_cached", "opened", "through_cache"]

CURE = "write this chunk again"
_CACHESTAT = 451  # the number of the system call, the same on every architecture; Linux 6.5
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class StoredFile:
    """A file that should have ``size`` bytes, or at least so many where there may be more (``open_ended``).

    ``cached``: it is small, and may stay in the page cache.
    """

    path: str
    size: int
    open_ended: bool = False
    cached: bool = False

    def refuse_size(self, found: int) -> None:
        """Raise ArrayError where the file has another length than it should."""
        if found < self.size:
            raise ArrayError(f"{self.path}: {found} bytes; expected {self.size}: truncated, {CURE}")
        if found > self.size and not self.open_ended:
            raise ArrayError(f"{self.path}: {found} bytes; expected {self.size}: not what was written, {CURE}")


@contextmanager
def opened(file: StoredFile, *, direct: bool = True) -> Iterator[tuple[int, bool]]:
    """Open a file of the size it should have; yield (descriptor, whether it goes past the page cache)."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    direct = direct and not file.cached
    try:
        try:
            number = os.open(file.path, flags | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            number, direct = os.open(file.path, flags), False
    except OSError as error:
        raise ArrayError(f"{file.path}: {_reason(error)}") from error
    try:
        file.refuse_size(os.fstat(number).st_size)
        yield number, direct
    finally:
        os.close(number)


def _reason(error: OSError) -> str:
    return f"a stored chunk is missing, {CURE}" if isinstance(error, FileNotFoundError) else str(error.strerror)


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    """struct cachestat, linux/mman.h."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


def all_cached(file: int, start: int, length: int) -> bool:
    """Return whether all of these bytes of an open file are in the page cache; False where the system cannot tell.

    Nothing is brought there by asking.
    """
    where, found = _Range(start, length), _Pages()
    if _libc.syscall(_CACHESTAT, file, ctypes.byref(where), ctypes.byref(found), 0):
        return False
    wanted: int = -(-(start + length) // mmap.PAGESIZE) - start // mmap.PAGESIZE
    return int(found.cached) >= wanted


def through_cache(file: int) -> None:
    """Read the open file through the page cache from now on."""
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)
