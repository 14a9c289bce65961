"""The cost model: the seconds of a plan, from what it computes and moves. Pure arithmetic.

Reading, computing and writing what is finished go on at the same time, so a run takes as long as the slowest of them,
plus the queries and the first block that must be there before anything starts and the last row that is written after
everything.
"""

from dataclasses import dataclass

from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.model.memory import FILE_HEADER_BYTES, Layout, Workload, partial_file_bytes
from cqsa_stream.schedulers.model.rates import Rates, Speeds, TileTimes
from cqsa_stream.schedulers.model.traffic import Traffic
from cqsa_stream.schedulers.schedules import Schedule

__all__ = ["Cost", "cost", "kernel_s"]

_ROWS_SAMPLED = 16


@dataclass(frozen=True)
class Cost:
    """Bytes and seconds of all lanes, by what works at the same time. ``spills``: partials that leave memory for disk
    before they are finished; ``checkpoints``: how many fall due; ``blocks`` go to the kernel, ``files`` are written.
    """

    bytes_read: int
    bytes_written: int
    spills: int
    checkpoints: int
    seconds: float
    kernel_s: float
    compute_s: float
    read_s: float
    write_s: float
    blocks: int
    files: int


def cost(
    work: Workload,
    schedule: Schedule,
    layout: Layout,
    traffic: Traffic,
    kernel: float,
    rates: Rates,
    checkpoint_every_s: float,
    cold_bytes: int,
    touched_bytes: int,
) -> Cost:
    """Price a plan whose kernel calls take ``kernel`` seconds in all.

    ``cold_bytes`` come from the disk, the rest of what is fetched from the system's page cache.
    """
    grid, speeds = schedule.grid, rates.speeds
    staging = _staged_bytes(work, traffic, speeds) / speeds.stage_bytes_per_s
    reader = _reader_s(traffic, speeds) + touched_bytes / speeds.touch_bytes_per_s
    files, data = _finishing(work, grid, layout) if work.durable else (0, 0)
    finished, finish = grid.rows.filled * work.lanes, files * speeds.file_s + data / speeds.write_bytes_per_s
    compute = kernel + traffic.blocks * speeds.block_s + _spilling_s(traffic, speeds)
    compute += staging + reader if speeds.on_processor else 0.0
    compute += finished * files * speeds.file_lost_s
    warm_bytes = traffic.fetched_bytes - cold_bytes
    read = max(reader, cold_bytes / speeds.read_bytes_per_s + warm_bytes * speeds.read_cpu_s)
    write = finished * finish
    first = schedule.rows_per_task * work.group * grid.rows.chunk_tokens * work.head_dim * work.stored_itemsize
    fill = (min(first, traffic.fetched_bytes) + 2 * layout.slot_bytes) / speeds.read_bytes_per_s
    drain = finish * min(_rows_ending_together(schedule), grid.rows.filled)
    waiting = _waits(schedule, layout) * finish * work.lanes
    seconds = fill + max(compute + waiting, staging, read, write) + drain
    checkpoints, partials, each = _checkpoints(work, schedule, layout, traffic, checkpoint_every_s, seconds)
    return Cost(
        bytes_read=traffic.bytes_read,
        bytes_written=traffic.bytes_written + checkpoints * each,
        spills=traffic.spills,
        checkpoints=checkpoints,
        seconds=seconds + checkpoints * (partials * speeds.file_s + each / speeds.write_bytes_per_s),
        kernel_s=kernel,
        compute_s=compute,
        read_s=read,
        write_s=write,
        blocks=traffic.blocks,
        files=finished * files,
    )


def _staged_bytes(work: Workload, traffic: Traffic, speeds: Speeds) -> int:
    """Bytes that are copied to where the kernel reads; on the CPU it reads keys of its own dtype where they stand."""
    staged = traffic.query_tokens * work.group * work.head_dim
    if work.compute_itemsize != work.stored_itemsize or not speeds.on_processor:
        staged += traffic.key_tokens * (work.head_dim + work.value_dim)
    return staged * work.compute_itemsize


def _reader_s(traffic: Traffic, speeds: Speeds) -> float:
    plain = traffic.fetched_bytes - traffic.checked_bytes - traffic.compressed_bytes
    coded = traffic.checked_bytes * speeds.check_cpu_s + traffic.compressed_bytes * speeds.expand_cpu_s
    return plain * speeds.read_cpu_s + coded


def _spilling_s(traffic: Traffic, speeds: Speeds) -> float:
    """Seconds in which the kernels wait for partials to leave and to come back."""
    leaving = traffic.spills * speeds.file_s + traffic.spilled_bytes / speeds.write_bytes_per_s
    coming = traffic.restored_bytes * max(speeds.read_cpu_s, 1 / speeds.read_bytes_per_s)
    return leaving + coming + traffic.parked_bytes / speeds.stage_bytes_per_s


def _checkpoints(
    work: Workload, schedule: Schedule, layout: Layout, traffic: Traffic, every_s: float, seconds: float
) -> tuple[int, int, int]:
    """Return how many checkpoints fall due in a run of so many seconds, and the partials and bytes of each."""
    grid = schedule.grid
    held = min(layout.resident_rows, grid.rows.filled) + layout.parked_rows
    between = every_s * len(schedule) * work.lanes / seconds  # tasks from one checkpoint to the next
    changed = min(held, round((1 + between) * schedule.rows_per_task))
    safe_points = traffic.key_tokens // min(grid.columns.chunk_tokens, grid.columns.tokens)
    due = min(int(seconds / every_s), safe_points) if every_s else safe_points
    each = changed * partial_file_bytes(work, grid.rows.chunk_tokens, grid.columns.chunks)
    return due * work.durable, changed, each


def _finishing(work: Workload, grid: Grid, layout: Layout) -> tuple[int, int]:
    """Files and bytes of one row chunk's output, its lse, and the word that it is finished."""
    rows = min(grid.rows.chunk_tokens, grid.rows.tokens)
    files = work.group * (-(-rows // layout.out_tokens) + 1) + 1
    return files, work.group * rows * (work.value_dim * work.out_itemsize + 4) + FILE_HEADER_BYTES


def _rows_ending_together(schedule: Schedule) -> int:
    """How many rows need their last column at the same time: those of a task, where all see all keys."""
    last = [len(needed) for needed in schedule.grid.needed if needed]
    if schedule.name == "rectangular" and len(set(last[-schedule.rows_per_task :])) > 1:
        return 1
    return schedule.rows_per_task


def _waits(schedule: Schedule, layout: Layout) -> float:
    """For how many finished rows of a lane the next task waits, because their places are not free yet."""
    if layout.leaving_rows:  # they leave at once, from elsewhere
        return 0.0
    spare = layout.resident_rows - schedule.rows_per_task
    if schedule.name == "cqs":
        return schedule.grid.rows.filled * max(0.0, 1 - spare / schedule.rows_per_task)
    return max(0, _rows_ending_together(schedule) - spare) * len(schedule)


def kernel_s(work: Workload, grid: Grid, layout: Layout, mask: Mask, tiles: TileTimes) -> float:
    """Return the seconds of all kernel calls of all lanes, from those of some rows, evenly spread."""
    filled = grid.rows.filled
    count = min(filled, _ROWS_SAMPLED)
    sampled = [round((i + 0.5) * filled / count - 0.5) for i in range(count)]
    known: dict[tuple[int, int, int], float] = {}
    total = sum(_row_s(row, work, grid, layout, mask, tiles, known) for row in sampled)
    pairs = sum(len(grid.needed[row]) for row in sampled)
    return work.lanes * total * (grid.pairs / pairs if pairs else 0.0)


def _row_s(
    row: int,
    work: Workload,
    grid: Grid,
    layout: Layout,
    mask: Mask,
    tiles: TileTimes,
    known: dict[tuple[int, int, int], float],
) -> float:
    """Seconds of one row chunk: columns that all its rows see take as long as each other."""
    span, columns = grid.rows.span(row), grid.needed[row]
    first, last = mask.seen_by(span.start), mask.seen_by(span.stop - 1)
    start, stop = max(first.start, last.start), min(first.stop, last.stop)
    unit = grid.columns.chunk_tokens
    whole = range(max(columns.start, -(-start // unit)), min(columns.stop, stop // unit))
    seconds = 0.0
    if whole:
        seconds = len(whole) * _pair_s(span, grid.columns.span(whole.start), work, layout, mask, tiles, known)
    for column in (*range(columns.start, whole.start), *range(whole.stop, columns.stop)) if whole else columns:
        seconds += _pair_s(span, grid.columns.span(column), work, layout, mask, tiles, known)
    return seconds


def _pair_s(
    rows: range,
    keys: range,
    work: Workload,
    layout: Layout,
    mask: Mask,
    tiles: TileTimes,
    known: dict[tuple[int, int, int], float],
) -> float:
    seen = mask.scores(rows, keys)
    kind = (len(rows), len(keys), seen)
    if kind not in known:
        total = 0.0
        for start in range(keys.start, keys.stop, layout.block_tokens):
            block = range(start, min(start + layout.block_tokens, keys.stop))
            for call in mask.calls(rows, block, layout.tile):
                side = len(call.rows) // call.tiles
                columns = len(call.columns) // call.tiles
                total += tiles.call_s(work.group * side, columns, call.mask == "causal", call.tiles)
        known[kind] = total
    return known[kind]
