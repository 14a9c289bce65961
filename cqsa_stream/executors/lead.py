"""Leading workers, whoever has placed them: telling how far they are, stopping them, saying how it ended."""

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from cqsa_stream.engine.job import Job
from cqsa_stream.errors import CqsaError, RunStopped
from cqsa_stream.events import Progressed
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.status import is_figure, sessions_of
from cqsa_stream.storage.claims import forget

__all__ = ["Crew", "lead", "say_who_ended"]

_LOOK_S, _TELL_S = 0.1, 1.0
_log = logging.getLogger(__name__)


class Crew(Protocol):
    """Workers that have been started."""

    @property
    def codes(self) -> Sequence[int]:
        """The exit codes of those that have ended, negative where a signal killed one."""

    def look(self, seconds: float) -> bool:
        """Wait so long; note who has ended, and tell of those that should not have; return whether to wait on."""

    def stop(self) -> None:
        """Ask all to stop at their next safe points."""


def lead(directory: RunDirectory, job: Job, crew: Crew) -> None:
    """Wait for workers to complete the run. Raises RunStopped where that is asked, CqsaError where none is left."""
    telling, reason = _Telling(directory, job), None
    while crew.look(_LOOK_S):
        if reason is None and (reason := job.stop(0.0)) is not None:
            crew.stop()
        telling.now_and_then()
    if telling.end():
        forget(directory.path)
        return
    if reason is not None:
        raise RunStopped(reason)
    where = f"{directory.path}: no worker is left, and the run is not complete"
    error = CqsaError(f"{where}; the same command resumes it")
    error.exit_code = max((code for code in crew.codes if code > 0), default=1)
    raise error


def say_who_ended(worker: int, how: str, left: int) -> None:
    """Tell the user of a worker that ended before the run was complete."""
    then = f"the {left} others take over what it held" if left > 1 else "the other takes over what it held"
    _log.warning("worker %d %s; %s", worker, how, then if left else "no other is left")


class _Telling:
    """The progress of all workers together, by what is on disk and by what they say."""

    def __init__(self, directory: RunDirectory, job: Job) -> None:
        self._directory, self._job = directory, job
        self._began, self._last, self._every_s = time.time(), time.monotonic(), _TELL_S
        self._said: dict[str, dict[str, Any]] = {}

    def now_and_then(self) -> None:
        """Tell once a second; less often where looking takes long."""
        now = time.monotonic()
        if now - self._last < self._every_s:
            return
        self._said |= {worker.token: worker.news for worker in self._directory.workers()}
        self._count(self._said.values())
        self._job.observer(Progressed(self._job.meter.figures()))
        self._last = time.monotonic()
        self._every_s = max(_TELL_S, 20 * (self._last - now))

    def end(self) -> bool:
        """Count what the workers have logged; return whether the run is complete."""
        logged = (event for event in self._directory.events() if "worker" in event and is_figure(event.get("time")))
        self._count(sessions_of(event for event in logged if event["time"] >= self._began))
        return self._job.meter.rows_done == self._job.meter.rows_total

    def _count(self, said: Iterable[dict[str, Any]]) -> None:
        self._job.meter.restart(self._job.store.covers())
        self._job.meter.count_others(said)
