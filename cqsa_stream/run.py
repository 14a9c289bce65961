"""The run directory: all that resuming, checking and reporting need, in formats that anything can read.

run.json        the problem, the grid, the inputs' fingerprints, where the output is; carries its own checksum
partials/       one file for each row chunk in progress or finished
lse.zarr        the log-sum-exp of finished rows, unless --lse names another place
results.zarr    a Zarr group of links to output and lse, so that xarray opens both by name
events.jsonl    each session's options, plan, checkpoints and end
session.json    the latest figures of the last session, and the process it runs in
lock            held while a process works in the run
"""

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import psutil

from cqsa_stream.errors import InputError, LockedError
from cqsa_stream.problem import DTYPES, OUT_DTYPES, Problem, dtype_bytes
from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.storage.atomic import make_directory, replace_file
from cqsa_stream.storage.partials import PartialStore

__all__ = ["Manifest", "RunDirectory"]

_FORMAT = 1
_MOST_CHUNKS = 1 << 24


@dataclass(frozen=True)
class Manifest:
    """What a run is. ``inputs``: source and fingerprint of each; ``out_tokens``: tokens of one stored output chunk."""

    problem: Problem
    rows: Axis
    columns: Axis
    out_tokens: int
    inputs: dict[str, dict[str, str]]
    output: str
    lse: str
    fill_missing: bool

    @property
    def grid(self) -> Grid:
        return Grid.of(self.rows, self.columns, self.problem.mask.keys_seen, self.problem.same_positions)

    @property
    def run_hash(self) -> bytes:
        """The hash of problem and grid, which every stored partial carries."""
        identity = {"problem": self.problem.to_dict(), "rows": asdict(self.rows), "columns": asdict(self.columns)}
        return hashlib.sha256(_canonical(identity)).digest()

    def to_json(self) -> bytes:
        fields = {"format": _FORMAT, **asdict(self)}
        fields["sha256"] = hashlib.sha256(_canonical(fields)).hexdigest()
        return json.dumps(fields, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Raises ValueError where this is not what ``to_json`` wrote."""
        fields = json.loads(data)
        if not isinstance(fields, dict) or fields.pop("format", None) != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}")
        checksum = fields.pop("sha256", None)
        if checksum != hashlib.sha256(_canonical({"format": _FORMAT, **fields})).hexdigest():
            raise ValueError("it fails its checksum")
        problem, rows, columns = Problem.from_dict(fields["problem"]), Axis(**fields["rows"]), Axis(**fields["columns"])
        if problem.dtype not in DTYPES or problem.out_dtype not in OUT_DTYPES:
            raise ValueError(f"dtype {problem.dtype!r}, output {problem.out_dtype!r}")
        for axis, tokens in ((rows, problem.queries), (columns, problem.keys)):
            if axis.tokens != tokens or not 0 < axis.chunks <= _MOST_CHUNKS or axis.chunk_tokens * axis.chunks < tokens:
                raise ValueError(f"a grid {axis} for {tokens} tokens")
        return cls(**{**fields, "problem": problem, "rows": rows, "columns": columns})


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


class RunDirectory:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def begun(self) -> bool:
        """Whether a manifest is there."""
        return (self.path / "run.json").exists()

    def manifest(self) -> Manifest:
        """Read the manifest. Raises InputError where there is none or it is damaged."""
        path = self.path / "run.json"
        try:
            return Manifest.from_json(path.read_bytes())
        except FileNotFoundError as error:
            raise InputError(f"{self.path}: no run directory (run.json is missing)") from error
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(f"{path}: unreadable ({error}); start anew with --fresh") from error

    def begin(self, manifest: Manifest) -> None:
        """Write the manifest, durably; before it the group by which others find the results."""
        group = self.path / "results.zarr"
        group.mkdir(exist_ok=True)
        for name, place in (("output", self.output_path(manifest)), ("lse", self.lse_path(manifest))):
            (group / name).unlink(missing_ok=True)
            (group / name).symlink_to(os.path.relpath(place, group))
        replace_file(group / "zarr.json", [json.dumps({"zarr_format": 3, "node_type": "group"}).encode()])
        replace_file(self.path / "run.json", [manifest.to_json()])

    def output_path(self, manifest: Manifest) -> Path:
        return Path(os.path.normpath(self.path / manifest.output))

    def lse_path(self, manifest: Manifest) -> Path:
        return Path(os.path.normpath(self.path / manifest.lse))

    def store(self, manifest: Manifest) -> PartialStore:
        """Return the store of partials."""
        problem, rows = manifest.problem, manifest.rows
        elements = [
            (problem.group * len(rows.span(a)), problem.group * len(rows.span(a)) * problem.value_dim)
            for a in range(rows.chunks)
        ]
        itemsize = dtype_bytes(problem.partial_dtype)
        return PartialStore(self.path / "partials", manifest.run_hash, elements, manifest.columns.chunks, itemsize)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the system lets go of it when the process ends. Raises LockedError."""
        make_directory(self.path)
        lock = filelock.FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            holder = self.session()
            raise LockedError(
                f"{self.path}: process {holder.get('pid', '?')} on {holder.get('host', '?')} works in this run; wait "
                "for it, or stop it"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def session(self) -> dict[str, Any]:
        """Return the latest figures of the last session; empty where there is none."""
        try:
            found = json.loads((self.path / "session.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_session(self, figures: dict[str, Any]) -> None:
        """Replace the latest figures; not fsynced: they are news, not state."""
        me = psutil.Process()
        fields = {"pid": me.pid, "process_started": me.create_time(), "host": socket.gethostname(), **figures}
        temporary = self.path / "session.json.new"
        temporary.write_text(json.dumps(fields))
        temporary.replace(self.path / "session.json")

    def live_pid(self) -> int | None:
        """Return the process that works in the run, if it lives on this machine."""
        session = self.session()
        pid, started = session.get("pid"), session.get("process_started")
        if session.get("ended") or session.get("host") != socket.gethostname() or type(pid) is not int:
            return None
        try:
            alive = abs(psutil.Process(pid).create_time() - float(started or 0)) < 1
        except (psutil.Error, TypeError, ValueError):
            return None
        return pid if alive else None

    def append_event(self, event: dict[str, Any]) -> None:
        """Append one line to the event log, durably."""
        with (self.path / "events.jsonl").open("ab") as file:
            torn = b"" if self._log_ends_well() else b"\n"
            file.write(torn + json.dumps({"time": time.time(), **event}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _log_ends_well(self) -> bool:
        with (self.path / "events.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return file.read(1) in (b"", b"\n")

    def events(self) -> list[dict[str, Any]]:
        """Return the event log; a last line that a crash cut short is left out."""
        try:
            lines = (self.path / "events.jsonl").read_bytes().splitlines()
        except OSError:
            return []
        events = []
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                events.append(event)
        return events
