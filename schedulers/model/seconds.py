"""The cost model: the seconds of a plan, from what it computes and moves. Pure arithmetic.

Reading, computing and writing what is finished go on at the same time, so a run takes as long as the slowest of them,
plus the queries and the first block that must be there before anything starts and the last row that is written after
everything.
"""

from dataclasses import dataclass

from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.masks.calls import Call, Packed, Tile, calls
from cqsa_stream.schedulers.model.memory import FILE_HEADER_BYTES, Layout, Workload, partial_file_bytes
from cqsa_stream.schedulers.model.rates import Rates, Speeds, TileTimes
from cqsa_stream.schedulers.model.traffic import Traffic
from cqsa_stream.schedulers.residency import pieces
from cqsa_stream.schedulers.tasks import Schedule

__all__ = ["Cost", "cost", "kernel_s"]

_ROWS_SAMPLED = 16
_BLOCKS_COUNTED = 64  # of a pair; of more, eight are


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
    readers: int = 1,
    writers: int = 1,
) -> Cost:
    """Price a plan whose kernel calls take ``kernel`` seconds in all, beside so many threads that read and write.

    ``cold_bytes`` come from the disk, the rest of what is fetched from the system's page cache.
    """
    grid, speeds = schedule.grid, rates.speeds
    staging = _staged_bytes(work, traffic, layout) / speeds.stage_bytes_per_s
    reader = _reader_s(traffic, speeds) + touched_bytes / speeds.touch_bytes_per_s
    files, data = _finishing(work, grid, layout)
    finished, finish = grid.rows.filled * work.lanes, files * speeds.file_s + data / speeds.write_bytes_per_s
    handing = traffic.blocks * speeds.block_s
    compute = _spilling_s(traffic, speeds) + (kernel + handing if layout.in_place else max(kernel, handing))
    if layout.in_place:  # threads of a kernel wait for the slowest of them
        compute += staging + reader + finished * files * speeds.file_lost_s
    warm_bytes = traffic.fetched_bytes - cold_bytes
    fetching = cold_bytes / speeds.read_bytes_per_s + warm_bytes * speeds.read_cpu_s / readers
    read = max(reader / readers, fetching)
    write = finished * finish / writers
    rows = schedule.rows_per_task if layout.in_place else 1  # whose queries come before the first call
    first = rows * work.group * grid.rows.chunk_tokens * work.head_dim * work.stored_itemsize
    fill = min(first + 2 * layout.slot_bytes, traffic.fetched_bytes) * fetching / max(1, traffic.fetched_bytes)
    drain = finish * min(schedule.ending_together(), grid.rows.filled)
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


def _staged_bytes(work: Workload, traffic: Traffic, layout: Layout) -> int:
    """Bytes that are copied to where the kernel reads; on the CPU it reads keys of its own dtype where they stand."""
    staged = traffic.query_tokens * work.group * work.head_dim
    if work.compute_itemsize != work.stored_itemsize or not layout.in_place:
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
    safe_points = -(-traffic.key_tokens // min(grid.columns.chunk_tokens, grid.columns.tokens))
    due = min(int(seconds / every_s), safe_points) if every_s else safe_points
    each = changed * partial_file_bytes(work, grid.rows.chunk_tokens, grid.columns.chunks)
    return due * work.durable, changed, each


def _finishing(work: Workload, grid: Grid, layout: Layout) -> tuple[int, int]:
    """Files and bytes of one row chunk's output, its lse, and the header that says it is finished."""
    if not work.durable:
        return 0, 0
    rows = min(grid.rows.chunk_tokens, grid.rows.tokens)
    files = work.group * (-(-rows // layout.out_tokens) + 1) + 1
    return files, rows * work.left_bytes + FILE_HEADER_BYTES


def _waits(schedule: Schedule, layout: Layout) -> float:
    """For how many finished rows of a lane the next task waits, because their places are not free yet."""
    if not layout.in_place:  # they leave at once, from elsewhere
        return 0.0
    together, spare = schedule.ending_together(), layout.resident_rows - schedule.rows_per_task
    return schedule.grid.rows.filled / schedule.rows_per_task * max(0, together - spare)


def kernel_s(work: Workload, grid: Grid, layout: Layout, tiles: TileTimes) -> float:
    """Return the seconds of all kernel calls of all lanes, from those of some rows, evenly spread."""
    filled = grid.rows.filled
    count = min(filled, _ROWS_SAMPLED)
    sampled = [round((i + 0.5) * filled / count - 0.5) for i in range(count)]
    known: dict[tuple[int, int, int], float] = {}
    total = sum(_row_s(row, work, grid, layout, tiles, known) for row in sampled)
    pairs = sum(len(grid.needed(row)) for row in sampled)
    return work.lanes * total * (grid.pairs / pairs if pairs else 0.0)


def _row_s(
    row: int, work: Workload, grid: Grid, layout: Layout, tiles: TileTimes, known: dict[tuple[int, int, int], float]
) -> float:
    """Seconds of one row chunk: columns that all its rows see take as long as each other."""
    span, axis = grid.rows.span(row), grid.columns

    def pair_s(column: int) -> float:
        return _pair_s(span, axis.span(column), work, grid, layout, tiles, known)

    seconds = 0.0
    for needed in grid.needed(row).ranges:
        whole = _seen_by_all(grid, span, needed)
        seconds += len(whole) * pair_s(whole.start) if whole else 0.0
        seconds += sum(map(pair_s, [*range(needed.start, whole.start), *range(whole.stop, needed.stop)]))
    return seconds


def _seen_by_all(grid: Grid, rows: range, columns: range) -> range:
    """Return the longest range of column chunks, of these, all whose keys all these rows see by one band."""
    size = grid.columns.chunk_tokens
    found = range(columns.start, columns.start)
    for seen in grid.mask.seen_by_all(rows):
        whole = range(max(columns.start, -(-seen.start // size)), min(columns.stop, seen.stop // size))
        found = max(found, whole, key=len)
    return found


def _pair_s(
    rows: range,
    keys: range,
    work: Workload,
    grid: Grid,
    layout: Layout,
    tiles: TileTimes,
    known: dict[tuple[int, int, int], float],
) -> float:
    """Seconds of a pair: where as many rows see as many scores of as many keys, they take as long."""
    kind = (len(rows), len(keys), grid.mask.scores(rows, keys))
    if kind not in known:
        if len(keys) > layout.block_tokens:
            blocks = list(pieces(keys, layout.block_tokens))
            sampled = blocks if len(blocks) <= _BLOCKS_COUNTED else blocks[len(blocks) // 16 :: len(blocks) // 8]
            seconds = sum(_pair_s(rows, block, work, grid, layout, tiles, known) for block in sampled)
            known[kind] = seconds * len(blocks) / len(sampled)
        else:
            found = calls(grid.mask, rows, keys, layout.tile)
            known[kind] = sum(_call_s(call, work.group, layout.tile, tiles) for call in found)
    return known[kind]


def _call_s(call: Call | Packed, group: int, tile: Tile, tiles: TileTimes) -> float:
    """Seconds of a call; a stack is as fast as its rows in one."""
    rows = group * len(call.rows)
    if isinstance(call, Packed):
        return tiles.tile_s(rows, call.width)
    if call.triangle:
        return tiles.call_s(group * call.height, len(call.columns), True, call.tiles)
    between = (call.left or 0) + (call.right or 0)
    return tiles.tile_s(rows, min(len(call.columns), between) if tile.skips and between else len(call.columns))
