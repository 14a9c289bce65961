"""The memory model: how many bytes a plan holds, by pool and by purpose. Pure arithmetic.

Four pools: the device's memory; host memory, page-locked and pageable; disk. Where kernels compute in host memory there
is one pool, and the device's share is the host's. A budget is for the device, or for host memory of both kinds; the
disk is only held against what is free there.
"""

from dataclasses import dataclass
from typing import Any

from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.masks.calls import Tile
from cqsa_stream.schedulers.model.habits import Habits

__all__ = [
    "FILE_HEADER_BYTES",
    "Footprint",
    "Layout",
    "Workload",
    "footprint",
    "in_lines",
    "leaving_bytes",
    "partial_bytes",
    "partial_file_bytes",
    "query_tokens",
    "segments",
    "slot_bytes",
]

FILE_HEADER_BYTES = 4096  # of the file of a partial
PAGE_BYTES = 4096
_LINE_BYTES = 64  # of a processor's cache
_SLOT_OBJECTS_BYTES = 3 << 10  # kept of a buffer besides it: where it is, what stands in it, who waits for it
_SEGMENT = 2 << 20
_MOST = 1 << 48


@dataclass(frozen=True)
class Workload:
    """The numbers of a problem that planning needs, and what its stored arrays are like.

    ``row_bytes``, ``column_bytes``: what the sums by rows and by columns hold for each token, all heads of a lane;
    ``left_bytes``: what is left of the former in the output. ``staging_bytes``: the most that one piece of a read in
    flight holds besides its buffer. ``stored_itemsize``, ``compute_itemsize``, ``partial_itemsize``, ``out_itemsize``:
    bytes of one number on disk, on the device, in a partial, in the output. ``durable``: results go to disk, and
    partials can leave memory for it.
    ``calls_at_a_time``: kernel calls whose tiles are there at a time; ``score_bytes``: what one holds for each score,
    of ``score_columns`` keys at a time; ``workspace_bytes``: what its libraries take on a device. ``merged_at_once``: a
    tile is merged by one kernel, with nothing besides; ``merges``: by the kernel that attends, so that there is none;
    ``rounded_tiles``: it is of as many bits as the inputs.
    ``merged_shares``: rows may lie in several shares, whose partials are merged at the end.
    ``lower_edges``: some tiles have one.
    ``resident_output_bytes``: an output that stays in memory; ``kept_bytes``: what readers remember.
    """

    lanes: int
    group: int
    head_dim: int
    value_dim: int
    stored_itemsize: int
    compute_itemsize: int
    out_itemsize: int
    row_bytes: int
    left_bytes: int
    flops: int
    staging_bytes: int
    durable: bool
    resident_output_bytes: int
    calls_at_a_time: int = 1
    score_bytes: int = 0
    score_rows: int = 0
    score_columns: int = 0
    whole_dims: int = 0
    packing_bytes: int = 0
    workspace_bytes: int = 0
    merged_at_once: bool = False
    merges: bool = False
    merged_shares: bool = False
    rounded_tiles: bool = False
    lower_edges: bool = False
    column_bytes: int = 0
    partial_itemsize: int = 4
    kept_bytes: int = 0

    @property
    def scores(self) -> int:
        """The visible scores of one head."""
        return self.flops // (2 * (self.head_dim + self.value_dim) * self.group * self.lanes)


@dataclass(frozen=True)
class Layout:
    """The shapes of a run that take memory, in chunks and tokens.

    A task holds ``rows_per_task`` row chunks. ``query_places`` of queries (more than that, where the next task's are
    copied meanwhile), ``resident_rows`` and ``resident_columns`` of partials stand on the device, ``parked_rows`` more
    in host memory, and ``leaving_rows`` complete rows on their way to disk. Of host
    buffers of ``slot_bytes``, ``ring_slots`` hold what is read ahead and ``cache_slots`` what will be used again: a
    block of ``block_tokens`` keys or values, or ``query_tokens`` queries of all heads of the group. At most
    ``in_flight`` pieces of reads are under way. A kernel call takes at most a ``tile``; the output is stored
    ``out_tokens`` at a time; CQS takes every ``stride``-th quorum.
    """

    rows_per_task: int
    query_places: int
    resident_rows: int
    block_tokens: int
    query_tokens: int
    slot_bytes: int
    ring_slots: int
    cache_slots: int
    tile: Tile
    out_tokens: int
    resident_columns: int = 1
    parked_rows: int = 0
    leaving_rows: int = 0
    stride: int = 1
    in_flight: int = 1

    @property
    def slots(self) -> int:
        return self.ring_slots + self.cache_slots

    @property
    def in_place(self) -> bool:
        """Whether kernels compute in host memory, where complete rows leave from where they are."""
        return not self.leaving_rows

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Layout":
        """Raises ValueError, KeyError or TypeError where these are not the fields of a layout."""
        numbers = {**fields, **fields["tile"]}
        del numbers["tile"]
        flags = ("bands", "skips")
        least = {name: 0 for name in ("cache_slots", "parked_rows", "leaving_rows", "small", *flags)}
        numbers |= {name: int(numbers[name]) for name in flags}
        if not all(type(n) is int and least.get(name, 1) <= n < _MOST for name, n in numbers.items()):
            raise ValueError(f"{fields}; expected whole numbers")
        return cls(**{**fields, "tile": Tile(**fields["tile"])})


@dataclass(frozen=True)
class Footprint:
    """Projected bytes by purpose, for each pool."""

    device: dict[str, int]
    pinned: dict[str, int]
    pageable: dict[str, int]
    disk: dict[str, int]

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.pinned.values()) + sum(self.pageable.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())


def in_lines(size: int) -> int:
    """Return the size rounded up to whole cache lines: what lies elsewhere would be summed in another order."""
    return -(-size // _LINE_BYTES) * _LINE_BYTES


def slot_bytes(work: Workload, block_tokens: int) -> int:
    """Return the size of one host buffer: a block of one array, or one token of all the group's queries.

    In whole pages, and one more, so that numbers can begin in it where they do in a page of their file.
    """
    numbers = max(max(work.head_dim, work.value_dim) * block_tokens, work.group * work.head_dim)
    return (-(-numbers * work.stored_itemsize // PAGE_BYTES) + 1) * PAGE_BYTES


def query_tokens(work: Workload, block_tokens: int) -> int:
    """Return how many tokens of all the group's queries fit one host buffer."""
    return max(1, block_tokens * max(work.head_dim, work.value_dim) // (work.group * work.head_dim))


def partial_bytes(work: Workload, rows: int) -> int:
    """Return the size of the partials of so many query rows."""
    return rows * work.row_bytes


def leaving_bytes(work: Workload, rows: int) -> int:
    """Return the size of a row chunk as it leaves a device, rounded for the output, in whole pages."""
    return rows * work.left_bytes + 2 * PAGE_BYTES


def partial_file_bytes(work: Workload, rows: int, columns: int) -> int:
    """Return the size of a partial's file: a header, a bit for each of the column chunks, the numbers."""
    return FILE_HEADER_BYTES + -(-columns // 8) + partial_bytes(work, rows)


def footprint(
    work: Workload, rows: Axis, columns: Axis, layout: Layout, stored_partials: int, habits: Habits, host_reserved: int
) -> Footprint:
    """Return what a run of this layout holds at most, with so many partials on disk at a time."""
    count = rows.chunk_tokens
    block = in_lines(layout.block_tokens * (work.head_dim + work.value_dim) * work.compute_itemsize)
    narrow = work.compute_itemsize != work.stored_itemsize
    tile = _tile(work, min(count, layout.tile.rows), layout)
    on_device = {
        "queries": layout.query_places * in_lines(work.group * count * work.head_dim * work.compute_itemsize),
        "partials": layout.resident_rows * partial_bytes(work, count)
        + layout.resident_columns * work.column_bytes * columns.chunk_tokens,
        "tile": work.calls_at_a_time * sum(tile),
    }
    staged = {"ring": layout.ring_slots * layout.slot_bytes, "cache": layout.cache_slots * layout.slot_bytes}
    writing = layout.out_tokens * 3 * work.value_dim * work.out_itemsize + 8 * work.group * count
    pageable = {
        "reading": layout.in_flight * work.staging_bytes + work.kept_bytes,
        "writing": habits.writers * writing,
        "output": work.resident_output_bytes,
        "buffers' objects": layout.slots * _SLOT_OBJECTS_BYTES,
        "reserved": host_reserved,
    }
    if work.merged_shares:  # two partials, when no task holds any
        beside = 0 if habits.own_memory else on_device["partials"]
        pageable["merging"] = max(0, 2 * partial_bytes(work, count) - beside)
    disk = _disk(work, rows, columns, stored_partials) if work.durable else {}
    if not habits.own_memory:
        return Footprint({}, {}, {**on_device, "upcast": block * narrow, **staged, **pageable}, disk)
    leaving = leaving_bytes(work, count)
    staged["leaving"] = layout.leaving_rows * leaving
    staged["partials"] = layout.parked_rows * (partial_bytes(work, count) + 2 * PAGE_BYTES)
    pageable["partial staging"] = partial_bytes(work, count)
    as_stored, blocks = layout.slot_bytes * narrow, habits.block_buffers * block
    on_device |= {"blocks": blocks + as_stored, "leaving": leaving, "libraries": work.workspace_bytes}
    held = [on_device[name] for name in ("partials", "leaving", "queries", "libraries")] + [blocks, as_stored]
    whole = segments(held) + work.calls_at_a_time * segments(tile)
    on_device["allocator"] = whole - sum(on_device.values())
    return Footprint(on_device, staged, pageable, disk)


def _disk(work: Workload, rows: Axis, columns: Axis, stored_partials: int) -> dict[str, int]:
    """The output; the partials of one lane, one of them being replaced; a header for each row that is finished."""
    return {
        "output": work.lanes * rows.tokens * work.left_bytes,
        "partials": (stored_partials + 1) * partial_file_bytes(work, rows.chunk_tokens, columns.chunks)
        + work.lanes * rows.filled * FILE_HEADER_BYTES,
    }


def _tile(work: Workload, rows: int, layout: Layout) -> list[int]:
    """What one kernel call and its merge hold: out, lse and float64 weights, zero-padded operands, scores."""
    if work.merges:
        return [work.packing_bytes]
    width = max(work.head_dim, work.value_dim)
    heads_rows = work.group * rows
    parts = [heads_rows * work.partial_itemsize * width, heads_rows * (4 + 5 * 8)]
    if work.merged_at_once:
        unseen = [heads_rows] * 3  # which rows saw no key
        itemsize = min(work.compute_itemsize, work.partial_itemsize) if work.rounded_tiles else work.partial_itemsize
        parts = [heads_rows * itemsize * width, heads_rows * 8, *unseen]
    elif work.compute_itemsize < work.partial_itemsize:  # before it is widened
        parts.append(heads_rows * work.compute_itemsize * width)
    if work.group > 1:  # queries and results of stacked diagonal tiles, reordered
        parts += [
            heads_rows * work.head_dim * work.compute_itemsize,
            heads_rows * work.partial_itemsize * work.value_dim,
        ]
    if work.whole_dims and (work.head_dim != work.value_dim or width % work.whole_dims):
        parts.append((heads_rows + 2 * layout.tile.columns) * (width + work.whole_dims) * work.compute_itemsize)
    if work.lower_edges and layout.tile.bands and not layout.tile.skips:  # what is added to the scores, of four tiles
        widest = min(layout.tile.columns, 5 * layout.tile.leaf)
        parts += [4 * layout.tile.edge * widest * work.compute_itemsize]
    columns = max(layout.tile.columns, layout.tile.leaf)
    score_rows = work.group * min(rows, work.score_rows)
    return [*parts, work.packing_bytes, score_rows * min(columns, work.score_columns) * work.score_bytes]


def segments(sizes: list[int]) -> int:
    """Return what torch's CUDA allocator holds for tensors of these sizes: those up to 1 MiB in segments of 2 MiB,
    those below 10 MiB in segments of 20 MiB, each larger one in its own, of whole 2 MiB.

    (c10/cuda/CUDACachingAllocator.cpp: kSmallSize, kMinLargeAlloc, kLargeBuffer, kRoundLarge.)
    """
    small = large = 0
    left: list[int] = []  # in segments of 20 MiB
    for size in sizes:
        size = -(-size // 512) * 512
        if size <= 1 << 20:
            small += size
        elif size >= 10 << 20:
            large += -(-size // _SEGMENT) * _SEGMENT
        elif (place := next((i for i, room in enumerate(left) if room >= size), None)) is not None:
            left[place] -= size
        else:
            left.append((20 << 20) - size)
    return large + len(left) * (20 << 20) + -(-small // _SEGMENT) * _SEGMENT
