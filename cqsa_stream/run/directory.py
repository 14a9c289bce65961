"""The run directory: all that resuming, checking and reporting need, in formats that anything can read.

run.json        the problem, the grid, the inputs' fingerprints, where the output is; carries its own checksum
state.json      what the next session needs: options as used, the plan's choice; carries its own checksum
arrays/         what of the mask is too long for run.json: .npy files, each named by its SHA-256
partials/       one file for each row chunk in progress or finished
lse.zarr        the log-sum-exp of finished rows, unless the user names another place
results.zarr    a Zarr group of links to output and lse, so that xarray opens both by name
events.jsonl    each session's options, plan, checkpoints and end
session.json    the latest figures of the last session, and the process it runs in
timeline.json   what the threads and the device of the last session did when, as far as its spans were kept
events-N.jsonl  the same of worker number N, where several work in the run
claims/         which worker computes which share, while several work in the run
workers/        the latest figures of each worker, and the process that it is
lock            held by a process that works in the run alone, or leads its workers
"""

import errno
import io
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from cqsa_stream.errors import InputError, LockedError
from cqsa_stream.events import Span
from cqsa_stream.operations.sums import forward_sums
from cqsa_stream.problem import Problem
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.storage.atomic import (
    is_temporary,
    make_directory,
    open_regular,
    replace_file,
    sweep,
    sync_directory,
    temporary_name,
)
from cqsa_stream.storage.claims import SILENT_S, Worker, age_s, workers
from cqsa_stream.storage.partials import PartialStore, SumFiles
from cqsa_stream.storage.processes import boot_and_start
from cqsa_stream.storage.retrying import retrying

if TYPE_CHECKING:
    from cqsa_stream.run.state import State

__all__ = ["RunDirectory"]

_MANIFEST, _STATE, _SESSION, _EVENTS = "run.json", "state.json", "session.json", "events.jsonl"
_TIMELINE = "timeline.json"
_FILES = (_MANIFEST, _STATE, _SESSION, _EVENTS, _TIMELINE)
_FOLDERS = ("partials", "lse.zarr", "results.zarr", "arrays", "claims", "workers")
_BEFORE_A_RUN = {"lock", _SESSION, _STATE, "results.zarr", "arrays"}
_DISCARDED = "run.json.discarded"  # the manifest of a run that is being removed
_MOST_JSON_BYTES, _MOST_TIMELINE_BYTES, _MOST_ARRAY_BYTES = 1 << 20, 1 << 24, 1 << 30
_LOCK_NAMED_S = 1.0  # how long after taking the lock a process may take to say who it is
_log = logging.getLogger(__name__)


class RunDirectory:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path.parent), path.name)

    @property
    def begun(self) -> bool:
        """Whether a manifest is there, and more than the beginning of a run."""
        return (self.path / _MANIFEST).exists()

    def foreign(self) -> list[str]:
        """Return what stands where a run is to begin, and is not what a killed process left of beginning it."""
        if self.disowned:  # what it has not yet removed is ours
            return []
        strange = {p.name for p in self.path.iterdir()} - _BEFORE_A_RUN
        return sorted(name for name in strange if not any(is_temporary(name, of) for of in _FILES))

    def manifest(self, *, discarded: bool = False) -> Manifest:
        """Read the manifest, or that of a run that is being removed. Raises InputError where there is none, or no good
        one: without it nothing is resumed.
        """
        path = self.path / (_DISCARDED if discarded else _MANIFEST)
        try:
            return Manifest.from_json(_content(path), self._array)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EINVAL):
                raise InputError(f"{error}: it is a link, or no file; expected a run's own file") from error
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            raise InputError(
                f"{self.path}: no run directory ({_MANIFEST} is missing); name one, or an output that has its OUT.run "
                "beside it"
            ) from error
        except ValueError as error:
            raise InputError(
                f"{path}: unreadable ({error}); nothing can be resumed without it: put a copy of it back, or remove "
                "the output and start anew with fresh=True"
            ) from error

    def _array(self, name: str) -> bytes:
        """Return the file of an array. Raises ValueError where it is not there."""
        path = self.path / "arrays" / f"{name}.npy"
        try:
            return _content(path, _MOST_ARRAY_BYTES)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error

    def state(self, problem: Problem) -> "State":
        """Read what the last session left for the next; where that is missing or damaged, warn: nothing is known."""
        from cqsa_stream.run.state import State  # options know devices: a status would wait for torch

        try:
            return State.from_json(_content(self.path / _STATE))
        except (OSError, ValueError) as error:
            _log.warning("%s: damaged or missing (%s); the run is planned anew", self.path / _STATE, error)
            return State.unknown(problem)

    def write_state(self, state: "State") -> None:
        """Replace the state, durably."""
        replace_file(self.path / _STATE, [state.to_json()])

    def begin(self, manifest: Manifest, state: "State") -> None:
        """Write the manifest, durably; before it the state, and the group by which others find the results."""
        group = self.path / "results.zarr"
        group.mkdir(exist_ok=True)
        for name, place in (("output", self.output_path(manifest)), ("lse", self.lse_path(manifest))):
            (group / name).unlink(missing_ok=True)
            (group / name).symlink_to(os.path.relpath(place, group))
        replace_file(group / "zarr.json", [json.dumps({"zarr_format": 3, "node_type": "group"}).encode()])
        for name, content in manifest.arrays.items():
            make_directory(self.path / "arrays")
            replace_file(self.path / "arrays" / f"{name}.npy", [content])
        self.write_state(state)
        self.write_manifest(manifest)

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest, durably."""
        replace_file(self.path / _MANIFEST, [manifest.to_json()])

    def is_run(self, manifest: Manifest) -> None:
        """Raise LockedError where the run is not that of the manifest any more: it was begun anew meanwhile."""
        try:
            same = manifest.id.encode() in _content(self.path / _MANIFEST)
        except (OSError, ValueError):
            same = False
        if not same:
            raise LockedError(f"{self.path}: the run was begun anew meanwhile; what this process computed is discarded")

    @property
    def disowned(self) -> bool:
        """Whether a run was being removed here when its process ended."""
        return (self.path / _DISCARDED).exists()

    def disown(self) -> None:
        """Begin to remove a run: from now on no process that knew it stores anything."""
        if self.begun:
            (self.path / _MANIFEST).replace(self.path / _DISCARDED)
            sync_directory(self.path)

    def discard(self) -> None:
        """Remove what a disowned run keeps here, but for the lock."""
        for path in (self.path / name for name in _FOLDERS):
            if path.exists():
                shutil.rmtree(path)
        for path in (*(self.path / name for name in _FILES), *self._logs()):
            path.unlink(missing_ok=True)
        (self.path / _DISCARDED).unlink(missing_ok=True)  # the last: without it, the rest is foreign

    def _logs(self) -> list[Path]:
        """Return the event logs: the run's own, and those of its workers."""
        return sorted(self.path.glob("events*.jsonl"))

    def sweep(self) -> None:
        """Remove what killed processes were writing here; the store of partials and the output sweep themselves."""
        sweep(self.path)
        for name in ("claims", "workers"):
            sweep(self.path / name)
        if (self.path / "arrays").is_dir():
            sweep(self.path / "arrays")
        if not (self.path / "results.zarr").is_symlink():
            sweep(self.path / "results.zarr")

    def output_path(self, manifest: Manifest) -> Path:
        return Path(os.path.normpath(self.path / manifest.output))

    def lse_path(self, manifest: Manifest) -> Path:
        return Path(os.path.normpath(self.path / manifest.lse))

    def store(self, manifest: Manifest) -> PartialStore:
        """Return the store of partials."""
        rows, [by_rows] = manifest.rows, forward_sums(manifest.problem)

        def field_bytes(row: int) -> tuple[int, ...]:
            return tuple(field.numbers * field.itemsize * len(rows.span(row)) for field in by_rows.fields)

        files = SumFiles(rows.filled, manifest.columns.chunks, field_bytes, manifest.grid.complete_cover)
        return PartialStore(self.path / "partials", manifest.run_hash, manifest.problem.lanes, [files])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the system lets go of it when the process ends.

        Raises LockedError, and InputError where a part of the directory is a link that leads out of it.
        """
        make_directory(self.path)
        self.refuse_links()
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

    def refuse_links(self) -> None:
        """Raise InputError where a part of the directory is a link."""
        for name in (*_FILES, *_FOLDERS, "lock"):
            if (self.path / name).is_symlink():
                raise InputError(f"{self.path / name} is a link; expected a run's own file: put it here, or remove it")

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
            return _object(_content(self.path / _SESSION))
        except (OSError, ValueError):
            return {}

    def write_session(self, figures: dict[str, Any]) -> None:
        """Replace the latest figures; not fsynced, and let be where it fails: they are news, not state."""
        me = os.getpid()
        self._write_news(_SESSION, {"pid": me, "process": _process(me), "host": socket.gethostname(), **figures})

    def write_timeline(self, spans: Sequence[Span]) -> None:
        """Replace the spans of the last session; news, too."""
        lists = [[s.kind, s.where, round(s.start_s, 6), round(s.stop_s, 6), s.about] for s in spans]
        self._write_news(_TIMELINE, {"fields": ["kind", "where", "start_s", "stop_s", "about"], "spans": lists})

    def timeline(self) -> list[Span]:
        """Return the spans of the last session; empty where they are not there, or no spans."""
        try:
            spans = json.loads(_content(self.path / _TIMELINE, _MOST_TIMELINE_BYTES))["spans"]
            found = [Span(str(k), str(w), float(start), float(stop), str(about)) for k, w, start, stop, about in spans]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return []
        return [span for span in found if 0 <= span.start_s <= span.stop_s < math.inf]

    def _write_news(self, name: str, content: dict[str, Any]) -> None:
        temporary = temporary_name(self.path / name)
        with suppress(OSError):
            try:
                with temporary.open("x") as file:  # a new file, not what a link of this name leads to
                    file.write(json.dumps(content))
                temporary.replace(self.path / name)
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
        if any(worker.lives for worker in self.workers()):
            return True
        session = self.session()
        if session.get("ended") or session.get("host") in (None, socket.gethostname()):
            return self.live_pid() is not None
        try:
            return age_s(self.path, (self.path / _SESSION).stat().st_mtime) < SILENT_S
        except OSError:
            return False

    def workers(self) -> list[Worker]:
        """Return the workers of the run that are, or were and left their files."""
        return workers(self.path)

    def append_event(self, event: dict[str, Any], worker: int | None = None) -> None:
        """Append one line to the event log, durably; a full disk or a failing one does not end a run for it."""
        name = _EVENTS if worker is None else f"events-{worker}.jsonl"
        with suppress(OSError), (self.path / name).open("ab") as file:
            apart = b"\n" if file.tell() else b""  # before it: what a crash cut short ends there
            file.write(apart + json.dumps({"time": time.time(), **event}).encode())
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the event logs; lines that are no JSON object, as those that a crash cut short, are left out."""
        for path in self._logs():
            with suppress(OSError), io.BufferedReader(open_regular(path)) as file:
                while line := file.readline(_MOST_JSON_BYTES):
                    event = _object(line)
                    if event:
                        yield event


@retrying
def _content(path: Path, most: int = _MOST_JSON_BYTES) -> bytes:
    """Return what a file holds. Raises OSError, and ValueError where it is longer than any of a run's own may be."""
    try:
        with io.BufferedReader(open_regular(path)) as file:
            found = file.read(most + 1)
    except OSError as error:
        raise OSError(error.errno, f"reading failed: {error.strerror}", str(path)) from error
    if len(found) > most:
        raise ValueError(f"over {most} bytes")
    return found


def _object(data: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one where the data are none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _process(pid: int) -> str | None:
    """Return what tells a process from others that have or had its number: boot, and start within it; None if gone."""
    found = boot_and_start(pid)
    return found and " ".join(found)
