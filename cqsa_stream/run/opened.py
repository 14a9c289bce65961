"""A run on disk as users open it: where it stands, its results, and the check of them."""

import operator
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tensorstore as ts

from cqsa_stream.command import Command, Target
from cqsa_stream.errors import ArrayError, CqsaError, InputError
from cqsa_stream.events import Observer
from cqsa_stream.machine.places import local_path
from cqsa_stream.machine.surroundings import undisturbed
from cqsa_stream.observers.watching import checked
from cqsa_stream.options import Options
from cqsa_stream.report.story import Story, samples_of
from cqsa_stream.run.admission import refuse_strange_places
from cqsa_stream.run.durable import compute
from cqsa_stream.run.finish import finish_shares
from cqsa_stream.run.inputs import reopen_inputs
from cqsa_stream.run.outputs import Results
from cqsa_stream.run.standing import Standing, run_place
from cqsa_stream.run.status import last_session, last_verification
from cqsa_stream.run.stopping import Stopper
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.output import open_output
from cqsa_stream.verification.found import Verification
from cqsa_stream.verification.verify import verify_rows

__all__ = ["Run", "open_run"]

_ROWS_REPORTED, _KEYS_REPORTED = 64, 2**24


def open_run(path: str | os.PathLike[str]) -> "Run":
    """Open a run by its output, where its directory is ``OUT.run``, or by its directory. Raises InputError."""
    return Run(run_place(path))


class Run(Standing):
    """A run on disk, finished or not."""

    def resume(
        self,
        observers: Sequence[Observer] = (),
        max_seconds: float | str | None = None,
        *,
        fetch: bool = False,
        stop: Stopper | None = None,
    ) -> "Run":
        """Go on to the end, as the last session did. Raises as ``attention`` does.

        Inputs that the run directory says are at a URL are fetched only where ``fetch`` is set: anybody may have
        written it. ``stop`` listens to the signals of our own command.
        """
        options, observers = Options(max_seconds=max_seconds), checked(observers)
        ours, stop = stop is not None, stop or Stopper((signal.SIGINT,))
        manifest = self.manifest
        refuse_strange_places(manifest, self.directory, ())
        out, lse = self.directory.output_path(manifest), self.directory.lse_path(manifest)
        target = Target(out, self.directory.path, lse, fill_missing=manifest.fill_missing, layout=manifest.layout)
        with undisturbed():
            arrays = reopen_inputs(self.directory.path, manifest, fetch=fetch)
        compute(Command(arrays, manifest.problem, options, target), observers, stop)
        if not ours:
            stop.pass_on()
        return self

    @undisturbed()
    def finish(self) -> list[int]:
        """Merge what the shares have completed; return the shares of which something is left to compute.

        Raises LockedError where another process leads the run.
        """
        refuse_strange_places(self.manifest, self.directory, ())
        with self.directory.locked():
            self.directory.sweep()
            return finish_shares(self.directory, self.manifest)

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
        inputs = reopen_inputs(self.directory.path, self.manifest, fetch=fetch)
        try:
            damaged = sum(not good for _, _, good in Results(self.directory, self.manifest).checked())
            out, lse = open_array(self.directory.output_path(self.manifest)), self.lse()
        except ArrayError as error:
            raise CqsaError(f"the output of the run cannot be read: {error}; run the same command again") from error
        found = verify_rows(
            problem,
            inputs,
            out,
            lambda batch, head, row: float(lse[batch, head, row].read().result()),
            finished,
            self.manifest.rows,
            rows,
            seed,
            rounded_tiles=self.directory.state(problem).rounded_tiles,
            damaged=damaged,
        )
        self.directory.append_event({"event": "verified", **asdict(found)})
        return found

    def report(self, out: str | os.PathLike[str] | None = None) -> list[Path]:
        """Write a page about the run, and its pictures as PNGs; return their paths, the page first.

        ``out``: a folder, by default beside the run directory. Inputs of up to 2^24 keys, over all lanes, are read to
        verify some rows, where they are there; of more it tells what ``verify`` found last. Raises InputError without
        matplotlib, and where the folder holds something else.
        """
        try:
            from cqsa_stream.report.page import PAGE, write_report
        except ImportError as error:
            raise InputError(f"report: {error}; install cqsa-stream[plot]") from error
        output = self.directory.output_path(self.manifest)
        folder = output.with_name(f"{output.name}.report") if out is None else local_path(out)
        if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / PAGE).is_file())):
            raise InputError(f"{folder} exists and holds no report; name another folder (out)")
        return write_report(self._story(), folder)

    def _story(self) -> Story:
        """Return what a report tells."""
        started = last_session(self.directory.events())
        device = self.directory.state(self.manifest.problem).options.device
        return Story(
            name=self.directory.output_path(self.manifest).name,
            problem=str(self.manifest.problem),
            made=f"made {time.strftime('%Y-%m-%d %H:%M')}; last computed on {device or 'no device'}",
            status=self.status(durable=False),
            plan=started[0].get("plan") or {} if started else {},
            pairs=self.pairs(64, 64),
            samples=samples_of(started),
            spans=self.directory.timeline(),
            verification=self._verification(),
        )

    def _verification(self) -> dict[str, Any] | str:
        """Return what a report tells about exactness, or why it tells nothing."""
        problem = self.manifest.problem
        if problem.lanes * problem.keys > _KEYS_REPORTED:
            asked = "verify the run, then report again"
            return last_verification(self.directory.events()) or f"not verified: too many keys for a report; {asked}"
        try:
            return asdict(self.verify(rows=_ROWS_REPORTED))
        except CqsaError as error:
            return f"not verified: {error}"

    def output(self) -> ts.TensorStore:
        """Return the output array ``[batch, head, token, feature]``, opened for reading."""
        return open_output(self.directory.output_path(self.manifest))

    def lse(self) -> ts.TensorStore:
        """Return the log-sum-exp ``[batch, head, token]``, float32, opened for reading."""
        return open_output(self.directory.lse_path(self.manifest))
