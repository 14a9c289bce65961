"""Replacing a file in one step that survives a power cut: write beside it, fsync, rename, fsync the directory."""

import errno
import io
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cqsa_stream.storage.errors import FullDiskError

__all__ = ["TEMPORARY", "make_directory", "open_regular", "replace_file", "sync_directory"]

TEMPORARY = ".tmp"
_durable: set[Path] = set()


def replace_file(path: Path, parts: Sequence[Any]) -> None:
    """Make ``parts`` (buffers) the content of the file: it is seen whole or not at all.

    Whatever fails, the file is whole: it has its old content, or the new. Raises OSError naming it, FullDiskError where
    the disk is full.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[os.write(file, view) :]
            os.fsync(file)
        finally:
            os.close(file)
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise _failure(error, path, sum(memoryview(part).nbytes for part in parts)) from error


def make_directory(path: Path) -> None:
    """Create a directory, its parents and their entries, durably. Raises OSError naming it, or FullDiskError.

    The entry of one that is there is made durable, too, once in a process: who made it may have been killed before.
    """
    there = path.is_dir()
    if there and path in _durable:
        return
    if not there:
        make_directory(path.parent)
    try:
        path.mkdir(exist_ok=True)
        with suppress(PermissionError):
            sync_directory(path.parent)
    except OSError as error:
        raise _failure(error, path, 4096) from error
    _durable.add(path)


def _failure(error: OSError, path: Path, size: int) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FullDiskError(error.errno, f"disk full; {size} bytes are needed for", str(path))
    return OSError(error.errno, f"writing failed: {error.strerror}", str(path))


def open_regular(path: Path) -> io.FileIO:
    """Open a file of the run's own for reading: no link, no pipe, no device. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return io.FileIO(file)


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable. Raises OSError naming it."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(directory)
