"""A run on disk as users open it: where it stands, its results, and the check of them."""

import operator
import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts

from cqsa_stream.engine.meter import covered, tokens_done
from cqsa_stream.errors import ArrayError, CqsaError, InputError, MismatchError
from cqsa_stream.events import Figures, Observer
from cqsa_stream.machine.surroundings import undisturbed
from cqsa_stream.observers import checked
from cqsa_stream.planning import Options
from cqsa_stream.run.admission import Target, fingerprints, refuse_changed_inputs, refuse_strange_places
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.run.outputs import damaged_rows, outputs_exist
from cqsa_stream.run.places import local_path
from cqsa_stream.run.session import run_on_disk
from cqsa_stream.run.stopping import Stopper
from cqsa_stream.storage.open import TokenArray, open_array
from cqsa_stream.storage.output import open_output
from cqsa_stream.storage.readers.locations import is_url
from cqsa_stream.verify import Verification, verify_rows

__all__ = ["Run", "open_run"]


def open_run(path: str | os.PathLike[str]) -> "Run":
    """Open a run directory. Raises InputError where it is none."""
    return Run(local_path(path))


class Run:
    """A run on disk, finished or not."""

    def __init__(self, path: Path) -> None:
        self.directory = RunDirectory(path)
        self.manifest: Manifest = self.directory.manifest()
        self._covers: list[dict[int, int | None]] = []
        self._seen_ns: int | None = None  # when the partials had changed last, as they were read

    def status(self, *, durable: bool = True) -> dict[str, Any]:
        """Return where the run stands, by what is on disk, and the last session's figures.

        ``durable=False``: by what is seen on disk, which may be a moment before it survives a power cut; it does not
        burden a run that works, and reads nothing again that has not changed.
        """
        problem, grid = self.manifest.problem, self.manifest.grid
        finished: list[set[int]] = []
        pairs = flops = 0
        for covers in self._stored_covers(durable=durable):
            finished.append({row for row, cover in covers.items() if cover is None})
            for row, cover in covers.items():
                row_pairs, row_flops = covered(problem, grid, row, cover)
                pairs, flops = pairs + row_pairs, flops + row_flops
        rows_total = problem.lanes * grid.rows.filled
        rows_done = sum(map(len, finished))
        sessions = _sessions(self.directory.events())
        last: dict[str, Any] = {**(sessions[-1] if sessions else {}), **_figures(self.directory.session())}
        plan = last.get("plan", {})
        complete = rows_done == rows_total and outputs_exist(self.directory, self.manifest)
        before = sessions[:-1]
        found = {
            "complete": complete,
            "schedule": plan.get("schedule"),
            "chunks": grid.rows.chunks,
            "pairs_done": pairs,
            "pairs_total": grid.pairs * problem.lanes,
            "rows_done": rows_done,
            "rows_total": rows_total,
            "tokens_done": tokens_done(problem, grid, finished),
            "elapsed_s": sum(s["session_s"] for s in before) + last.get("session_s", 0.0),
            "session_s": last.get("session_s", 0.0),
            "eta_s": 0.0 if complete else _eta(problem.flops - flops, last),
            "flops_done": flops,
            "bytes_read": sum(s["bytes_read"] for s in before) + last.get("bytes_read", 0),
            "bytes_written": sum(s["bytes_written"] for s in before) + last.get("bytes_written", 0),
            "device_peak_bytes": max([last.get("device_peak_bytes", 0), *(s["device_peak_bytes"] for s in sessions)]),
            "host_peak_bytes": max([last.get("host_peak_bytes", 0), *(s["host_peak_bytes"] for s in sessions)]),
            "device_projected_bytes": plan.get("device_projected_bytes"),
            "host_projected_bytes": plan.get("host_projected_bytes"),
            **{
                name: max([last.get(name, 0), *(s[name] for s in sessions)])
                for name in ("device_reserved_bytes", "device_driver_peak_bytes")
            },
            "sessions": len(sessions),
            "pid": self.directory.live_pid(),
        }
        predicted = ("seconds", "bytes_read", "bytes_written", "host_projected_bytes", "device_projected_bytes")
        measured = ("elapsed_s", "bytes_read", "bytes_written", "host_peak_bytes", "device_peak_bytes")
        names = ("seconds", "bytes_read", "bytes_written", "host_bytes", "device_bytes")
        found["predicted"] = (
            {n: plan[key] if _is_figure(plan.get(key)) else 0 for n, key in zip(names, predicted, strict=True)}
            if plan
            else None
        )
        found["measured"] = {name: found[key] for name, key in zip(names, measured, strict=True)}
        return found

    def _stored_covers(self, *, durable: bool) -> list[dict[int, int | None]]:
        """Return the covers of the stored partials; those read before, where nothing was renamed since."""
        store = self.directory.store(self.manifest)
        try:
            changed_ns = store.directory.stat().st_mtime_ns
        except FileNotFoundError:
            changed_ns = 0
        if durable or changed_ns != self._seen_ns:
            settled = time.time_ns() - changed_ns > 10**9  # clocks of file systems are coarse
            self._covers, self._seen_ns = store.covers(), changed_ns if settled else None
        if durable:
            store.make_durable()
        return self._covers

    def resume(
        self, observers: Sequence[Observer] = (), max_seconds: float | None = None, *, fetch: bool = False
    ) -> "Run":
        """Go on to the end, as the last session did. Raises as ``attention`` does.

        Inputs that the run directory says are at a URL are fetched only where ``fetch`` is set: anybody may have
        written it.
        """
        options, observers = Options(max_seconds=max_seconds), checked(observers)
        stop = Stopper((signal.SIGINT,), max_seconds)
        refuse_strange_places(self.manifest, self.directory, ())
        out, lse = self.directory.output_path(self.manifest), self.directory.lse_path(self.manifest)
        layout, fill = self.manifest.layout, self.manifest.fill_missing
        target = Target(out, self.directory.path, lse, fill_missing=fill, layout=layout)
        with undisturbed():
            inputs = self._inputs(fetch=fetch)
        run_on_disk(self.manifest.problem, inputs, options, target, observers, stop)
        stop.pass_on()
        return self

    @undisturbed()
    def verify(self, rows: int = 256, seed: int = 0, *, fetch: bool = False) -> Verification:
        """Compare every finished row with the checksum of what was written, and sampled ones with float64.

        ``fetch`` as for ``resume``. Raises InputError where no row is finished, MismatchError where the inputs are not
        those of the run, CqsaError where the output cannot be read.
        """
        try:
            rows, seed = operator.index(rows), operator.index(seed)
        except TypeError as error:
            raise InputError(f"rows {rows!r}, seed {seed!r}; expected whole numbers") from error
        if rows < 1:
            raise InputError(f"rows {rows}; expected at least 1")
        problem, store = self.manifest.problem, self.directory.store(self.manifest)
        finished = [{row for row, cover in covers.items() if cover is None} for covers in store.covers()]
        if not any(finished):
            raise InputError(f"{self.directory.path}: no row is finished yet; resume the run first")
        inputs = self._inputs(fetch=fetch)
        try:
            damaged = sum(not good for _, _, good in damaged_rows(self.directory, self.manifest))
            out, lse = open_array(self.directory.output_path(self.manifest)), self.lse()
        except ArrayError as error:
            raise CqsaError(f"the output of the run cannot be read: {error}; run the same command again") from error
        on_cuda = any("cuda" in str(event.get("options")) for event in self.directory.events())
        return verify_rows(
            problem,
            inputs,
            out,
            lambda batch, head, row: float(lse[batch, head, row].read().result()),
            finished,
            self.manifest.rows,
            rows,
            seed,
            rounded_tiles=on_cuda and problem.dtype != "float32",
            damaged=damaged,
        )

    def output(self) -> ts.TensorStore:
        """Return the output array ``[batch, head, token, feature]``, opened for reading."""
        return open_output(self.directory.output_path(self.manifest))

    def lse(self) -> ts.TensorStore:
        """Return the log-sum-exp ``[batch, head, token]``, float32, opened for reading."""
        return open_output(self.directory.lse_path(self.manifest))

    def _inputs(self, *, fetch: bool) -> dict[str, TokenArray]:
        """Open the arrays that the run began with, where they were or beside the run.

        Raises ArrayError where they are not there, MismatchError where others are.
        """
        places = {name: self._places(name, fetch=fetch) for name in ("query", "key", "value")}
        return {name: self._input(name, found) for name, found in places.items()}

    def _input(self, name: str, places: list[str]) -> TokenArray:
        refused: Exception | None = None
        for place in dict.fromkeys(places):
            try:
                array = open_array(place, fill_missing=self.manifest.fill_missing, layout=self.manifest.layout)
                refuse_changed_inputs(self.manifest, fingerprints({name: array}))
            except ArrayError as error:
                refused = refused or ArrayError(f"{name}: {error}")
            except MismatchError as error:
                refused = error
            else:
                return array
        assert refused is not None
        raise refused

    def _places(self, name: str, *, fetch: bool) -> list[str]:
        """Return where an input may be. Raises InputError where it cannot be opened by a name, or is not to be."""
        about = self.manifest.inputs[name]
        source = about["source"]
        if source == "memory":
            raise InputError("the run's inputs were in memory: call attention with the same tensors and out path")
        if is_url(source) and source.endswith("?"):
            raise InputError(
                f"{name}: {source}: the rest of the URL was not kept; name the inputs, with the same command"
            )
        if is_url(source) and not fetch:
            raise InputError(
                f"{name}: {source} is fetched only where you say so, since anybody may have written this run "
                "directory: take --fetch, or fetch=True; or name the inputs, with the same command"
            )
        nearby = os.path.normpath(self.directory.path / about["beside"]) if about["beside"] else source
        return [source, nearby]


def _sessions(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each session, its plan and the latest figures it logged."""
    sessions: list[dict[str, Any]] = []
    for event in events:
        if event.get("event") == "started":
            sessions.append({**dict.fromkeys(Figures.__dataclass_fields__, 0), "plan": _plan(event)})
        if sessions:
            sessions[-1].update(_figures(event))
    return sessions


def _figures(found: dict[str, Any]) -> dict[str, float]:
    """Return those of a file's words that are figures of a run."""
    return {name: n for name, n in found.items() if name in Figures.__dataclass_fields__ and _is_figure(n)}


def _is_figure(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**62  # not so: NaN, too


def _plan(event: dict[str, Any]) -> dict[str, Any]:
    plan = event.get("plan")
    return {k: v for k, v in plan.items() if _is_figure(v) or type(v) is str} if isinstance(plan, dict) else {}


def _eta(flops_left: int, last: dict[str, Any]) -> float | None:
    if not last.get("session_flops"):
        return None
    return float(flops_left * last["session_s"] / last["session_flops"])
