"""What a schedule moves, in bytes: counted task by task where they are few, else from a sample of them.

Counting is a dry run: the same tasks, the same fetches, the same choice of what leaves memory as in the engine.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.model.memory import (
    FILE_HEADER_BYTES,
    Layout,
    Workload,
    partial_bytes,
    partial_file_bytes,
)
from cqsa_stream.schedulers.residency import Residency, Standing, pieces
from cqsa_stream.schedulers.shares import firsts
from cqsa_stream.schedulers.tasks import NEVER, Schedule, Task

__all__ = ["Fetch", "Stored", "Traffic", "blocks_of_chunk", "fetches", "moved", "queries_first"]

_MOST_COUNTED = 20_000  # fetches; more would take longer than planning should
_TASKS_SAMPLED, _CHUNKS_SAMPLED, _PARTS_SAMPLED = 12, 12, 8


@dataclass(frozen=True)
class Stored:
    """How an array lies on disk: what a read of some tokens fetches.

    ``heads_fetched`` are those of ``lanes`` lanes, which may share chunks that hold several heads. ``encoding``: "raw"
    where any range of bytes can be read; "checked" where that is so once a chunk was read whole, with ``heads_checked``
    heads in all, ``heads_first`` of them asked for then; "compressed" where chunks are always read whole. ``first``:
    the place of the first token that is used. ``past_cache``: it is read from the disk every time.
    """

    axis_tokens: int
    chunk_tokens: int
    heads_fetched: int
    row_bytes: int
    encoding: Literal["raw", "checked", "compressed"] = "raw"
    lanes: int = 1
    first: int = 0
    in_memory: bool = False
    heads_checked: int = 0
    heads_first: int = 0
    past_cache: bool = False

    @property
    def bytes(self) -> int:
        """What reading all tokens of its lanes once fetches."""
        return self.axis_tokens * self.heads_fetched * self.row_bytes

    def fetched_bytes(self, span: range) -> int:
        """Return the bytes fetched to read a span of used tokens in each of the lanes, of chunks read before."""
        start, stop = span.start + self.first, span.stop + self.first
        if span and self.encoding == "compressed":
            start = start // self.chunk_tokens * self.chunk_tokens
            stop = min(-(-stop // self.chunk_tokens) * self.chunk_tokens, self.axis_tokens)
        return (stop - start) * self.heads_fetched * self.row_bytes

    def chunks(self, span: range) -> range:
        """Return the stored chunks that hold any of a span of used tokens and are read whole the first time."""
        if self.encoding != "checked" or not span:
            return range(0)
        return range(
            (span.start + self.first) // self.chunk_tokens, (span.stop - 1 + self.first) // self.chunk_tokens + 1
        )

    def rest_bytes(self, span: range, chunk: int) -> int:
        """Return what the first read of a chunk fetches besides the span."""
        start, stop = chunk * self.chunk_tokens, (chunk + 1) * self.chunk_tokens
        tokens = min(stop, span.stop + self.first) - max(start, span.start + self.first)
        return (self.chunk_tokens * self.heads_checked - tokens * self.heads_first) * self.row_bytes


class Fetch(NamedTuple):
    """Some tokens of a lane, of the query rows or of the keys; ``next_use`` is larger the later they are used again."""

    array: Literal["query", "key", "value"]
    tokens: range
    next_use: int


def fetches(schedule: Schedule, task: Task, layout: Layout) -> Iterator[Fetch]:
    """Yield what a task uses, in that order: keys and values by blocks, and a row's queries with its first block."""
    rows, columns = schedule.grid.rows, schedule.grid.columns
    per_row, per_column = -(-rows.chunk_tokens // layout.query_tokens), -(-columns.chunk_tokens // layout.block_tokens)
    first_block = rows.chunks * per_row
    period = first_block + 2 * columns.chunks * per_column  # places in a task, those of all chunks

    def queries(row: int) -> Iterator[Fetch]:
        later = schedule.next_row(row, task.number)
        for index, tokens in enumerate(pieces(rows.span(row), layout.query_tokens)):
            yield Fetch("query", tokens, later if later == NEVER else later * period + row * per_row + index)

    begun = set(queries_first(task, layout))
    for row in queries_first(task, layout):
        yield from queries(row)
    for column, its_rows in task.steps:
        later = schedule.next_column(column, task.number)
        first = columns.span(column).start
        for tokens in schedule.grid.blocks(column, its_rows, layout.block_tokens):
            index = (tokens.start - first) // layout.block_tokens
            place = later if later == NEVER else later * period + first_block + 2 * (column * per_column + index)
            yield Fetch("key", tokens, place)
            yield Fetch("value", tokens, place + 1)
            for row in (row for row in its_rows if row not in begun):
                yield from queries(row)
            begun.update(its_rows)


def queries_first(task: Task, layout: Layout) -> tuple[int, ...]:
    """Return the rows whose queries come before the first block: all where kernels read blocks in the buffers that
    queries come through, too; elsewhere none, so that kernels start with the first block.
    """
    return task.rows if layout.in_place else ()


@dataclass(frozen=True)
class Traffic:
    """What all lanes move. Of the arrays ``fetched_bytes``, some of them checked against a checksum, some compressed.

    ``query_tokens`` and ``key_tokens`` go to the kernel's memory, each as often as it is used, in ``blocks``.
    ``spills``: partials written before their time; their files have ``spilled_bytes``, and ``restored_bytes`` are read
    back. ``parked_bytes`` of partials go between device and host memory. ``finished_bytes``: output and last headers.
    """

    fetched_bytes: int
    checked_bytes: int
    compressed_bytes: int
    query_tokens: int
    key_tokens: int
    blocks: int
    spills: int
    spilled_bytes: int
    restored_bytes: int
    parked_bytes: int
    finished_bytes: int

    @property
    def bytes_read(self) -> int:
        return self.fetched_bytes + self.restored_bytes

    @property
    def bytes_written(self) -> int:
        return self.spilled_bytes + self.finished_bytes


Arrays = tuple[Stored, Stored, Stored]


def moved(
    work: Workload, schedule: Schedule, layout: Layout, arrays: Arrays, *, exactly: bool = True, shares: int = 1
) -> Traffic:
    """Return what a schedule moves: counted task by task where that takes a moment only, else from a sample.

    A share begins with nothing in memory. What is merged of its partials is not in it, nor, in a sample, what it reads
    again of what stood in memory for the share before.
    """
    count = _Count(work, schedule, layout, arrays, shares)
    if exactly and _fetches(schedule, layout) <= _MOST_COUNTED:
        return count.all_tasks()
    return count.sample()


def _fetches(schedule: Schedule, layout: Layout) -> int:
    """Return how many fetches a lane has, at most."""
    visits, grid = len(schedule) * schedule.rows_per_task, schedule.grid
    columns = min(visits if schedule.returns else len(schedule) * grid.columns.filled, grid.pairs)
    queries = visits * -(-grid.rows.chunk_tokens // layout.query_tokens)
    return queries + 2 * columns * -(-grid.columns.chunk_tokens // layout.block_tokens)


def blocks_of_chunk(axis: Axis, layout: Layout) -> int:
    """Return the blocks of a chunk of queries, keys and values."""
    return -(-axis.chunk_tokens // layout.query_tokens) + 2 * -(-axis.chunk_tokens // layout.block_tokens)


class _Count:
    """The state of a dry run over one lane."""

    def __init__(self, work: Workload, schedule: Schedule, layout: Layout, arrays: Arrays, shares: int) -> None:
        self._firsts = firsts(schedule, work.lanes, shares)
        self._work, self._schedule, self._grid, self._layout = work, schedule, schedule.grid, layout
        self._arrays = dict(zip(("query", "key", "value"), arrays, strict=True))
        self._lanes = arrays[0].lanes
        self._read_whole: set[tuple[str, int]] = set()
        self._fetched = {"raw": 0.0, "checked": 0.0, "compressed": 0.0}
        self._tokens = {"query": 0.0, "key": 0.0, "value": 0.0}
        self._blocks = self._spills = 0.0
        self._spilled = self._restored = self._parked = 0.0

    def all_tasks(self) -> Traffic:
        """Go through the tasks as the engine will."""
        left = {row: len(self._grid.needed(row)) for row in range(self._grid.rows.filled)}
        for number in range(len(self._schedule)):
            if number in self._firsts:
                slots = Residency(self._layout.slots, self._layout.ring_slots - 1)
                standing = Standing(self._layout.resident_rows, self._layout.parked_rows)
                begun: set[int] = set()
            task = self._schedule.task(number, 0)
            self._bring(task, standing, begun)
            for array, tokens, next_use in fetches(self._schedule, task, self._layout):
                self._use(array, tokens, present=slots.place((array, tokens.start), next_use).present)
            for row, _ in task.pairs:
                left[row] -= 1
                if not left[row]:
                    standing.device.free(standing.device.remove(row))
        return self._traffic()

    def _bring(self, task: Task, standing: Standing, begun: set[int]) -> None:
        """Bring the rows' partials to the device."""
        for row in task.rows:
            brought = standing.bring(row, self._schedule.next_row(row, task.number), task.rows)
            if brought.evicted is not None and brought.parked_at is not None:
                self._parked += self._partial_bytes(brought.evicted)
            if brought.stored is not None:
                self._spills += 1
                self._spilled += self._file_bytes(brought.stored)
            if brought.parked is not None:
                self._parked += self._partial_bytes(row)
            elif not brought.present and row in begun:
                self._restored += self._file_bytes(row)
            begun.add(row)

    def _use(self, array: str, tokens: range, *, present: bool) -> None:
        """Count one fetch; what stands in a buffer already is not read."""
        stored = self._arrays[array]
        self._tokens[array] += len(tokens)
        self._blocks += 1
        if present:
            return
        self._fetched[stored.encoding] += stored.fetched_bytes(tokens)
        for chunk in stored.chunks(tokens):
            if (array, chunk) not in self._read_whole:
                self._read_whole.add((array, chunk))
                self._fetched[stored.encoding] += stored.rest_bytes(tokens, chunk)

    def sample(self) -> Traffic:
        """Count the uses of some tasks, evenly spread; how many find their block in memory, the schedule estimates."""
        schedule, layout, grid = self._schedule, self._layout, self._grid
        sampled = [schedule.chunks_of(number) for number in _spread(range(len(schedule)), _TASKS_SAMPLED)]
        share = len(schedule) / len(sampled)
        visits = share * sum(len(rows) for rows, _ in sampled)
        of_chunk = 2 * -(-grid.columns.chunk_tokens // layout.block_tokens)  # queries come once, unless tasks return
        if schedule.returns:
            of_chunk = blocks_of_chunk(grid.columns, layout)
        again = schedule.found_again(layout.cache_slots / of_chunk)
        for rows, columns in sampled:
            self._uses("query", tuple(rows), grid.rows, layout.query_tokens, share, again if schedule.returns else 0.0)
            for array in ("key", "value"):
                self._uses(array, columns, grid.columns, layout.block_tokens, share, again, rows)
        for array, axis, length in (
            ("query", grid.rows, layout.query_tokens),
            *((name, grid.columns, layout.block_tokens) for name in ("key", "value")),
        ):
            stored = self._arrays[array]
            if chunks := stored.chunks(axis.all):
                start = chunks.start * stored.chunk_tokens - stored.first
                first = range(start, start + min(length, stored.chunk_tokens))
                self._fetched["checked"] += len(chunks) * stored.rest_bytes(first, chunks.start)
        returns = max(0.0, visits - grid.rows.filled) if schedule.returns else 0.0
        places = layout.resident_rows, layout.resident_rows + layout.parked_rows
        on_device, in_memory = map(schedule.partials_found, places)
        self._spills = round((1 - in_memory) * returns)
        one = partial_file_bytes(self._work, grid.rows.chunk_tokens, grid.columns.chunks)
        self._spilled = self._restored = self._spills * one
        parked = max(0.0, 2 * (1 - on_device) * returns - 2 * self._spills)
        self._parked = parked * partial_bytes(self._work, grid.rows.chunk_tokens)
        return self._traffic()

    def _uses(
        self,
        array: str,
        chunks: Sequence[int],
        axis: Axis,
        length: int,
        share: float,
        found: float,
        seen_by: Collection[int] = (),
    ) -> None:
        """Count the uses of some chunks of an array, ``share`` times; of these ``found`` are not read. ``seen_by``: the
        row chunks that use no other blocks than those they see; none where all of a chunk is used.
        """
        if not chunks:
            return
        spans = [axis.span(chunk) for chunk in _spread(chunks, _CHUNKS_SAMPLED)]
        if seen_by:
            spans = [self._blocks_seen(span, length, seen_by) for span in spans]
        times, stored = share * len(chunks) / len(spans), self._arrays[array]
        for span in spans:
            starts = range(span.start, span.stop, length)
            self._tokens[array] += times * len(span)
            self._blocks += times * len(starts)
            self._fetched[stored.encoding] += times * (1 - found) * _fetched(stored, span, starts)

    def _blocks_seen(self, span: range, length: int, rows: Collection[int]) -> range:
        """Return the part of a chunk, in whole blocks, from the first key on to the last that these rows see."""
        parts = [part for row in {min(rows), max(rows)} for part in self._grid.seen(row).ranges]
        first = min((part.start for part in parts), default=span.stop) - span.start
        last = max((part.stop for part in parts), default=span.start) - span.start
        start = span.start + max(0, first) // length * length
        return range(min(start, span.stop), max(start, min(span.stop, span.start + -(-last // length) * length)))

    def _traffic(self) -> Traffic:
        """Return what all lanes move; what is fetched was counted for some of them."""
        work, lanes = self._work, self._work.lanes
        shared = lanes / self._lanes
        finished = 0
        if work.durable:
            finished = self._grid.rows.tokens * work.left_bytes + self._grid.rows.filled * FILE_HEADER_BYTES
        return Traffic(
            fetched_bytes=round(sum(self._fetched.values()) * shared),
            checked_bytes=round(self._fetched["checked"] * shared),
            compressed_bytes=round(self._fetched["compressed"] * shared),
            query_tokens=round(self._tokens["query"] * lanes),
            key_tokens=round(self._tokens["key"] * lanes),
            blocks=round(self._blocks * lanes),
            spills=round(self._spills * lanes),
            spilled_bytes=round(self._spilled * lanes),
            restored_bytes=round(self._restored * lanes),
            parked_bytes=round(self._parked * lanes),
            finished_bytes=finished * lanes,
        )

    def _partial_bytes(self, row: int) -> int:
        return partial_bytes(self._work, len(self._grid.rows.span(row)))

    def _file_bytes(self, row: int) -> int:
        return partial_file_bytes(self._work, len(self._grid.rows.span(row)), self._grid.columns.chunks)


def _fetched(stored: Stored, span: range, starts: range) -> float:
    """Return the bytes fetched to read a span in pieces: of stored chunks that come whole, from some of the pieces."""
    if stored.encoding != "compressed":
        return stored.fetched_bytes(span)
    parts = [range(start, min(start + starts.step, span.stop)) for start in _spread(starts, _PARTS_SAMPLED)]
    if not parts:
        return 0.0
    return sum(map(stored.fetched_bytes, parts)) * len(span) / sum(map(len, parts))


def _spread(items: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the items, each from the middle of an equal part."""
    count = min(most, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
