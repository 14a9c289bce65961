"""What several workers take, each and together: what they read and hold, and what the merge of their partials moves."""

from dataclasses import dataclass
from math import ceil

from cqsa_stream.schedulers.model.memory import Layout, Workload, partial_file_bytes
from cqsa_stream.schedulers.model.rates import Speeds
from cqsa_stream.schedulers.model.seconds import Cost
from cqsa_stream.schedulers.shares import Share
from cqsa_stream.schedulers.tasks import Schedule

__all__ = ["Crew", "crew"]

_MOST_PAIRS = 2_000_000  # of shares that are gone through; of more it is estimated which rows they hold


@dataclass(frozen=True)
class Crew:
    """So many workers of a run: ``seconds`` until the rows are there, of which ``merge_s`` for merging; what each reads
    and holds; ``merge_bytes`` of partials of several shares are written, and read again; from ``disk_limits_at``
    workers on, one disk from which all read is the limit.
    """

    workers: int
    shares: int
    seconds: float
    merge_s: float
    bytes_read_each: int
    host_bytes_each: int
    merge_bytes: int
    disk_limits_at: int


def crew(
    work: Workload,
    schedule: Schedule,
    layout: Layout,
    cost: Cost,
    speeds: Speeds,
    shares: int,
    workers: int,
    host_bytes: int,
    *,
    one_processor: bool,
) -> Crew:
    """Return what a run of this cost for one worker is for several. ``one_processor``: they share it, and its threads
    are dealt to them: together they are as fast as one.
    """
    turns = ceil(shares / workers)  # of the busiest worker
    part = 1.0 if one_processor else turns / shares
    merged = _merged_bytes(work, schedule, shares)
    merging = merged / speeds.write_bytes_per_s + merged / speeds.read_bytes_per_s
    disk = cost.bytes_read / speeds.read_bytes_per_s
    return Crew(
        workers=workers,
        shares=shares,
        seconds=max(cost.seconds * part, disk) + merging,
        merge_s=merging,
        bytes_read_each=cost.bytes_read * turns // shares,
        host_bytes_each=host_bytes,
        merge_bytes=merged,
        disk_limits_at=max(1, ceil(cost.compute_s / max(disk, 1e-9))),
    )


def _merged_bytes(work: Workload, schedule: Schedule, shares: int) -> int:
    """Return the bytes of the partials of rows that lie in several shares."""
    grid, tasks = schedule.grid, len(schedule) * work.lanes
    owned = not schedule.returns and tasks >= shares
    if owned:  # a row is in one task, and a task in one share
        return 0
    if grid.pairs * work.lanes <= _MOST_PAIRS:
        held: dict[tuple[int, int], int] = {}
        for number in range(shares):
            rows = {
                (lane, row)
                for lane in range(work.lanes)
                for task in Share(number, shares).tasks(schedule, lane, work.lanes)
                for row in task.rows
            }
            for row in rows:
                held[row] = held.get(row, 0) + 1
        partials = sum(count for count in held.values() if count > 1)
    else:  # as if a share's tasks held rows by chance
        each, lanes = tasks / shares, min(work.lanes, ceil(work.lanes / shares))
        share = 1 - (1 - schedule.rows_per_task / grid.rows.filled) ** (each / lanes)
        partials = round(shares * lanes * grid.rows.filled * share) if shares > work.lanes else 0
    return partials * partial_file_bytes(work, grid.rows.chunk_tokens, grid.columns.chunks)
