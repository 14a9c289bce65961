"""Running out of memory or disk: told in our own words, with what to do. Nothing is damaged by either."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from cqsa_stream.errors import CqsaError, FullDiskError, NoMemoryError
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.schedulers.plan import Plan

__all__ = ["saying_how_much_disk", "saying_what_ran_out"]


@contextmanager
def saying_what_ran_out() -> Iterator[None]:
    """Running out of memory becomes an error of its own: nothing is damaged by that."""
    try:
        yield
    except CqsaError:
        raise
    except torch.OutOfMemoryError as error:
        raise NoMemoryError(
            f"the device has no memory left ({error}); the run is intact: take a smaller device_memory"
        ) from error
    except (MemoryError, RuntimeError, OSError) as error:
        if not _ran_out(error):
            raise
        said = str(error).strip().splitlines()
        raise NoMemoryError(
            f"no host memory left ({said[0] if said else 'an allocation failed'}); the run is intact: take a smaller "
            "host_memory, or free some, and run the same command again"
        ) from error


def _ran_out(error: Exception) -> bool:
    """Return whether memory ran out: by the error's kind, but for torch's and Python's own, which have none."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("can't allocate memory", "not enough memory", "can't start new thread")
    return isinstance(error, MemoryError) or (type(error) is RuntimeError and any(w in str(error) for w in words))


@contextmanager
def saying_how_much_disk(directory: RunDirectory, manifest: Manifest, plan: Plan) -> Iterator[None]:
    """Tell, where the disk is full, how much more the run needs to its end."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        output = directory.output_path(manifest)
        used = sum(map(_disk_used, {directory.path, output}))
        more = max(0, plan.footprint.disk_bytes - used)
        full = Path(error.filename) if error.filename else output
        free = shutil.disk_usage(next(p for p in (full, *full.parents) if p.exists())).free
        raise FullDiskError(
            error.errno,
            f"{error.strerror} {full}; to its end the run needs about {more / 2**20:.1f} MiB more, {free / 2**20:.1f} "
            "MiB are free there: make room, and the same command resumes",
        ) from error


def _disk_used(path: Path) -> int:
    used = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):  # a temporary file, a moment ago
                used += os.lstat(Path(folder, name)).st_blocks * 512
    return used
