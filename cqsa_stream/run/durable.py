"""A run on disk: begun, resumed or started anew, held by one process, and kept through any end of a session."""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from typing import Any

from cqsa_stream.command import Command
from cqsa_stream.engine.job import Job
from cqsa_stream.errors import ArrayError, CqsaError, LockedError, RunStopped
from cqsa_stream.events import Observer
from cqsa_stream.inputs import check_inputs, fingerprints
from cqsa_stream.machine.allocator import returning_freed_memory
from cqsa_stream.observers.log import EventLog
from cqsa_stream.options import Options
from cqsa_stream.run import admission
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.inputs import refuse_changed_inputs, refuse_other_inputs
from cqsa_stream.run.looking import Looking, known, opened_again
from cqsa_stream.run.manifest import Manifest, beside
from cqsa_stream.run.outputs import Results
from cqsa_stream.run.planned import going_on
from cqsa_stream.run.running_out import saying_how_much_disk
from cqsa_stream.run.session import Session, Workplace
from cqsa_stream.run.sharing import Sharing, WorkerNews, sink_of
from cqsa_stream.run.state import State
from cqsa_stream.run.stopping import Stopper
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.storage.claims import Claims, forget

__all__ = ["OnDisk", "compute"]

_log = logging.getLogger(__name__)


Crews = Callable[[RunDirectory, Options], Callable[[Job], None] | None]
"""Returns who does the work of a run where that is not one process; None where it is."""


def alone(_: RunDirectory, __: Options) -> None:
    """One process does the work of a run."""


def compute(command: Command, observers: Sequence[Observer], stop: Stopper, crews: Crews = alone) -> None:
    """Begin the run of the command's target, or resume it, to its end; a finished one is left as it is.

    What is found damaged of a finished run's output is computed again. Raises the errors of errors.py.
    """
    Session(command, OnDisk(command, crews), observers, stop).run()


class OnDisk:
    """A run whose result goes to a target, and whose progress is in a run directory."""

    def __init__(self, command: Command, crews: Crews) -> None:
        assert command.target is not None
        self._command, self._target, self._crews = command, command.target, crews
        self.directory = RunDirectory(self._target.run_dir)
        self._before = State()
        self._damaged: list[tuple[int, int]] = []

    def surroundings(self) -> AbstractContextManager[object]:
        return returning_freed_memory()

    def admit(self, stop: Stopper) -> bool:
        """Refuse what would overwrite or mix; return False where all is there, as far as a time limit let us look."""
        admission.refuse_overlap(self._target, self._command.arrays)
        self._resumes = self.directory.begun and not self._target.fresh
        if not self._resumes:
            admission.refuse_occupied(self._target, self.directory)
            return True
        manifest = self._same_run()
        refuse_other_inputs(self._target, self._command.arrays)
        admission.refuse_strange_places(manifest, self.directory, (self._target.out, self._target.lse))
        check_inputs(self._command.arrays)
        self._prints = fingerprints(self._command.arrays)
        refuse_changed_inputs(manifest, self._prints)
        if not self._is_whole(Results(self.directory, manifest), stop):
            return True
        self.directory.sweep()
        forget(self.directory.path)
        return False

    def hold(self, held: ExitStack) -> tuple[Options, dict[str, Any]]:
        """Hold a run that has begun, and take from its state what the user did not name."""
        if not self._resumes:
            out = self._target.disk(self.directory.begun)
            return self._command.options.of_a_worker(), {"durable": True, "out": out}
        self._hold(self.directory.manifest(), held)
        manifest = self._same_run()  # another may have begun here meanwhile, or gone on with other inputs
        refuse_changed_inputs(manifest, self._prints)
        self._before = self.directory.state(manifest.problem)
        return going_on(manifest, self._before, self._command.options)

    def take(self, plan: Plan, state: State, held: ExitStack) -> Workplace:
        """Write the state, and what the run is where it begins; make ready what it writes to."""
        state = replace(state, rounded_tiles=state.rounded_tiles or self._before.rounded_tiles)
        if self._resumes:
            manifest = self.directory.manifest()
            held.enter_context(saying_how_much_disk(self.directory, manifest, plan))
            self.directory.write_state(state)
            if not all(about["fingerprint"] for about in manifest.inputs.values()):
                self.directory.write_manifest(known(manifest, self._prints))
            looking = None
        else:
            manifest, looking = self._begin(plan, state, held)
        store, results = self.directory.store(manifest), Results(self.directory, manifest)

        def guard() -> None:
            if looking is not None:
                looking.wait()
            self.directory.is_run(manifest)

        store.guard = guard
        store.prepare()
        self.directory.sweep()
        results.prepare()
        for lane, row in {*self._damaged, *results.missing()}:
            where = f"{results.output}: what was written of row chunk {row} of lane {lane}"
            _log.warning("%s is damaged or gone; it is computed again", where)
            store.unfinish(0, lane, row)
        sink = sink_of(results, plan, guard)
        return self._workplace(manifest, state.options, Workplace(sink, store), held)

    def _workplace(self, manifest: Manifest, used: Options, place: Workplace, held: ExitStack) -> Workplace:
        """Return the place with who works there: an engine, one that shares with others, or a crew that we lead."""
        options = self._command.options
        crew = self._crews(self.directory, replace(options, device=options.device or used.device))
        if crew is not None and manifest.shares == 1:
            _log.warning("%s: the run began with 1 share, which one process computes", self.directory.path)
            crew = None
        log = EventLog(self.directory, asdict(used), leads=crew is not None)
        if crew is not None:
            return replace(place, logs=(log,), work=crew)
        if manifest.shares == 1:
            return replace(place, logs=(log,))
        claims = held.enter_context(Claims(self.directory.path, "0"))
        told = EventLog(WorkerNews(self.directory, claims, None, {"device": used.device}), {})
        return replace(place, logs=(log, told), work=Sharing(self.directory, manifest, claims, 0, 1))

    def stopped(self, reason: str, stop: Stopper) -> RunStopped:
        return stop.error(reason)

    def close(self) -> None:
        """Raises CqsaError where somebody took the output away meanwhile."""
        if not Results(self.directory, self.directory.manifest()).exist:
            removed = f"{self._target.out}: the output was removed during the run"
            raise CqsaError(f"{removed}; the same command computes it again")

    def _same_run(self) -> Manifest:
        """Return the manifest of what has begun here. Raises MismatchError where that is another run."""
        manifest = self.directory.manifest()
        admission.refuse_differences(manifest, self.directory, self._command)
        return manifest

    def _is_whole(self, results: Results, stop: Stopper) -> bool:
        """Return whether the run is complete, and nothing of it damaged, as far as a time limit lets us look.

        What is damaged is remembered. Raises RunStopped at a signal.
        """
        if not results.complete:
            return False
        try:
            for lane, row, good in results.checked():
                self._damaged += [] if good else [(lane, row)]
                reason = stop()
                if stop.received is not None:
                    raise RunStopped(f"{reason}: the run is complete, but its output was not checked to the end")
                if reason is not None:
                    _log.warning("%s: complete; the time limit ended the check, verify does it", self.directory.path)
                    break
        except ArrayError:  # what describes the output
            return False
        return not self._damaged

    def _hold(self, manifest: Manifest, held: ExitStack) -> None:
        """Hold the run, and its results, for this process, until the session ends. Raises LockedError."""
        held.enter_context(self.directory.locked())
        held.enter_context(Results(self.directory, manifest).locked())

    def _begin(self, plan: Plan, state: State, held: ExitStack) -> tuple[Manifest, Looking | None]:
        """Look at the inputs, then write what the run is; a device of its own computes while we look.

        Raises LockedError where another process was first.
        """
        arrays = self._command.arrays
        check_inputs(arrays)
        again = None
        if not plan.layout.in_place and plan.shares == 1:  # workers need to know at once
            again = opened_again(arrays, self._target.layout, fill_missing=self._target.fill_missing)
        manifest = self._new_manifest(plan, dict.fromkeys(arrays, "") if again else fingerprints(arrays))
        held.enter_context(saying_how_much_disk(self.directory, manifest, plan))
        self._hold(manifest, held)
        if self._target.fresh or self.directory.disowned:
            self._discard()
        elif self.directory.begun:
            where = self.directory.path
            raise LockedError(f"{where}: another process has just begun this run; the same command resumes it")
        else:
            admission.refuse_occupied(self._target, self.directory)  # another run may have come here meanwhile
        self.directory.begin(manifest, state)
        return manifest, held.enter_context(Looking(again, self.directory, manifest)) if again else None

    def _new_manifest(self, plan: Plan, prints: dict[str, str]) -> Manifest:
        arrays, target = self._command.arrays, self._target
        return Manifest(
            problem=self._command.problem,
            rows=plan.grid.rows,
            columns=plan.grid.columns,
            out_tokens=plan.layout.out_tokens,
            inputs={
                name: {
                    "source": array.source,
                    "beside": beside(array.source, target.run_dir),
                    "fingerprint": prints[name],
                }
                for name, array in arrays.items()
            },
            output=os.path.relpath(target.out, target.run_dir),
            lse=os.path.relpath(target.lse or target.run_dir / "lse.zarr", target.run_dir),
            fill_missing=target.fill_missing,
            layout=target.layout,
            shares=plan.shares,
            chosen=plan.chosen if plan.shares > 1 else None,
        )

    def _discard(self) -> None:
        """Remove an earlier run, and those of its results that the user named: the folders are held, and emptied."""
        living = [worker for worker in self.directory.workers() if worker.lives]
        if living:
            who = ", ".join(f"process {w.said('pid')} on {w.said('host')}" for w in living[:3])
            raise LockedError(f"{self.directory.path}: {who} works in this run; wait for it, or stop it")
        self.directory.disown()
        named = (self._target.out, self._target.lse)
        for path in {path for path in admission.results(self.directory) if path in named and path.is_dir()}:
            for part in path.iterdir():
                shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
        self.directory.discard()
