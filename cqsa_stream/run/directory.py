"""The run directory: all that resuming, checking and reporting need, in formats that anything can read.

run.json        the problem, the grid, the inputs' fingerprints, where the output is; carries its own checksum
run.copy.json   the same again, for when the first is damaged
partials/       one file for each row chunk in progress or finished
lse.zarr        the log-sum-exp of finished rows, unless --lse names another place
results.zarr    a Zarr group of links to output and lse, so that xarray opens both by name
events.jsonl    each session's options, plan, checkpoints and end; every line carries its checksum
session.json    the latest figures of the last session, and the process it runs in
lock            held while a process works in the run
"""

import errno
import io
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import filelock
from crc32c import crc32c

from cqsa_stream.errors import InputError, LockedError
from cqsa_stream.problem import dtype_bytes
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.storage.atomic import (
    is_temporary,
    make_directory,
    open_regular,
    replace_file,
    sweep,
    temporary_name,
)
from cqsa_stream.storage.partials import PartialStore
from cqsa_stream.storage.processes import boot_and_start
from cqsa_stream.storage.retrying import retrying

__all__ = ["RunDirectory"]

_MANIFEST, _COPY = "run.json", "run.copy.json"
_OURS = (_MANIFEST, _COPY, "partials", "lse.zarr", "results.zarr", "events.jsonl", "session.json", "lock")
_REPLACED = (_MANIFEST, _COPY, "session.json")
_BEFORE_A_RUN = {"lock", "session.json", _COPY, "results.zarr"}
_MOST_JSON_BYTES = 1 << 20
_SILENT_S = 60.0  # after which a process on another machine counts as gone, for who watches
_LOCK_NAMED_S = 1.0  # how long after taking the lock a process may take to say who it is
_log = logging.getLogger(__name__)


class RunDirectory:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path.parent), path.name)

    @property
    def begun(self) -> bool:
        """Whether a manifest is there, or its copy, and more than the beginning of a run."""
        return (self.path / _MANIFEST).exists() or self._has_lost_its_manifest

    @property
    def _has_lost_its_manifest(self) -> bool:
        return (self.path / _COPY).exists() and (self.path / "partials").exists()

    def foreign(self) -> list[str]:
        """Return what stands where a run is to begin, and is not what a killed process left of beginning it."""
        strange = {p.name for p in self.path.iterdir()} - _BEFORE_A_RUN
        return sorted(name for name in strange if not any(is_temporary(name, of) for of in _REPLACED))

    def manifest(self) -> Manifest:
        """Read the manifest, or its copy where it is damaged. Raises InputError where there is none, or no good one."""
        try:
            return self._read_manifest(_MANIFEST)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EINVAL):
                raise InputError(f"{error}: it is a link, or no file; expected a run's own file") from error
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            if not self._has_lost_its_manifest:
                raise InputError(f"{self.path}: no run directory ({_MANIFEST} is missing)") from error
            damage: Exception = error
        except ValueError as error:
            damage = error
        try:
            found = self._read_manifest(_COPY)
        except (ValueError, OSError) as error:
            raise InputError(
                f"{self.path / _MANIFEST}: unreadable ({damage}), and so is {_COPY} ({error}); remove the output, then "
                "start anew with --fresh"
            ) from error
        _tell(f"{self.path / _MANIFEST}: damaged ({damage}); its copy is taken")
        return found

    def _read_manifest(self, name: str) -> Manifest:
        data = _content(self.path / name)
        if len(data) > _MOST_JSON_BYTES:
            raise ValueError(f"over {_MOST_JSON_BYTES} bytes")
        return Manifest.from_json(data)

    def begin(self, manifest: Manifest) -> None:
        """Write the manifest, durably; before it the group by which others find the results."""
        group = self.path / "results.zarr"
        group.mkdir(exist_ok=True)
        for name, place in (("output", self.output_path(manifest)), ("lse", self.lse_path(manifest))):
            (group / name).unlink(missing_ok=True)
            (group / name).symlink_to(os.path.relpath(place, group))
        replace_file(group / "zarr.json", [json.dumps({"zarr_format": 3, "node_type": "group"}).encode()])
        self.restore(manifest)

    def sweep(self) -> None:
        """Remove what killed processes were writing here; the store of partials and the output sweep themselves."""
        sweep(self.path)
        if not (self.path / "results.zarr").is_symlink():
            sweep(self.path / "results.zarr")

    def restore(self, manifest: Manifest) -> None:
        """Write the manifest and its copy wherever they are not whole."""
        for name in self.damaged_manifests(manifest):
            replace_file(self.path / name, [manifest.to_json()])

    def damaged_manifests(self, manifest: Manifest) -> list[str]:
        """Return the names of the manifest and its copy, as far as they are not whole."""
        return [name for name in (_COPY, _MANIFEST) if not self._says(name, manifest)]

    def _says(self, name: str, manifest: Manifest) -> bool:
        try:
            return self._read_manifest(name) == manifest
        except (OSError, ValueError):
            return False

    def output_path(self, manifest: Manifest) -> Path:
        return Path(os.path.normpath(self.path / manifest.output))

    def lse_path(self, manifest: Manifest) -> Path:
        return Path(os.path.normpath(self.path / manifest.lse))

    def store(self, manifest: Manifest) -> PartialStore:
        """Return the store of partials."""
        problem, rows, grid = manifest.problem, manifest.rows, manifest.grid

        def elements(row: int) -> tuple[int, int]:
            numbers = problem.group * len(rows.span(row))
            return numbers, numbers * problem.value_dim

        return PartialStore(
            self.path / "partials",
            manifest.run_hash,
            (problem.lanes, rows.chunks, manifest.columns.chunks),
            elements,
            grid.complete_cover,
            dtype_bytes(problem.partial_dtype),
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the system lets go of it when the process ends.

        Raises LockedError, and InputError where a part of the directory is a link that leads out of it.
        """
        make_directory(self.path)
        for name in _OURS:
            if (self.path / name).is_symlink():
                raise InputError(f"{self.path / name} is a link; expected a run's own file: put it here, or remove it")
        lock = filelock.FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise LockedError(f"{self.path}: {self._holder()} works in this run; wait for it, or stop it") from error
        try:
            self.write_session({"ended": False})
            yield
        finally:
            self.write_session({**self.session(), "ended": True})
            lock.release()

    def _holder(self) -> str:
        """Return who holds the lock, by its own word, which it gives a moment after taking it."""
        deadline = time.monotonic() + _LOCK_NAMED_S
        while self.live_pid() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        holder = self.session()
        return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"

    def session(self) -> dict[str, Any]:
        """Return the latest figures of the last session; empty where there is none."""
        try:
            found = json.loads(_content(self.path / "session.json"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_session(self, figures: dict[str, Any]) -> None:
        """Replace the latest figures; not fsynced, and let be where it fails: they are news, not state."""
        me = os.getpid()
        fields = {"pid": me, "process": _process(me), "host": socket.gethostname(), **figures}
        temporary = temporary_name(self.path / "session.json")
        with suppress(OSError):
            try:
                with temporary.open("x") as file:  # a new file, not what a link of this name leads to
                    file.write(json.dumps(fields))
                temporary.replace(self.path / "session.json")
            finally:
                temporary.unlink(missing_ok=True)

    def live_pid(self) -> int | None:
        """Return the process that works in the run, if it lives on this machine."""
        session = self.session()
        pid, process = session.get("pid"), session.get("process")
        if session.get("ended") or session.get("host") != socket.gethostname() or type(pid) is not int:
            return None
        return pid if process is not None and process == _process(pid) else None

    def at_work(self) -> bool:
        """Return whether a process works in the run: on this machine, or on another that told so a minute ago."""
        session = self.session()
        if session.get("ended") or session.get("host") in (None, socket.gethostname()):
            return self.live_pid() is not None
        try:
            return time.time() - (self.path / "session.json").stat().st_mtime < _SILENT_S
        except OSError:
            return False

    def append_event(self, event: dict[str, Any]) -> None:
        """Append one line to the event log, durably; a full disk or a failing one does not end a run for it."""
        with suppress(OSError), (self.path / "events.jsonl").open("ab") as file:
            torn = b"" if self._log_ends_well() else b"\n"
            body = json.dumps({"time": time.time(), **event})
            file.write(torn + f'{body[:-1]}, "crc32c": {crc32c(body.encode())}}}\n'.encode())
            file.flush()
            os.fsync(file.fileno())

    def _log_ends_well(self) -> bool:
        with (self.path / "events.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return file.read(1) in (b"", b"\n")

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the event log; lines that a crash cut short, or that are damaged, are left out."""
        try:
            with io.BufferedReader(open_regular(self.path / "events.jsonl")) as file:
                while line := file.readline(_MOST_JSON_BYTES):
                    event = _checked_event(line)
                    if event is not None:
                        yield event
        except OSError:
            return


@retrying
def _content(path: Path) -> bytes:
    """Return what a file holds, as far as it may be long; one byte more tells that it is longer. Raises OSError."""
    try:
        with io.BufferedReader(open_regular(path)) as file:
            return file.read(_MOST_JSON_BYTES + 1)
    except OSError as error:
        raise OSError(error.errno, f"reading failed: {error.strerror}", str(path)) from error


@cache
def _tell(message: str) -> None:
    """Say it once in a process, however often it is seen."""
    _log.warning("%s", message)


def _checked_event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
        if not isinstance(event, dict):
            return None
        checksum = event.pop("crc32c", None)
        return event if checksum == crc32c(json.dumps(event).encode()) else None
    except (ValueError, RecursionError):
        return None


def _process(pid: int) -> str | None:
    """Return what tells a process from others that have or had its number: boot, and start within it; None if gone."""
    found = boot_and_start(pid)
    return found and " ".join(found)
