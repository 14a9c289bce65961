"""The cost model: bytes moved and seconds of a plan, before it runs. Pure arithmetic."""

from dataclasses import dataclass

from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.memory import Layout, Workload, partial_bytes
from cqsa_stream.schedulers.schedules import Schedule

__all__ = ["Cost", "Rates", "Stored", "cost"]


@dataclass(frozen=True)
class Rates:
    """How fast a machine is: FLOP/s of the kernel, bytes/s of the disk, seconds for one durable commit and one call."""

    flops_per_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    commit_s: float
    call_s: float


@dataclass(frozen=True)
class Stored:
    """How an array lies on disk: what a read of some tokens of ``heads`` heads fetches."""

    axis_tokens: int
    chunk_tokens: int
    heads_fetched: int
    row_bytes: int

    def fetched_bytes(self, span: range, block_tokens: int) -> int:
        """Bytes fetched to read a span, block by block: stored chunks come whole."""
        if not span:
            return 0
        if self.chunk_tokens == 1:
            return len(span) * self.heads_fetched * self.row_bytes
        tokens = 0
        for start in range(span.start, span.stop, block_tokens):
            stop = min(start + block_tokens, span.stop)
            first = start // self.chunk_tokens * self.chunk_tokens
            tokens += min(-(-stop // self.chunk_tokens) * self.chunk_tokens, self.axis_tokens) - first
        return tokens * self.heads_fetched * self.row_bytes


@dataclass(frozen=True)
class Cost:
    """Bytes and seconds of all lanes. ``spills``: partials written to and read back from disk before their time."""

    bytes_read: int
    bytes_written: int
    spills: int
    seconds: float


def cost(
    work: Workload,
    grid: Grid,
    schedule: Schedule,
    layout: Layout,
    rates: Rates,
    arrays: tuple[Stored, Stored, Stored],
    first_query: int,
) -> Cost:
    """Price a plan: compute and reading overlap, commits do not."""
    times_row, times_column = schedule.loads()
    query, key, value = arrays
    query_block = max(1, layout.block_tokens * max(work.head_dim, work.value_dim) // (work.group * work.head_dim))
    read = _bytes(times_row, grid.rows, query, query_block, first_query)
    read += _bytes(times_column, grid.columns, key, layout.block_tokens, 0)
    read += _bytes(times_column, grid.columns, value, layout.block_tokens, 0)
    finished = sum(1 for n in times_row if n)
    spills = 0
    if layout.resident_rows < finished:
        spills = round((1 - layout.resident_rows / finished) * (sum(times_row) - finished))
    one = partial_bytes(work, grid.rows.chunk_tokens)
    written = work.group * grid.rows.tokens * (work.value_dim * work.out_itemsize + 4) + spills * one
    rows, columns = min(grid.rows.chunk_tokens, layout.tile_rows), min(layout.tile_columns, layout.block_tokens)
    calls = grid.pairs * -(-grid.rows.chunk_tokens // rows) * -(-grid.columns.chunk_tokens // columns)
    compute = work.flops * (1 + 40 / columns + 64 / rows) / rates.flops_per_s + calls * work.lanes * rates.call_s
    reading = work.lanes * (read + spills * one) / rates.read_bytes_per_s
    commits = work.lanes * (finished + spills) * rates.commit_s + work.lanes * written / rates.write_bytes_per_s
    return Cost(
        work.lanes * (read + spills * one),
        work.lanes * written,
        work.lanes * spills,
        max(compute, reading) + (commits if work.durable else 0.0),
    )


def _bytes(times: list[int], axis: Axis, stored: Stored, block_tokens: int, offset: int) -> int:
    total, exact = 0, {}
    for chunk, count in enumerate(times):
        if not count:
            continue
        span = axis.span(chunk)
        moved = range(span.start + offset, span.stop + offset)
        kind = (len(span), moved.start % stored.chunk_tokens, stored.axis_tokens - moved.stop < stored.chunk_tokens)
        if kind not in exact:
            exact[kind] = stored.fetched_bytes(moved, block_tokens)
        total += count * exact[kind]
    return total
