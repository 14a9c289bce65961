"""Several workers in one run: each claims shares, computes them by itself, and merges what the shares have completed.

A worker takes its own shares first, then what is left, then waits: another may die, and what it held is left again.
When all shares are computed, the rows are there, whoever merged them.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from cqsa_stream.engine.job import Job
from cqsa_stream.engine.loop import Engine
from cqsa_stream.engine.merging import merge_shares
from cqsa_stream.engine.sinks import ZarrSink
from cqsa_stream.errors import CqsaError, RunStopped
from cqsa_stream.events import Span
from cqsa_stream.machine.allocator import returning_freed_memory
from cqsa_stream.observers.log import EventLog
from cqsa_stream.options import Options
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.run.outputs import Results
from cqsa_stream.run.planned import as_begun
from cqsa_stream.run.session import Workplace
from cqsa_stream.run.shares import Left
from cqsa_stream.run.state import State
from cqsa_stream.run.stopping import Stopper
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.schedulers.schedules import make_schedule
from cqsa_stream.schedulers.shares import Share, deal
from cqsa_stream.storage.claims import Claims, Lost, forget
from cqsa_stream.storage.partials import PartialStore

__all__ = ["AtWork", "Sharing", "WorkerNews", "sink_of"]

_FILES_AT_A_TIME = 4  # of a row chunk, which leaves a device of its own whole
_WAIT_S, _LONGEST_WAIT_S = 0.1, 2.0
_PASSES = 3  # over all shares: more than one only where something of them is found damaged
_log = logging.getLogger(__name__)


def sink_of(results: Results, plan: Plan, guard: Callable[[], object]) -> ZarrSink:
    """Return where a session writes finished rows."""
    return results.sink(1 if plan.layout.in_place else _FILES_AT_A_TIME, guard)


@dataclass(frozen=True)
class Sharing:
    """The work of worker number ``worker`` of ``workers``: claims decide which shares it does."""

    directory: RunDirectory
    manifest: Manifest
    claims: Claims
    worker: int
    workers: int

    def __call__(self, job: Job) -> None:
        """Compute shares until the run is complete. Raises RunStopped, or what went wrong."""
        schedule = make_schedule(job.plan.schedule, job.plan.grid, job.plan.layout)
        order = deal(schedule, job.problem.lanes, self.manifest.shares, self.worker, self.workers)
        for _ in range(_PASSES):
            self._compute(job, order)
            merge_shares(job.plan.grid, job.operation, job.store, job.sink)
            self.directory.is_run(self.manifest)
            covers = job.store.covers()
            job.meter.restart(covers)  # what was merged, and what others did
            if job.meter.rows_done == job.meter.rows_total:
                forget(self.directory.path)
                return
            for share in Left(self.manifest, covers).shares():
                self.claims.undo(share)
        raise CqsaError(f"{self.directory.path}: what was computed is found damaged again and again; see the messages")

    def _compute(self, job: Job, order: list[int]) -> None:
        """Compute what can be claimed, until all shares are done."""
        wait_s = _WAIT_S
        while left := [share for share in order if not self.claims.is_done(share)]:
            if (reason := job.stop(0.0)) is not None:
                raise RunStopped(reason)
            self.directory.is_run(self.manifest)
            share = next(filter(self.claims.take, left), None)
            if share is None:
                if not self.claims.there:  # the run is complete
                    return
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
                continue
            wait_s = _WAIT_S
            try:
                self._engine(job, share).run()
            except Lost as lost:
                _log.warning("%s; this worker goes on with others", lost)
            else:
                self.claims.done(share)

    def _engine(self, job: Job, share: int) -> Engine:
        """Return the engine of a share, of which nothing is stored that is not this worker's to store."""
        assert isinstance(job.store, PartialStore)
        store, before = job.store.of(share), job.store.guard

        def guard() -> None:
            before()
            self.claims.check(share)

        store.guard = guard
        store.prepare()
        return Engine(replace(job, store=store, share=Share(share, self.manifest.shares)))


class AtWork:
    """The home of a worker's session: a run that somebody has begun, on shared storage."""

    def __init__(
        self, directory: RunDirectory, manifest: Manifest, options: Options, worker: int, workers: int
    ) -> None:
        self._directory, self._manifest, self._options = directory, manifest, options
        self._worker, self._workers = worker, workers

    def surroundings(self) -> AbstractContextManager[object]:
        return returning_freed_memory()

    def admit(self, _: Stopper) -> bool:
        self._directory.refuse_links()
        if not Results(self._directory, self._manifest).complete:
            return True
        forget(self._directory.path)  # whoever completed it may have been killed before that
        return False

    def hold(self, _: ExitStack) -> tuple[Options, dict[str, Any]]:
        return self._options, {"durable": True, **as_begun(self._manifest, self._options)}

    def take(self, plan: Plan, state: State, held: ExitStack) -> Workplace:
        """Say who we are, and make ready what we write to."""
        claims = held.enter_context(Claims(self._directory.path, f"{self._worker}"))
        results, store = Results(self._directory, self._manifest), self._directory.store(self._manifest)

        def guard() -> None:
            self._directory.is_run(self._manifest)

        guard()  # now that who begins it anew would see us
        store.guard = guard
        store.prepare()
        results.prepare()
        news = WorkerNews(self._directory, claims, self._worker, {"device": state.options.device})
        work = Sharing(self._directory, self._manifest, claims, self._worker, self._workers)
        return Workplace(sink_of(results, plan, guard), store, (EventLog(news, asdict(state.options)),), work)

    def stopped(self, reason: str, stop: Stopper) -> RunStopped:
        return stop.error(reason)

    def close(self) -> None:
        """Raises CqsaError where somebody took the output away meanwhile."""
        if not Results(self._directory, self._manifest).exist:
            raise CqsaError(f"{self._directory.output_path(self._manifest)}: the output was removed during the run")


@dataclass(frozen=True)
class WorkerNews:
    """Where a worker's events go: what others see of it, and a log of its own; None where the run's log has them."""

    directory: RunDirectory
    claims: Claims
    worker: int | None
    about: dict[str, Any]

    def write_session(self, figures: dict[str, Any]) -> None:
        self.claims.tell({**self.about, **figures})

    def append_event(self, event: dict[str, Any]) -> None:
        if self.worker is not None:
            self.directory.append_event({"worker": self.worker, **event}, self.worker)

    def write_timeline(self, spans: Sequence[Span]) -> None:
        """A timeline is one process's; those of workers are not kept."""
