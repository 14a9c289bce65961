"""What a schedule moves, in bytes: counted by going through its tasks where they are few, else estimated.

Counting is a dry run: the same tasks, the same fetches, the same choice of what leaves memory as in the engine.
"""

from dataclasses import dataclass, replace

from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.memory import FILE_HEADER_BYTES, Layout, Workload, partial_file_bytes
from cqsa_stream.schedulers.residency import Residency, fetches
from cqsa_stream.schedulers.schedules import Cqs, Rectangular, Schedule, gaps

__all__ = ["Stored", "Traffic", "countable", "counted", "estimated", "kept"]

_MOST_COUNTED = 12_000  # fetches; more would take longer than planning should
_CHUNKS_SAMPLED = 64


@dataclass(frozen=True)
class Stored:
    """How an array lies on disk: what a read of some tokens of ``heads_fetched`` heads fetches.

    ``decoded``: read chunk by chunk through a decoder, not as a range of bytes.
    """

    axis_tokens: int
    chunk_tokens: int
    heads_fetched: int
    row_bytes: int
    decoded: bool = False

    @property
    def bytes(self) -> int:
        """All of one lane's tokens."""
        return self.axis_tokens * self.heads_fetched * self.row_bytes

    def fetched_bytes(self, span: range) -> int:
        """Return the bytes fetched to read a span: stored chunks come whole."""
        if not span:
            return 0
        first = span.start // self.chunk_tokens * self.chunk_tokens
        stop = min(-(-span.stop // self.chunk_tokens) * self.chunk_tokens, self.axis_tokens)
        return (stop - first) * self.heads_fetched * self.row_bytes


@dataclass(frozen=True)
class Traffic:
    """What all lanes move. ``fetched_bytes`` of the arrays from disk, of which ``decoded_bytes`` through a decoder.

    ``query_tokens`` and ``key_tokens`` go to the kernel's memory, each as often as it is used, in ``blocks``.
    ``spills``: partials written before their time, ``restores``: read back; their files have ``spilled_bytes`` and
    ``restored_bytes``.
    """

    fetched_bytes: int
    decoded_bytes: int
    query_tokens: int
    key_tokens: int
    blocks: int
    spills: int
    restores: int
    spilled_bytes: int
    restored_bytes: int
    finished_bytes: int

    @property
    def bytes_read(self) -> int:
        return self.fetched_bytes + self.restored_bytes

    @property
    def bytes_written(self) -> int:
        return self.spilled_bytes + self.finished_bytes


def countable(schedule: Schedule, layout: Layout) -> bool:
    """Return whether counting takes a moment only."""
    rows, columns = schedule.grid.rows, schedule.grid.columns
    visits = len(schedule) * schedule.rows_per_task
    streamed = visits if isinstance(schedule, Cqs) else len(schedule) * columns.filled
    queries = visits * -(-rows.chunk_tokens // layout.query_tokens)
    blocks = 2 * streamed * -(-columns.chunk_tokens // layout.block_tokens)
    return queries + blocks <= _MOST_COUNTED


def counted(
    work: Workload, schedule: Schedule, layout: Layout, arrays: tuple[Stored, Stored, Stored], first_query: int
) -> Traffic:
    """Go through the tasks of one lane as the engine will, and count."""
    count = _Count(work, schedule, layout, arrays, first_query)
    for number, task in enumerate(schedule.tasks(0)):
        count.rows(number, task.rows)
        for fetch in fetches(schedule, number, task, layout):
            count.fetch(fetch.array, fetch.tokens, fetch.next_use)
        for row, pairs in task.pairs_by_row().items():
            count.computed(row, pairs)
    return _of_all_lanes(work, schedule.grid, count.traffic())


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
        self._left = [len(needed) for needed in self._grid.needed]
        self._begun: set[int] = set()
        self._resident: dict[int, None] = {}
        self._fetched = self._decoded = self._spills = self._restores = self._spilled = self._restored = 0
        self._tokens = {"query": 0, "key": 0, "value": 0}
        self._blocks = 0

    def rows(self, number: int, rows: tuple[int, ...]) -> None:
        for row in rows:
            if row in self._resident:
                continue
            if len(self._resident) == self._layout.resident_rows:
                out = max(
                    (r for r in self._resident if r not in rows), key=lambda r: self._schedule.next_row(r, number)
                )
                del self._resident[out]
                self._spills += 1
                self._spilled += self._file_bytes(out)
            if row in self._begun:
                self._restores += 1
                self._restored += self._file_bytes(row)
            self._begun.add(row)
            self._resident[row] = None

    def fetch(self, array: str, tokens: range, next_use: int) -> None:
        self._tokens[array] += len(tokens)
        self._blocks += 1
        if self._slots.place((array, tokens.start), next_use)[1]:
            return
        found = self._known.get((array, tokens.start, tokens.stop))
        stored = self._arrays[array]
        if found is None:
            offset = self._offset[array]
            found = stored.fetched_bytes(range(tokens.start + offset, tokens.stop + offset))
            self._known[array, tokens.start, tokens.stop] = found
        self._fetched += found
        self._decoded += found * stored.decoded

    def computed(self, row: int, pairs: int) -> None:
        self._left[row] -= pairs
        if not self._left[row]:
            del self._resident[row]

    def traffic(self) -> Traffic:
        return Traffic(
            self._fetched,
            self._decoded,
            self._tokens["query"],
            self._tokens["key"],
            self._blocks,
            self._spills,
            self._restores,
            self._spilled,
            self._restored,
            0,
        )

    def _file_bytes(self, row: int) -> int:
        return partial_file_bytes(self._work, len(self._grid.rows.span(row)), self._grid.columns.chunks)


def estimated(
    work: Workload, schedule: Schedule, layout: Layout, arrays: tuple[Stored, Stored, Stored], first_query: int
) -> Traffic:
    """Estimate from how often chunks are used on average, and how many of these uses find them still in memory."""
    grid = schedule.grid
    times_row, times_column = schedule.loads()
    row_hits, column_hits, kept_rows = _reuse(schedule, layout)
    fetched = decoded = 0.0
    for stored, times, axis, length, offset, hits in (
        (arrays[0], times_row, grid.rows, layout.query_tokens, first_query, row_hits),
        (arrays[1], times_column, grid.columns, layout.block_tokens, 0, column_hits),
        (arrays[2], times_column, grid.columns, layout.block_tokens, 0, column_hits),
    ):
        found = _bytes(times, axis, stored, length, offset) * (1 - hits)
        fetched, decoded = fetched + found, decoded + found * stored.decoded
    one = partial_file_bytes(work, grid.rows.chunk_tokens, grid.columns.chunks)
    visits, begun = sum(times_row), sum(1 for n in times_row if n)
    spills = round((1 - kept_rows) * max(0.0, visits - begun))
    return _of_all_lanes(
        work,
        grid,
        Traffic(
            round(fetched),
            round(decoded),
            round(visits * min(grid.rows.chunk_tokens, grid.rows.tokens)),
            round(sum(times_column) * min(grid.columns.chunk_tokens, grid.columns.tokens)),
            round(
                visits * -(-grid.rows.chunk_tokens // layout.query_tokens)
                + 2 * sum(times_column) * -(-grid.columns.chunk_tokens // layout.block_tokens)
            ),
            spills,
            spills,
            spills * one,
            spills * one,
            0,
        ),
    )


def _reuse(schedule: Schedule, layout: Layout) -> tuple[float, float, float]:
    """Return the shares of queries, of keys and of partials (but their first use) that are found in memory."""
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
        return 0.0, hits / max(1, total), 1.0
    ordered = gaps(grid.rows.chunks, layout.stride)
    blocks = 2 * -(-grid.columns.chunk_tokens // layout.block_tokens)
    blocks += -(-grid.rows.chunk_tokens // layout.query_tokens)
    seen = kept(ordered, layout.cache_slots / blocks, 0)
    partials = kept(ordered, layout.resident_rows - schedule.rows_per_task, 1)
    returns = max(1, len(ordered) - 1)
    if layout.resident_rows >= grid.rows.filled:
        partials = returns
    return seen / len(ordered), seen / len(ordered), min(1.0, partials / returns)


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


def _of_all_lanes(work: Workload, grid: Grid, lane: Traffic) -> Traffic:
    finished = 0
    if work.durable:
        tokens = work.group * grid.rows.tokens
        finished = tokens * (work.value_dim * work.out_itemsize + 4) + grid.rows.filled * FILE_HEADER_BYTES
    values = {name: value * work.lanes for name, value in vars(replace(lane, finished_bytes=finished)).items()}
    return Traffic(**values)
