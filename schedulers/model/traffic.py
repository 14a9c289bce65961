"""What a schedule moves, in bytes: counted by going through its tasks where they are few, else estimated.

Counting is a dry run: the same tasks, the same fetches, the same choice of what leaves memory as in the engine.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.model.memory import FILE_HEADER_BYTES, Layout, Workload, partial_bytes, partial_file_bytes
from cqsa_stream.schedulers.residency import Residency, fetches, pieces
from cqsa_stream.schedulers.schedules import Rectangular, Schedule, Task, gaps

__all__ = ["Stored", "Traffic", "blocks_of_chunk", "countable", "counted", "estimated", "kept"]

_MOST_COUNTED = 12_000  # fetches; more would take longer than planning should
_CHUNKS_SAMPLED = 64


@dataclass(frozen=True)
class Stored:
    """How an array lies on disk: what a read of some tokens fetches.

    ``heads_fetched`` are those of ``lanes`` lanes, which may share chunks that hold several heads. ``encoding``: "raw"
    where any range of bytes can be read, else what a reader does with each chunk. ``leaf_bytes``: where a chunk is read
    whole only the first time, and then in pieces of this size. ``past_cache``: it is read from the disk every time.
    """

    axis_tokens: int
    chunk_tokens: int
    heads_fetched: int
    row_bytes: int
    encoding: Literal["raw", "checked", "compressed"] = "raw"
    lanes: int = 1
    in_memory: bool = False
    leaf_bytes: int = 0
    past_cache: bool = False

    def fetched_bytes(self, span: range) -> int:
        """Return the bytes fetched to read a span in each of the lanes: stored chunks, or their leaves, come whole."""
        if not span:
            return 0
        if self.leaf_bytes:
            return sum(self._leaves(span, chunk) for chunk in self.chunks(span)) * self.heads_fetched
        first = span.start // self.chunk_tokens * self.chunk_tokens
        stop = min(-(-span.stop // self.chunk_tokens) * self.chunk_tokens, self.axis_tokens)
        return (stop - first) * self.heads_fetched * self.row_bytes

    def chunks(self, span: range) -> range:
        """Return the stored chunks that hold any of a span."""
        return range(span.start // self.chunk_tokens, (span.stop - 1) // self.chunk_tokens + 1)

    def rest_bytes(self, span: range, chunk: int) -> int:
        """Return what the first read of a chunk fetches besides the leaves that hold the span."""
        return (self.chunk_tokens * self.row_bytes - self._leaves(span, chunk)) * self.heads_fetched

    def _leaves(self, span: range, chunk: int) -> int:
        start = chunk * self.chunk_tokens
        first = max(0, span.start - start) * self.row_bytes // self.leaf_bytes * self.leaf_bytes
        last = min(self.chunk_tokens, span.stop - start) * self.row_bytes
        return min(-(-last // self.leaf_bytes) * self.leaf_bytes, self.chunk_tokens * self.row_bytes) - first


@dataclass(frozen=True)
class Traffic:
    """What all lanes move. Of the arrays ``fetched_bytes``, some of them checked against a checksum, some compressed.

    ``query_tokens`` and ``key_tokens`` go to the kernel's memory, each as often as it is used, in ``blocks``.
    ``spills``: partials written before their time, ``restores``: read back; their files have ``spilled_bytes`` and
    ``restored_bytes``. ``parked_bytes`` of partials go between device and host memory.
    """

    fetched_bytes: int
    checked_bytes: int
    compressed_bytes: int
    query_tokens: int
    key_tokens: int
    blocks: int
    spills: int
    restores: int
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


def countable(schedule: Schedule, layout: Layout) -> bool:
    """Return whether counting takes a moment only."""
    if schedule.name == "cqs" and 4 * len(schedule) * schedule.rows_per_task > _MOST_COUNTED:
        return False  # each visit of a row looks for the partial that is to leave
    return _fetches(schedule, layout) <= _MOST_COUNTED or _streams(schedule, layout)


def _fetches(schedule: Schedule, layout: Layout) -> int:
    """Return how many fetches a lane has, at most."""
    visits = len(schedule) * schedule.rows_per_task
    columns = visits if schedule.name == "cqs" else len(schedule) * schedule.grid.columns.filled
    queries = visits * -(-schedule.grid.rows.chunk_tokens // layout.query_tokens)
    return queries + 2 * columns * -(-schedule.grid.columns.chunk_tokens // layout.block_tokens)


def _streams(schedule: Schedule, layout: Layout) -> bool:
    """Whether a task uses so many blocks, and the host so few buffers, that the next finds none of them there.

    (Tasks that hold chunks past the end use fewer, and may find some.)
    """
    used = 2 * (schedule.rows_per_task - 2)
    return schedule.name == "cqs" and not layout.cache_slots and used >= layout.ring_slots


def counted(
    work: Workload, schedule: Schedule, layout: Layout, arrays: tuple[Stored, Stored, Stored], first_query: int
) -> Traffic:
    """Go through the tasks of one lane as the engine will, and count."""
    count = _Count(work, schedule, layout, arrays, first_query)
    whole = schedule.grid.rows.filled == len(schedule)
    every_time = _streams(schedule, layout) and (whole or _fetches(schedule, layout) > _MOST_COUNTED)
    for number, task in enumerate(schedule.tasks(0)):
        count.rows(number, task.rows)
        if every_time:
            count.fetch_all(task)
        else:
            for fetch in fetches(schedule, number, task, layout):
                count.fetch(fetch.array, fetch.tokens, fetch.next_use)
        for row, pairs in task.pairs_by_row().items():
            count.computed(row, pairs)
    return _of_all_lanes(work, schedule.grid, count.traffic(), arrays[0].lanes)


class _Count:
    """The state of a dry run over one lane."""

    def __init__(
        self,
        work: Workload,
        schedule: Schedule,
        layout: Layout,
        arrays: tuple[Stored, Stored, Stored],
        first_query: int,
    ) -> None:
        self._work, self._schedule, self._grid, self._layout = work, schedule, schedule.grid, layout
        self._arrays = dict(zip(("query", "key", "value"), arrays, strict=True))
        self._offset = {"query": first_query, "key": 0, "value": 0}
        self._slots = Residency(layout.slots, layout.ring_slots - 1)
        self._known: dict[tuple[str, int, int], int] = {}
        self._checked: set[tuple[str, int]] = set()  # stored chunks that have been read whole
        self._whole: dict[tuple[str, int], tuple[int, int, int]] = {}
        self._left = [len(needed) for needed in self._grid.needed]
        self._begun: set[int] = set()
        self._resident: dict[int, None] = {}
        self._parked: dict[int, None] = {}
        self._parking = 0
        self._spills = self._restores = self._spilled = self._restored = 0
        self._fetched = {"raw": 0, "checked": 0, "compressed": 0}
        self._tokens = {"query": 0, "key": 0, "value": 0}
        self._blocks = 0

    def rows(self, number: int, rows: tuple[int, ...]) -> None:
        """Bring the rows' partials to the device, as ``HeldRows`` does."""

        def later(row: int) -> int:
            return self._schedule.next_row(row, number)

        for row in rows:
            if row in self._resident:
                continue
            if len(self._resident) == self._layout.resident_rows:
                out = max((r for r in self._resident if r not in rows), key=later)
                del self._resident[out]
                self._leave(out, later)
            if row in self._parked:
                del self._parked[row]
                self._parking += partial_bytes(self._work, len(self._grid.rows.span(row)))
            elif row in self._begun:
                self._restores += 1
                self._restored += self._file_bytes(row)
            self._begun.add(row)
            self._resident[row] = None

    def _leave(self, row: int, later: Callable[[int], int]) -> None:
        if len(self._parked) < self._layout.parked_rows:
            out = None
        else:
            out = max((row, *self._parked), key=later)
            self._spills += 1
            self._spilled += self._file_bytes(out)
        if out != row:
            self._parked[row] = None
            self._parking += partial_bytes(self._work, len(self._grid.rows.span(row)))
            if out is not None:
                del self._parked[out]

    def fetch(self, array: str, tokens: range, next_use: int) -> None:
        """Count one fetch; what stands in a buffer already is not read."""
        self._tokens[array] += len(tokens)
        self._blocks += 1
        if not self._slots.place((array, tokens.start), next_use)[1]:
            self._fetched[self._arrays[array].encoding] += self._bytes(array, tokens) + self._first(array, tokens)

    def fetch_all(self, task: Task) -> None:
        """Count all fetches of a task, none of which stands in a buffer."""
        for array, chunks in (("query", task.rows), ("key", task.columns), ("value", task.columns)):
            axis = self._grid.rows if array == "query" else self._grid.columns
            length = self._layout.query_tokens if array == "query" else self._layout.block_tokens
            for chunk in chunks:
                known = self._whole.get((array, chunk))
                if known is None:
                    span = axis.span(chunk)
                    parts = list(pieces(span, length))
                    known = len(span), len(parts), sum(self._bytes(array, part) for part in parts)
                    self._whole[array, chunk] = known
                    self._fetched[self._arrays[array].encoding] += sum(self._first(array, part) for part in parts)
                self._tokens[array] += known[0]
                self._blocks += known[1]
                self._fetched[self._arrays[array].encoding] += known[2]

    def _bytes(self, array: str, tokens: range) -> int:
        found = self._known.get((array, tokens.start, tokens.stop))
        if found is None:
            offset = self._offset[array]
            found = self._arrays[array].fetched_bytes(range(tokens.start + offset, tokens.stop + offset))
            self._known[array, tokens.start, tokens.stop] = found
        return found

    def _first(self, array: str, tokens: range) -> int:
        """Return the bytes by which a read is longer where it is the first of a stored chunk."""
        stored, offset = self._arrays[array], self._offset[array]
        if not stored.leaf_bytes:
            return 0
        span = range(tokens.start + offset, tokens.stop + offset)
        new = [chunk for chunk in stored.chunks(span) if (array, chunk) not in self._checked]
        self._checked.update((array, chunk) for chunk in new)
        return sum(stored.rest_bytes(span, chunk) for chunk in new)

    def computed(self, row: int, pairs: int) -> None:
        self._left[row] -= pairs
        if not self._left[row]:
            del self._resident[row]

    def traffic(self) -> Traffic:
        return Traffic(
            fetched_bytes=sum(self._fetched.values()),
            checked_bytes=self._fetched["checked"],
            compressed_bytes=self._fetched["compressed"],
            query_tokens=self._tokens["query"],
            key_tokens=self._tokens["key"],
            blocks=self._blocks,
            spills=self._spills,
            restores=self._restores,
            spilled_bytes=self._spilled,
            restored_bytes=self._restored,
            parked_bytes=self._parking,
            finished_bytes=0,
        )

    def _file_bytes(self, row: int) -> int:
        return partial_file_bytes(self._work, len(self._grid.rows.span(row)), self._grid.columns.chunks)


def estimated(
    work: Workload, schedule: Schedule, layout: Layout, arrays: tuple[Stored, Stored, Stored], first_query: int
) -> Traffic:
    """Estimate from how often chunks are used on average, and how many of these uses find them still in memory."""
    grid = schedule.grid
    times_row, times_column = schedule.loads()
    row_hits, column_hits, kept_on_device, kept_rows = _reuse(schedule, layout)
    fetched = {"raw": 0.0, "checked": 0.0, "compressed": 0.0}
    for stored, times, axis, length, offset, hits in (
        (arrays[0], times_row, grid.rows, layout.query_tokens, first_query, row_hits),
        (arrays[1], times_column, grid.columns, layout.block_tokens, 0, column_hits),
        (arrays[2], times_column, grid.columns, layout.block_tokens, 0, column_hits),
    ):
        fetched[stored.encoding] += _bytes(times, axis, stored, length, offset) * (1 - hits)
        if stored.leaf_bytes:
            once = stored.fetched_bytes(range(offset, offset + axis.tokens))
            fetched[stored.encoding] += once * max(0.0, 1 - length / stored.chunk_tokens)
    one = partial_file_bytes(work, grid.rows.chunk_tokens, grid.columns.chunks)
    visits, begun = sum(times_row), sum(1 for n in times_row if n)
    returns = max(0.0, visits - begun)
    spills = round((1 - kept_rows) * returns)
    parked = 2 * (1 - kept_on_device) * returns - 2 * spills
    return _of_all_lanes(
        work,
        grid,
        Traffic(
            fetched_bytes=round(sum(fetched.values())),
            checked_bytes=round(fetched["checked"]),
            compressed_bytes=round(fetched["compressed"]),
            query_tokens=round(visits * min(grid.rows.chunk_tokens, grid.rows.tokens)),
            key_tokens=round(sum(times_column) * min(grid.columns.chunk_tokens, grid.columns.tokens)),
            blocks=round(
                visits * -(-grid.rows.chunk_tokens // layout.query_tokens)
                + 2 * sum(times_column) * -(-grid.columns.chunk_tokens // layout.block_tokens)
            ),
            spills=spills,
            restores=spills,
            spilled_bytes=spills * one,
            restored_bytes=spills * one,
            parked_bytes=round(max(0.0, parked) * partial_bytes(work, grid.rows.chunk_tokens)),
            finished_bytes=0,
        ),
        arrays[0].lanes,
    )


def _reuse(schedule: Schedule, layout: Layout) -> tuple[float, float, float, float]:
    """Return the shares of queries and of keys that are found in memory; of partials that come back, those found on the
    device, and those found in memory at all.
    """
    grid = schedule.grid
    if isinstance(schedule, Rectangular):
        blocks = 2 * -(-grid.columns.chunk_tokens // layout.block_tokens)
        hits = total = 0
        before = 0
        for columns in schedule.columns:
            streamed = blocks * len(columns)
            hits += min(layout.cache_slots, before, streamed)
            total += streamed
            before = streamed
        return 0.0, hits / max(1, total), 1.0, 1.0
    ordered = gaps(grid.rows.chunks, layout.stride)
    seen = kept(ordered, layout.cache_slots / blocks_of_chunk(grid.rows, layout), 0)
    returns = max(1, len(ordered) - 1)
    found = []
    for places in (layout.resident_rows, layout.resident_rows + layout.parked_rows):
        all_fit = places >= grid.rows.filled
        found.append(1.0 if all_fit else min(1.0, kept(ordered, places - schedule.rows_per_task, 1) / returns))
    return seen / len(ordered), seen / len(ordered), found[0], found[1]


def blocks_of_chunk(axis: Axis, layout: Layout) -> int:
    """Return the blocks of a chunk of queries, keys and values."""
    return -(-axis.chunk_tokens // layout.query_tokens) + 2 * -(-axis.chunk_tokens // layout.block_tokens)


def kept(ordered: list[int], room: float, free: int) -> float:
    """Return how many of a chunk's uses fit the room: the soonest, each taking its place until it comes."""
    number = 0.0
    for gap in ordered[:-1]:
        if gap - free > room:
            return number + room / (gap - free)
        room -= gap - free
        number += 1
    return number


def _bytes(times: list[float], axis: Axis, stored: Stored, length: int, offset: int) -> float:
    """Return the bytes of all uses of an axis' chunks, from those of some chunks, evenly spread."""
    step = -(-len(times) // _CHUNKS_SAMPLED)
    total = seen = 0.0
    for chunk in range(step // 2, len(times), step):
        if times[chunk]:
            span = axis.span(chunk)
            start, stop = span.start + offset, span.stop + offset
            one = sum(stored.fetched_bytes(range(i, min(i + length, stop))) for i in range(start, stop, length))
            total, seen = total + times[chunk] * one, seen + times[chunk]
    return total * sum(times) / seen if seen else 0.0


def _of_all_lanes(work: Workload, grid: Grid, lane: Traffic, lanes: int) -> Traffic:
    """Return what all lanes move; what is fetched was counted for so many of them."""
    finished = 0
    if work.durable:
        tokens = work.group * grid.rows.tokens
        finished = tokens * (work.value_dim * work.out_itemsize + 4) + grid.rows.filled * FILE_HEADER_BYTES
    values = {name: value * work.lanes for name, value in vars(replace(lane, finished_bytes=finished)).items()}
    for name in ("fetched_bytes", "checked_bytes", "compressed_bytes"):
        values[name] //= lanes
    return Traffic(**values)
