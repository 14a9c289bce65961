"""Replacing a file in one step that survives a power cut: write beside it, fsync, rename, fsync the directory.

What is written beside it has a name that no other writer takes: ``<name>.<owner>-<token>.tmp``. The owner is the
process that writes, as ``<host>-<boot>-<pid namespace>-<pid>-<start ticks>``; host and boot are digests. So two writers
of one file never publish each other's halves, and what a killed one left is told from what a living one will rename.
"""

import errno
import hashlib
import io
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cqsa_stream.storage.errors import FullDiskError
from cqsa_stream.storage.processes import boot, boot_and_start, lives

__all__ = [
    "has_ended",
    "is_temporary",
    "make_directory",
    "open_regular",
    "owner",
    "replace_file",
    "sweep",
    "sync_directory",
    "temporary_name",
]

_OWNER = re.compile(r"([0-9a-f]{8})-([0-9a-f]{8})-(\d+)-(\d+)-(\d+)", re.ASCII)
_NAME = re.compile(r"(.+)\.([0-9a-f]{8}-[0-9a-f]{8}-\d+-\d+-\d+)-[0-9a-f]{16}\.tmp", re.ASCII)
_durable: dict[Path, None] = {}  # the latest of the directories made here: the output has one for each chunk
_MOST_DURABLE = 64


def temporary_name(path: Path) -> Path:
    """Return where this process may write what is to become the file: a name that no other writer has or had."""
    return Path(_temporary(path))


def _temporary(path: Path) -> str:
    """Return such a name as text: pathlib interns the names in a Path, and the table of these grows with new ones."""
    return f"{path}.{owner()}-{secrets.token_hex(8)}.tmp"


def is_temporary(name: str, of: str) -> bool:
    """Return whether a file of this name was to become the one named ``of``."""
    match = _NAME.fullmatch(name)
    return match is not None and match[1] == of


def sweep(directory: Path) -> None:
    """Remove what killed processes were writing directly in a directory; what cannot be removed harms nothing.

    The files of living processes stay, and those of other hosts and pid namespaces: of these nobody here knows whether
    they live.
    """
    with suppress(OSError):
        for name in os.listdir(directory):  # noqa: PTH208 - called often: names are all that is needed
            if name.endswith(".tmp") and _is_left_over(name):
                with suppress(OSError):
                    (directory / name).unlink()


def _is_left_over(name: str) -> bool:
    """Return whether the owner of a temporary file is known to be dead."""
    match = _NAME.fullmatch(name)
    return match is not None and has_ended(match[2])


def has_ended(owner: str) -> bool:
    """Return whether a process, by what ``owner`` returned in it, is known to have ended; nobody knows of another
    host's.
    """
    match, running = _OWNER.fullmatch(owner), boot()
    if match is None or running is None:
        return False
    host, booted, namespace, pid, start = match.groups()
    if (host, namespace) != (_digest(socket.gethostname()), _pid_namespace()):
        return False
    return booted != _digest(running) or not lives(int(pid), start)


def owner() -> str:
    """Return who writes, for names; where the system does not tell all of it, nobody else knows when that has ended."""
    pid = os.getpid()
    booted, start = boot_and_start(pid) or ("", "unknown")
    return f"{_digest(socket.gethostname())}-{_digest(booted)}-{_pid_namespace()}-{pid}-{start}"


def _pid_namespace() -> str:
    """Return the number of the namespace in which this process has its number."""
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")  # noqa: PTH115 - it leads to no path
    except OSError:
        return "unknown"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def replace_file(path: Path, parts: Sequence[Any], guard: Callable[[], object] | None = None) -> None:
    """Make ``parts`` (buffers) the content of the file: it is seen whole or not at all.

    ``guard`` is called when all is written and nothing is seen of it yet; where it raises, the file is left as it was.
    Whatever fails, the file is whole: it has its old content, or the new. Raises OSError naming it, FullDiskError where
    the disk is full.
    """
    temporary = _temporary(path)
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[os.write(file, view) :]
            os.fsync(file)
        finally:
            os.close(file)
        if guard is not None:
            guard()
        os.replace(temporary, path)  # noqa: PTH105 - no Path of it
        sync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        if not isinstance(error, OSError):
            raise
        raise _failure(error, path, sum(memoryview(part).nbytes for part in parts)) from error


def make_directory(path: Path) -> None:
    """Create a directory, its parents and their entries, durably. Raises OSError naming it, or FullDiskError.

    The entry of one that is there is made durable, too: who made it may have been killed before. This process does not
    do it again for the latest ones.
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
    _durable[path] = None
    if len(_durable) > _MOST_DURABLE:
        with suppress(StopIteration, KeyError, RuntimeError):  # several threads write
            del _durable[next(iter(_durable))]


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
