"""Complete chunks of sums, on their way from where they were summed up to the sink.

A thread writes them while the next ones compute. A chunk whose output is durable, and only such a one, is finished.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from cqsa_stream.engine.accumulators import Accumulators
from cqsa_stream.engine.job import Job
from cqsa_stream.engine.leaving import Left, Outbox

__all__ = ["Finishing"]


@dataclass(frozen=True)
class _Written:
    """A chunk that is being written; until it is, it takes its place in memory, or one in the outbox."""

    number: int
    lane: int
    chunk: int
    release: Callable[[], None]
    done: Future[None]


class Finishing:
    """Hands complete chunks out; a context manager, whose end waits for all of them unless an error ended the rest."""

    def __init__(self, job: Job, outbox: Outbox) -> None:
        self._job, self._outbox = job, outbox
        self._writer = ThreadPoolExecutor(job.device.habits.writers, "cqsa-finish")
        self._leaving: deque[_Written] = deque()

    def __enter__(self) -> "Finishing":
        self._outbox.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.shutdown()
        self._outbox.__exit__(*error)

    def finish(self, held: Accumulators, chunk: int) -> None:
        """Hand a complete chunk to a thread that writes it while the next ones compute."""
        while self._outbox.full:
            self._settle_first()
        partial = held.retire(chunk)
        self._job.operation.leave(held.number, held.lane, partial.fields)
        left = self._outbox.take(partial.fields, held.sum, lambda until: held.free(partial.slot, until))
        done = self._writer.submit(self._write, held.number, held.lane, chunk, left)
        self._leaving.append(_Written(held.number, held.lane, chunk, left.release, done))

    def make_room(self, held: Accumulators) -> None:
        """Wait for chunks that leave from their own places, where another one needs a place."""
        while held.full and self._leaving and self._outbox.in_place:
            self._settle_first()

    def settle(self, *, wait: bool) -> None:
        """Count the chunks whose output is durable; wait for all of them, or take those that are."""
        while self._leaving and (wait or self._leaving[0].done.done()):
            self._settle_first()

    def _write(self, number: int, lane: int, chunk: int, left: Left) -> None:
        """Make a chunk's output durable, and only then replace its partial by the header that says: finished."""
        left.copied.synchronize()  # this thread has nothing else to do
        with self._job.timeline.span("write", f"lane {lane}, row {chunk}"):
            checksum = self._job.sink.write(number, lane, chunk, left.fields)
            self._job.store.finish(number, lane, chunk, checksum)

    def _settle_first(self) -> None:
        written = self._leaving.popleft()
        written.done.result()
        written.release()
        if written.number == 0:
            self._job.meter.row_finished(written.chunk)
