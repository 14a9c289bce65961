"""The engine: the one inner loop that every operation, schedule, device and resume goes through.

For each task: hold the rows' streams and partials on the device, stream the columns past them in blocks, add. Between
two columns every partial in memory covers whole pairs: there a run can checkpoint, finish chunks and stop. Which calls
a pair takes, and in which order a row meets its columns, depends on the plan alone and not on what was done before: a
resumed run repeats the same arithmetic bit for bit.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack

from torch import Tensor

from cqsa_stream.engine.accumulators import Accumulators
from cqsa_stream.engine.finishing import Finishing
from cqsa_stream.engine.job import Job
from cqsa_stream.engine.leaving import outbox_for
from cqsa_stream.engine.merging import merge_shares
from cqsa_stream.engine.operation import Fields, Side
from cqsa_stream.engine.prefetch import Prefetcher, Read
from cqsa_stream.engine.staging import Stage
from cqsa_stream.errors import RunStopped
from cqsa_stream.events import Checkpointed, Progressed
from cqsa_stream.schedulers.model.traffic import Fetch, fetches, queries_first
from cqsa_stream.schedulers.operands import STREAMS
from cqsa_stream.schedulers.residency import pieces
from cqsa_stream.schedulers.schedules import make_schedule
from cqsa_stream.schedulers.tasks import Task

__all__ = ["Engine", "Job"]

_REPORT_EVERY_S = 0.1
_NOW = -1  # the use of a partial that is finished at once

Covers = list[dict[int, int | None]]


class Engine:
    """Runs the tasks of a share to their end, or to the moment it is told to stop."""

    def __init__(self, job: Job) -> None:
        self.job, self.operation = job, job.operation
        assert job.operation.streams == STREAMS, "the engine brings query by rows, key and value by columns"
        self.problem, self.plan, self.grid = job.problem, job.plan, job.plan.grid
        self.schedule = make_schedule(job.plan.schedule, self.grid, job.plan.layout)
        self._axes = [self.grid.rows if s.axis == "rows" else self.grid.columns for s in job.operation.sums]
        self.covers = self._stored_covers()
        self._last_checkpoint = self._last_safe = time.monotonic()
        self._commit_s = 0.0
        self._last_report = 0.0

    def run(self) -> None:
        """Compute every pair of the share that is not covered yet.

        Raises RunStopped after a checkpoint, or what went wrong.
        """
        while self._unfinished():
            self._pass()
            before, self.covers = self.covers, self._stored_covers()  # a partial found damaged has lost its cover
            if self._unfinished() and before == self.covers:
                raise RuntimeError("a whole pass over the schedule computed nothing; this is a defect")
        if self.job.share.count > 1:
            merge_shares(self.grid, self.operation, self.job.store, self.job.sink)

    def lacks_pairs(self) -> bool:
        """Return whether a pair of the share is in no stored partial."""
        return any(True for lane in range(self.problem.lanes) for _ in self._tasks(lane))

    def _stored_covers(self) -> list[Covers]:
        """Return, for each sum, the covers of its stored partials."""
        found = [self.job.store.covers(number) for number in range(len(self.operation.sums))]
        self.job.meter.restart(found[0])
        return found

    def _unfinished(self) -> bool:
        """Return whether a chunk is not finished; of a part of the shares, whether a pair of this one is left."""
        if self.job.share.count > 1:
            return self.lacks_pairs()
        done = [sum(cover is None for lane in covers for cover in lane.values()) for covers in self.covers]
        return any(n < self.problem.lanes * axis.filled for n, axis in zip(done, self._axes, strict=True))

    def _complete(self, number: int, chunk: int) -> int:
        """Return the cover of a complete chunk of a sum."""
        by_rows = self.operation.sums[number].axis == "rows"
        return self.grid.complete_cover(chunk) if by_rows else self.grid.needing(chunk).bits

    def _lacks(self, number: int, lane: int, row: int, column: int) -> bool:
        """Return whether a sum lacked a pair when this pass began."""
        chunk, other = (row, column) if self.operation.sums[number].axis == "rows" else (column, row)
        cover = self.covers[number][lane].get(chunk, 0)
        return cover is not None and not cover >> other & 1

    def _tasks(self, lane: int) -> Iterator[Task]:
        """Yield the tasks of the share in a lane, with the pairs that a sum lacks."""
        numbers = range(len(self.covers))
        begun = any(covers[lane] for covers in self.covers)
        for task in self.job.share.tasks(self.schedule, lane, self.problem.lanes):
            left = (
                task.only(lambda row, column: any(self._lacks(n, lane, row, column) for n in numbers))
                if begun
                else task
            )
            if left.rows:
                yield left

    def _pass(self) -> None:
        layout, device = self.plan.layout, self.job.device
        with ExitStack() as stack:
            self._held = [stack.enter_context(self._accumulators(number)) for number in range(len(self.covers))]
            stage = Stage(self.problem, self.grid.rows, layout, device, self.operation, self.job.timeline)
            outbox = outbox_for(device, self.operation.sums[0], self.grid.rows.chunk_tokens, layout.leaving_rows)
            reader = Prefetcher(self._reads(), self.job.arrays, layout, device, self.job.timeline)
            self._finishing = stack.enter_context(Finishing(self.job, outbox))
            with reader as stream:
                for lane in range(self.problem.lanes):
                    for held in self._held:
                        held.begin_lane(lane)
                        self._finish_complete(held)
                    for task in self._tasks(lane):
                        self._run_task(task, stage, stream)
                    for held in self._held:
                        held.end_lane()
            self._finishing.settle(wait=True)
        self._held = []  # their memory goes back before others are merged

    def _accumulators(self, number: int) -> Accumulators:
        sum_, layout = self.operation.sums[number], self.plan.layout
        places = (layout.resident_rows, layout.parked_rows) if sum_.axis == "rows" else (layout.resident_columns, 0)
        return Accumulators(number, sum_, self._axes[number], places, self.job.device, self.job.store)

    def _reads(self) -> Iterator[Read]:
        """Yield what is read, in the order in which it is used."""
        for lane in range(self.problem.lanes):
            for task in self._tasks(lane):
                for fetch in fetches(self.schedule, task, self.plan.layout):
                    yield self._read(lane, fetch)

    def _read(self, lane: int, fetch: Fetch) -> Read:
        batch, query_heads, kv_heads = self.problem.lane_heads(lane)
        heads, first = (query_heads, self.problem.first_query) if fetch.array == "query" else (kv_heads, 0)
        tokens = range(fetch.tokens.start + first, fetch.tokens.stop + first)
        return Read(lane, fetch.array, batch, heads, tokens, fetch.next_use)

    def _run_task(self, task: Task, stage: Stage, stream: Prefetcher) -> None:
        queries: dict[int, Tensor] = {}
        last = {row: column for column, rows in task.steps for row in rows}
        for row in task.rows:
            self._bring("rows", row, task.rows, self.schedule.next_row(row, task.number))
        for row in queries_first(task, self.plan.layout):
            queries[row] = self._queries(row, stage, stream)
        for column, rows in task.steps:
            self._bring("columns", column, (column,), self.schedule.next_column(column, task.number))
            for tokens in self.grid.blocks(column, rows, self.plan.layout.block_tokens):
                block = stage.block(next(stream), next(stream))
                for row in rows:
                    if row not in queries:
                        queries[row] = self._queries(row, stage, stream)
                    at = task.lane, row, column
                    self.operation.add(
                        task.lane,
                        Side(
                            self.grid.rows.span(row),
                            (queries[row],),
                            self._fields("rows", at, self.grid.rows.span(row)),
                        ),
                        Side(tokens, block, self._fields("columns", at, tokens)),
                    )
                stage.done()
            for row in rows:
                if last[row] == column:
                    stage.end_row(row)
                self._covered(task.lane, row, column)
            self._safe_point(column, rows)

    def _queries(self, row: int, stage: Stage, stream: Prefetcher) -> Tensor:
        """Bring a row chunk's queries to the device."""
        span = self.grid.rows.span(row)
        queries = stage.begin_row(row, len(span))
        for tokens in pieces(span, self.plan.layout.query_tokens):
            stage.queries(next(stream), queries[:, tokens.start - span.start : tokens.stop - span.start])
        return queries

    def _bring(self, axis: str, chunk: int, keep: tuple[int, ...], next_use: int) -> None:
        """Bring the partials of a chunk to the device, of sums by this axis that are not finished."""
        for held in self._held:
            if held.sum.axis == axis and self.covers[held.number][held.lane].get(chunk, 0) is not None:
                self._finishing.make_room(held)
                held.bring(chunk, next_use, keep)

    def _fields(self, axis: str, at: tuple[int, int, int], tokens: range) -> list[Fields | None]:
        """Return the fields of these tokens, of the sums by this axis; None of a sum that holds the pair already."""
        chunk = at[1] if axis == "rows" else at[2]
        found: list[Fields | None] = []
        for held in (held for held in self._held if held.sum.axis == axis):
            first = held.axis.span(chunk).start
            part = slice(tokens.start - first, tokens.stop - first)
            lacks = self._lacks(held.number, *at)
            found.append(tuple(field[:, part] for field in held[chunk].fields) if lacks else None)
        return found

    def _covered(self, lane: int, row: int, column: int) -> None:
        """Note that a pair is in all sums now, and finish the chunks that it completes."""
        for held in self._held:
            if not self._lacks(held.number, lane, row, column):
                continue
            chunk, other = (row, column) if held.sum.axis == "rows" else (column, row)
            if held.add(chunk, other) == self._complete(held.number, chunk):
                self._finishing.finish(held, chunk)

    def _finish_complete(self, held: Accumulators) -> None:
        """Finish chunks that need nothing more: those that see no other, and those stored complete but not finished."""
        covers = self.covers[held.number][held.lane]
        for chunk in range(held.axis.filled):
            cover = covers.get(chunk, 0)
            if cover is None or cover != self._complete(held.number, chunk) or (not cover and self.job.share.number):
                continue
            self._finishing.make_room(held)
            if held.bring(chunk, _NOW).cover == cover:
                self._finishing.finish(held, chunk)
            else:
                held.free(held.retire(chunk).slot)
            self._finishing.settle(wait=True)

    def _safe_point(self, column: int, rows: tuple[int, ...]) -> None:
        """Between two columns: report, checkpoint where it is due, stop where that is asked."""
        job, now = self.job, time.monotonic()
        job.meter.pairs_computed(rows, column)
        self._finishing.settle(wait=False)
        if now - self._last_report >= _REPORT_EVERY_S:
            self._last_report = now
            job.observer(Progressed(job.meter.figures()))
        now = time.monotonic()
        step_s = now - self._last_safe
        self._last_safe = now
        reason = job.stop(self._commit_s + step_s / 2)
        ahead = step_s + 2 * self._commit_s  # the next safe point would be too late; no commit takes as long again
        due = job.store.keeps and now - self._last_checkpoint + ahead >= job.checkpoint_every_s
        if reason or due:
            self._finishing.settle(wait=True)
            if job.store.keeps:
                self._checkpoint()
        if reason and self._left():
            raise RunStopped(reason)

    def _checkpoint(self) -> None:
        start = time.monotonic()
        with self.job.timeline.span("commit"):
            count = sum(held.commit() for held in self._held)
        self._last_checkpoint = self._last_safe = time.monotonic()
        self._commit_s = self._last_checkpoint - start
        self.job.observer(Checkpointed(self._commit_s, count, self.job.meter.figures()))

    def _left(self) -> bool:
        """Return whether the run is not complete, by what this engine has done."""
        return self.job.meter.rows_done < self.job.meter.rows_total
