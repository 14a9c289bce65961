"""The memory model: how many bytes a plan holds, by pool and by purpose. Pure arithmetic.

Two pools: what lies on the device, and what lies in host memory. On the CPU both are one, the host's.
"""

from dataclasses import dataclass

from cqsa_stream.schedulers.grid import Grid

__all__ = ["Footprint", "Layout", "Workload", "footprint", "partial_bytes", "slot_bytes"]


@dataclass(frozen=True)
class Workload:
    """The numbers of a problem that planning needs, and what its stored arrays are like.

    ``staging_bytes``: the most that any one read holds besides its buffer. ``stored_itemsize``, ``compute_itemsize``,
    ``out_itemsize``: bytes of one number on disk, on the device, in the output. ``durable``: partials can leave memory
    for disk. ``resident_output_bytes``: an output that stays in memory.
    """

    lanes: int
    group: int
    head_dim: int
    value_dim: int
    stored_itemsize: int
    compute_itemsize: int
    out_itemsize: int
    flops: int
    staging_bytes: int
    durable: bool
    resident_output_bytes: int


@dataclass(frozen=True)
class Layout:
    """The shapes of a run that take memory, in chunks and tokens.

    ``rows_per_task`` row chunks' queries and ``resident_rows`` row chunks' partials stand on the device; ``ring_slots``
    buffers of ``block_tokens`` tokens each hold what is read ahead; a kernel call takes at most ``tile_rows`` by
    ``tile_columns``, a causal one ``leaf`` by ``leaf``; the output is written ``out_tokens`` at a time.
    """

    rows_per_task: int
    resident_rows: int
    block_tokens: int
    ring_slots: int
    tile_rows: int
    tile_columns: int
    leaf: int
    out_tokens: int


@dataclass(frozen=True)
class Footprint:
    """Projected bytes by purpose, for each pool."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def slot_bytes(head_dim: int, value_dim: int, group: int, itemsize: int, block_tokens: int) -> int:
    """Return the size of one ring buffer: a block of one array, or one token of all the group's queries."""
    return max(max(head_dim, value_dim) * block_tokens, group * head_dim) * itemsize


def partial_bytes(work: Workload, rows: int) -> int:
    """Return the size of a partial of so many query rows: out in float32, lse in float64."""
    return work.group * rows * (4 * work.value_dim + 8)


def footprint(
    work: Workload, grid: Grid, layout: Layout, device: str, device_reserved: int, host_reserved: int
) -> Footprint:
    """Return what a run of this layout holds at most."""
    rows = grid.rows.chunk_tokens
    block = layout.block_tokens * (work.head_dim + work.value_dim) * work.compute_itemsize
    on_device = {
        "queries": layout.rows_per_task * work.group * rows * work.head_dim * work.compute_itemsize,
        "partials": layout.resident_rows * partial_bytes(work, rows),
        "tile": _tile_bytes(work, min(rows, layout.tile_rows), layout, device),
    }
    writing = layout.out_tokens * 3 * work.value_dim * work.out_itemsize + 8 * work.group * rows
    in_host = {
        "ring": layout.ring_slots
        * slot_bytes(work.head_dim, work.value_dim, work.group, work.stored_itemsize, layout.block_tokens),
        "reading": work.staging_bytes,
        "writing": writing,
        "output": work.resident_output_bytes,
        "reserved": host_reserved,
    }
    if device == "cpu":
        upcast = block if work.compute_itemsize != work.stored_itemsize else 0
        return Footprint({}, {**on_device, "upcast": upcast, **in_host})
    in_host["partial staging"] = partial_bytes(work, rows)
    return Footprint({**on_device, "blocks": 2 * block, "reserved": device_reserved}, in_host)


def _tile_bytes(work: Workload, rows: int, layout: Layout, device: str) -> int:
    """What one kernel call and its merge hold: out and lse, float64 weights, zero-padded operands, scores."""
    width = max(work.head_dim, work.value_dim)
    heads_rows = work.group * rows
    result = heads_rows * (4 * width + 4 + 5 * 8)
    if work.group > 1:  # queries and results of stacked diagonal tiles, reordered
        result += heads_rows * (work.head_dim * work.compute_itemsize + 4 * work.value_dim)
    if device == "cuda":
        result += heads_rows * 2 * width  # the 16-bit result before it is widened
    padded = 0
    if work.head_dim != work.value_dim or (device == "cuda" and width % 8):
        padded = (heads_rows + 2 * layout.tile_columns) * (width + 8) * work.compute_itemsize
    scores = 0
    if device == "cuda" and work.compute_itemsize == 4:  # the plain kernel writes its scores out
        scores = 3 * heads_rows * max(layout.tile_columns, layout.leaf) * 4
    return result + padded + scores
