"""The engine: the one inner loop that every schedule, device and resume goes through.

For each task: hold the rows' queries and partials on the device, stream the columns' keys and values past them in
blocks, attend, merge. Between two columns every partial in memory covers whole pairs: there a run can checkpoint,
finish rows and stop. Which calls a pair takes, and in which order a row meets its columns, depends on the plan alone
and not on what was done before: a resumed run repeats the same arithmetic bit for bit.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from cqsa_stream.engine.accumulators import HeldRows
from cqsa_stream.engine.calls import Calls
from cqsa_stream.engine.leaving import Outbox
from cqsa_stream.engine.meter import Meter
from cqsa_stream.engine.prefetch import Prefetcher, Read
from cqsa_stream.engine.sinks import Sink
from cqsa_stream.engine.staging import Stage
from cqsa_stream.errors import RunStopped
from cqsa_stream.events import Checkpointed, Observer, Progressed
from cqsa_stream.kernels.choose import Fold, Kernel
from cqsa_stream.kernels.fold import Partial
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.model.memory import WRITERS
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.schedulers.residency import Fetch, fetches, pieces
from cqsa_stream.schedulers.schedules import Task
from cqsa_stream.schedulers.search import make_schedule
from cqsa_stream.storage.open import TokenArray
from cqsa_stream.storage.partials import PartialStore

__all__ = ["Engine", "Job"]

_REPORT_EVERY_S = 0.1


@dataclass(frozen=True)
class Job:
    """All that a session works with. ``stop(early_s)`` gives the reason to stop at this safe point, or None; a
    time limit less than ``early_s`` away counts as reached."""

    problem: Problem
    plan: Plan
    arrays: dict[str, TokenArray]
    sink: Sink
    store: PartialStore | None
    device: torch.device
    kernel: Kernel
    fold: Fold
    stop: Callable[[float], str | None]
    observer: Observer
    meter: Meter
    checkpoint_every_s: float


@dataclass(frozen=True)
class _Leaving:
    """A complete row on its way out; until it is written, it takes a place in the outbox, or its own in memory."""

    lane: int
    row: int
    place: int
    written: Future[None]


class Engine:
    """Runs a job to its end, or to the moment it is told to stop."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.problem, self.plan, self.grid = job.problem, job.plan, job.plan.grid
        self.schedule = make_schedule(job.plan.schedule, self.grid, job.plan.layout)
        self.covers = self._stored_covers()
        scale = job.problem.scale
        # kernels mask before they scale: only a positive scale keeps -inf
        self.sign, scale = (1.0, scale) if scale > 0 else (-1.0, -scale) if scale < 0 else (0.0, 1.0)
        self._calls = Calls(job.kernel, job.fold, scale, job.device)
        self._last_checkpoint = self._last_safe = time.monotonic()
        self._commit_s = 0.0
        self._last_report = 0.0
        self._leaving: deque[_Leaving] = deque()
        self._outbox: Outbox | None = None

    def run(self) -> None:
        """Compute every pair that is not covered yet. Raises RunStopped after a checkpoint, or what went wrong."""
        while self._unfinished():
            self._pass()
            before, self.covers = self.covers, self._stored_covers()  # a partial found damaged has lost its cover
            if self._unfinished() and before == self.covers:
                raise RuntimeError("a whole pass over the schedule computed nothing; this is a defect")

    def _stored_covers(self) -> list[dict[int, int | None]]:
        """Return, for each lane, the covers of the stored partials by row; None where the row is finished."""
        if self.job.store is None:
            return [dict.fromkeys(finished) for finished in self.job.meter.finished]
        covers = self.job.store.covers()
        self.job.meter.restart(covers)
        return covers

    def _unfinished(self) -> int:
        return self.job.meter.rows_total - self.job.meter.rows_done

    def _tasks(self, lane: int) -> Iterator[tuple[int, Task]]:
        """Yield (number, task) for what is left to do in a lane."""
        done = {
            row: self.grid.complete_cover(row) if cover is None else cover for row, cover in self.covers[lane].items()
        }
        for number, task in enumerate(self.schedule.tasks(lane)):
            left = task.without(done)
            if left.rows:
                yield number, left

    def _pass(self) -> None:
        problem, layout, device = self.problem, self.plan.layout, self.job.device
        compute = self.job.kernel.compute_dtype(getattr(torch, problem.dtype))
        with (
            HeldRows(problem, self.grid, layout, device, self.job.store) as held,
            self._new_outbox() as self._outbox,
            ThreadPoolExecutor(WRITERS[device.type], "cqsa-finish") as self._writer,
        ):
            with Prefetcher(self._reads(), self.job.arrays, layout, device) as stream:
                stage = Stage(problem, self.grid.rows, layout, device, compute, self.sign, self._calls.streams)
                for lane in range(problem.lanes):
                    held.begin_lane(lane)
                    self._finish_complete(held, lane)
                    for number, task in self._tasks(lane):
                        self._run_task(number, task, held, stage, stream)
                    held.end_lane()
            self._settle(held, wait=True)

    def _reads(self) -> Iterator[Read]:
        """Yield what is read, in the order in which it is used."""
        for lane in range(self.problem.lanes):
            for number, task in self._tasks(lane):
                for fetch in fetches(self.schedule, number, task, self.plan.layout):
                    yield self._read(lane, fetch)

    def _read(self, lane: int, fetch: Fetch) -> Read:
        batch, query_heads, kv_heads = self.problem.lane_heads(lane)
        heads, first = (query_heads, self.problem.first_query) if fetch.array == "query" else (kv_heads, 0)
        tokens = range(fetch.tokens.start + first, fetch.tokens.stop + first)
        return Read(lane, fetch.array, batch, heads, tokens, fetch.next_use)

    def _run_task(self, number: int, task: Task, held: HeldRows, stage: Stage, stream: Prefetcher) -> None:
        queries: dict[int, Tensor] = {}
        last = {row: column for column, rows in task.steps for row in rows}
        for row in task.rows:
            span = self.grid.rows.span(row)
            queries[row] = stage.begin_row(row, len(span))
            for tokens in pieces(span, self.plan.layout.query_tokens):
                stage.queries(next(stream), queries[row][:, tokens.start - span.start : tokens.stop - span.start])
            self._make_room(held)
            held.partial(row, task.rows, lambda r: self.schedule.next_row(r, number))
        for column, rows in task.steps:
            for tokens in pieces(self.grid.columns.span(column), self.plan.layout.block_tokens):
                key, value = stage.block(next(stream), next(stream))
                for row in rows:
                    self._attend(row, queries[row], held, tokens, key, value)
                stage.done()
            for row in rows:
                if last[row] == column:
                    stage.end_row(row)
                if held.add(row, column) == self.grid.complete_cover(row):
                    self._finish(held, row)
            self._safe_point(held, task.lane, column, rows)

    def _attend(self, row: int, queries: Tensor, held: HeldRows, tokens: range, key: Tensor, value: Tensor) -> None:
        """Merge the attention of a row chunk over one block of keys into the row's partial."""
        span = self.grid.rows.span(row)
        partial = held.partial(row, (), lambda _: 0)
        for call in self.problem.mask.calls(span, tokens, self.plan.layout.tile):
            rows = slice(call.rows.start - span.start, call.rows.stop - span.start)
            columns = slice(call.columns.start - tokens.start, call.columns.stop - tokens.start)
            part = Partial(partial.out[:, rows], partial.lse[:, rows])
            self._calls.attend(part, queries[:, rows], key[:, columns], value[:, columns], call)

    def _finish_complete(self, held: HeldRows, lane: int) -> None:
        """Finish rows that need nothing more: those that see no key, and those stored complete but not yet finished."""
        for row in range(self.grid.rows.chunks):
            cover = self.covers[lane].get(row, 0)
            if self.grid.rows.span(row) and cover is not None and cover == self.grid.complete_cover(row):
                self._make_room(held)
                if held.partial(row, (), lambda _: 0).cover == cover:
                    self._finish(held, row)
                else:
                    held.free(held.retire(row)[1])
                self._settle(held, wait=True)

    def _finish(self, held: HeldRows, row: int) -> None:
        """Hand a complete row to a thread that writes it while the next rows compute."""
        partial, place = held.retire(row)
        copied = None
        if self._outbox is not None:
            while self._outbox.full:
                self._settle_first(held)
            slot = place
            place, partial, left, copied = self._outbox.take(partial)
            held.free(slot, left)
        written = self._writer.submit(self._write, held.lane, row, partial, copied)
        self._leaving.append(_Leaving(held.lane, row, place, written))

    def _new_outbox(self) -> AbstractContextManager[Outbox | None]:
        if self.job.device.type == "cpu":
            return nullcontext()
        rows = self.problem.group * self.grid.rows.chunk_tokens
        dtype = getattr(torch, self.problem.out_dtype)
        return Outbox(self.job.device, self.plan.layout.leaving_rows, rows * self.problem.value_dim, rows, dtype)

    def _make_room(self, held: HeldRows) -> None:
        """Wait for rows that leave from their own places, where another one needs a place."""
        while held.full and self._leaving and self._outbox is None:
            self._settle_first(held)

    def _write(self, lane: int, row: int, partial: Partial, copied: torch.cuda.Event | None) -> None:
        """Make a row's output durable, and only then replace its partial by the word that it is finished."""
        if copied is not None:
            copied.synchronize()  # this thread has nothing else to do
        checksum = self.job.sink.write(lane, row, partial.out, partial.lse)
        if self.job.store is not None:
            self.job.store.finish(lane, row, checksum)

    def _settle(self, held: HeldRows, *, wait: bool) -> None:
        """Count the rows whose output is durable; wait for all of them, or take those that are."""
        while self._leaving and (wait or self._leaving[0].written.done()):
            self._settle_first(held)

    def _settle_first(self, held: HeldRows) -> None:
        leaving = self._leaving.popleft()
        leaving.written.result()
        if self._outbox is None:
            held.free(leaving.place)
        else:
            self._outbox.free(leaving.place)
        self.job.meter.row_finished(leaving.lane, leaving.row)

    def _safe_point(self, held: HeldRows, lane: int, column: int, rows: tuple[int, ...]) -> None:
        """Between two columns: report, checkpoint where it is due, stop where that is asked."""
        self.job.meter.pairs_computed(rows, column)
        self._settle(held, wait=False)
        if time.monotonic() - self._last_report >= _REPORT_EVERY_S:
            self._last_report = time.monotonic()
            self.job.observer(Progressed(self.job.meter.figures()))
        now = time.monotonic()
        step_s = now - self._last_safe
        reason = self.job.stop(self._commit_s + step_s / 2)
        ahead = (
            step_s + 2 * self._commit_s
        )  # by the next safe point it would be too late; no commit takes as long again
        self._last_safe = now
        due = self.job.store is not None and now - self._last_checkpoint + ahead >= self.job.checkpoint_every_s
        if reason or due:
            self._settle(held, wait=True)
        if self.job.store is not None and (reason or due):
            start = time.monotonic()
            count = held.commit()
            self._last_checkpoint = self._last_safe = time.monotonic()
            self._commit_s = self._last_checkpoint - start
            figures = self.job.meter.figures()
            self.job.observer(Checkpointed(self._commit_s, count, figures))
        if reason and self._unfinished():
            raise RunStopped(reason)
