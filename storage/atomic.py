"""Replacing a file in one step that survives a power cut: write beside it, fsync, rename, fsync the directory."""

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cqsa_stream.storage.errors import FullDiskError

__all__ = ["TEMPORARY", "make_directory", "replace_file", "sync_directory"]

TEMPORARY = ".tmp"


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
    """Create a directory, its parents and their entries, durably. Raises OSError naming it, or FullDiskError."""
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise _failure(error, path, 4096) from error


def _failure(error: OSError, path: Path, size: int) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FullDiskError(error.errno, f"disk full; {size} bytes are needed for", str(path))
    return OSError(error.errno, f"writing failed: {error.strerror}", str(path))


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable. Raises OSError naming it."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(directory)
