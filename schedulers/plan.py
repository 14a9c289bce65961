"""A plan: what will be done, what it will hold, move and take; and how it reads on a terminal and as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.model.crew import Crew
from cqsa_stream.schedulers.model.memory import Footprint, Layout
from cqsa_stream.schedulers.model.seconds import Cost
from cqsa_stream.schedulers.schedules import SCHEDULES

__all__ = ["Chosen", "Plan"]

_MOST_NAMES, _LONGEST_NAME = 64, 100


@dataclass(frozen=True)
class Chosen:
    """What the bits of a result depend on, besides the problem and the grid. ``layout``: the plan's, as a dict."""

    schedule: str
    layout: dict[str, Any]
    kernel: str
    operator: str

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Chosen":
        """Raises ValueError where this is not what a plan could have chosen, TypeError where it is no such dict."""
        found = cls(**fields)
        names = (found.schedule, found.kernel, found.operator)
        if not all(type(name) is str and len(name) <= _LONGEST_NAME for name in names) or names[0] not in SCHEDULES:
            raise ValueError(f"schedule, kernel and operator {str(names)[:_LONGEST_NAME]}")
        if type(found.layout) is not dict or not _is_sizes(found.layout):
            raise ValueError(f"a layout {str(found.layout)[:_LONGEST_NAME]}")
        return found


def _is_sizes(fields: dict[Any, Any], inner: bool = False) -> bool:
    """Return whether these are a layout's names and whole numbers; one level deeper, those of a tile."""
    return len(fields) <= _MOST_NAMES and all(
        type(value) is bool
        or (type(value) is int and 0 <= value < 2**62)
        or (type(value) is dict and not inner and _is_sizes(value, True))
        for value in fields.values()
    )


@dataclass(frozen=True)
class Plan:
    """A schedule over a grid, with what it will hold, move and take. Sizes in bytes, times in seconds.

    ``operator``: which of the operators of a kernel. ``least``: what the smallest plan for the same problem would hold.
    ``*_free_bytes``: what the machine has, and ``device_reserved_bytes`` what the driver and its libraries hold there
    besides; None where that is not known.
    ``scores``: those of one head that are visible. ``shares``: into how many the tasks are dealt, and ``crew``: what
    the workers take that compute them; the footprint is that of each, its disk that of all. ``candidates``: the best
    plan of each schedule weighed. ``about``: the problem, in a line.
    """

    schedule: str
    kernel: str
    operator: str
    grid: Grid
    layout: Layout
    tasks: int
    pairs: int
    flops: int
    cost: Cost
    footprint: Footprint
    least: Footprint
    device_allowed_bytes: int | None
    host_allowed_bytes: int
    device_free_bytes: int | None = None
    device_reserved_bytes: int | None = None
    host_free_bytes: int | None = None
    disk_free_bytes: int | None = None
    scores: int = 0
    shares: int = 1
    crew: Crew | None = None
    candidates: tuple["Plan", ...] = ()
    about: str = ""

    @property
    def chosen(self) -> Chosen:
        """What the bits of the result depend on."""
        return Chosen(self.schedule, asdict(self.layout), self.kernel, self.operator)

    @property
    def fits(self) -> bool:
        """Whether the plan keeps the budgets."""
        return self.footprint.host_bytes <= self.host_allowed_bytes and (
            self.device_allowed_bytes is None or self.footprint.device_bytes <= self.device_allowed_bytes
        )

    @property
    def density(self) -> float:
        """Which share of all scores is visible."""
        return self.scores / (self.grid.rows.tokens * self.grid.columns.tokens)

    def lacking(self) -> list[tuple[str, int, int]]:
        """Return (pool, projected, free) of each pool of which the machine has not enough, whatever the budgets say."""
        held = self.footprint
        pools = (
            ("device memory", held.device_bytes, self.device_free_bytes),
            ("host memory", held.host_bytes, self.host_free_bytes),
            ("disk", held.disk_bytes, self.disk_free_bytes),
        )
        return [(name, projected, free) for name, projected, free in pools if free is not None and projected > free]

    def predicted(self) -> dict[str, float]:
        """Return the figures that a run measures too, of all workers together."""
        workers = 1 if self.crew is None else self.crew.workers
        return {
            "seconds": self.cost.seconds,
            "bytes_read": self.cost.bytes_read,
            "bytes_written": self.cost.bytes_written,
            "host_bytes": workers * self.footprint.host_bytes,
            "device_bytes": workers * self.footprint.device_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return what ``cqsa plan --json`` prints."""
        held, kind = self.footprint, SCHEDULES[self.schedule]
        described = {
            "schedule": self.schedule,
            "chunks": self.grid.rows.chunks,
            "chunk_tokens": self.grid.rows.chunk_tokens,
            "column_chunks": self.grid.columns.chunks,
            "column_chunk_tokens": self.grid.columns.chunk_tokens,
            "quorum_size": self.layout.rows_per_task if kind.same_positions else None,
            "kernel": self.kernel,
            "operator": self.operator,
            "tile": asdict(self.layout.tile),
            "tasks": self.tasks,
            "shares": self.shares,
            "workers": 1 if self.crew is None else self.crew.workers,
            "crew": None if self.crew is None else asdict(self.crew),
            "pairs": self.pairs,
            "scores": self.scores,
            "density": self.density,
            "layout": asdict(self.layout),
            "device_projected_bytes": held.device_bytes,
            "host_projected_bytes": held.host_bytes,
            "pinned_projected_bytes": sum(held.pinned.values()),
            "disk_projected_bytes": held.disk_bytes,
            "device_reserved_bytes": self.device_reserved_bytes,
            "host_reserved_bytes": held.pageable["reserved"],
            "device_allowed_bytes": self.device_allowed_bytes,
            "host_allowed_bytes": self.host_allowed_bytes,
            "device_least_bytes": self.least.device_bytes,
            "host_least_bytes": self.least.host_bytes,
            "device_free_bytes": self.device_free_bytes,
            "host_free_bytes": self.host_free_bytes,
            "disk_free_bytes": self.disk_free_bytes,
            "memory": asdict(held),
            "fits": self.fits,
            "bytes_read": self.cost.bytes_read,
            "bytes_written": self.cost.bytes_written,
            "spills": self.cost.spills,
            "checkpoints": self.cost.checkpoints,
            "flops": self.flops,
            "seconds": self.cost.seconds,
            "streams_s": {
                "kernel": self.cost.kernel_s,
                "compute": self.cost.compute_s,
                "read": self.cost.read_s,
                "write": self.cost.write_s,
            },
        }
        if self.candidates:
            described["candidates"] = [candidate.to_dict() for candidate in self.candidates]
        return described

    def __str__(self) -> str:
        """Describe the plan, its pools, and the candidates side by side, the chosen one marked."""
        return _described(self)


def _described(plan: Plan) -> str:
    """Describe a plan, its pools, and the candidates side by side, the chosen one marked."""
    rows = plan.grid.rows
    lines = [
        *([plan.about, ""] if plan.about else []),
        f"schedule   {plan.schedule}: {plan.tasks} tasks of {plan.layout.rows_per_task} row chunks",
        f"grid       {rows.chunks} chunks of {rows.chunk_tokens} tokens, {plan.pairs} pairs, "
        f"{plan.flops / 1e12:,.3f} TFLOP",
        f"mask       {plan.grid.mask}: {100 * plan.density:.3g} % of the scores are visible",
        *_crew(plan.crew),
        "",
        *_columns([("memory", "projected", "reserved", "allowed", "free", ""), *_pools(plan)]),
        "",
        *_columns([("candidate", "chunks", "host", "device", "read", "written", "spills", "time", ""), *_rows(plan)]),
    ]
    for name, projected, free in plan.lacking():
        lines.append(f"{name}: {_size(projected)} needed, {_size(free)} free")
    if not plan.fits:
        device = f", device {_size(plan.least.device_bytes)}" if plan.device_allowed_bytes is not None else ""
        lines.append(f"the smallest that would do: host {_size(plan.least.host_bytes)}{device}")
    return "\n".join(lines)


def _crew(crew: Crew | None) -> list[str]:
    """Describe the workers, what they merge, and when the disk is their limit."""
    if crew is None:
        return []
    merge = f"{_size(crew.merge_bytes)} in {crew.merge_s:,.1f} s" if crew.merge_bytes else "nothing"
    limit = f"a disk that all share is the limit from {crew.disk_limits_at} workers on"
    if crew.workers >= crew.disk_limits_at:
        limit = f"the disk is the limit where all share one, as from {crew.disk_limits_at} workers on"
    return [
        f"workers    {crew.workers} for {crew.shares} shares: each reads {_size(crew.bytes_read_each)} and holds "
        f"{_size(crew.host_bytes_each)}",
        f"merge      {merge}; {limit}",
    ]


def _pools(plan: Plan) -> list[tuple[str, ...]]:
    held, over = plan.footprint, "OVER BUDGET"
    pools: list[tuple[str, ...]] = []
    if plan.device_allowed_bytes is not None:
        pools.append(
            ("device", _size(held.device_bytes), _size(plan.device_reserved_bytes),
             _size(plan.device_allowed_bytes), _size(plan.device_free_bytes),
             over if held.device_bytes > plan.device_allowed_bytes else "")
        )  # fmt: skip
    pools.append(
        ("host", _size(held.host_bytes), _size(held.pageable["reserved"]), _size(plan.host_allowed_bytes),
         _size(plan.host_free_bytes), over if held.host_bytes > plan.host_allowed_bytes else "")
    )  # fmt: skip
    if held.pinned:
        pools.append(("  pinned", _size(sum(held.pinned.values())), "", "", "", ""))
    if held.disk:
        pools.append(("disk", _size(held.disk_bytes), "", "", _size(plan.disk_free_bytes), ""))
    return pools


def _rows(shown: Plan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for plan in shown.candidates or (shown,):
        chosen = plan.schedule == shown.schedule
        verdict = "OVER BUDGET" if not plan.fits else "chosen" if chosen else ""
        rows.append(
            (f"{'*' if chosen else ' '} {plan.schedule}", str(plan.grid.rows.chunks),
             _size(plan.footprint.host_bytes), _size(plan.footprint.device_bytes or None),
             _size(plan.cost.bytes_read), _size(plan.cost.bytes_written), str(plan.cost.spills),
             f"{plan.cost.seconds:,.1f} s", verdict)
        )  # fmt: skip
    return rows


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:,.2f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:,.1f} MiB"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Align a table: the first and last columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    lines = (
        "  ".join(
            text.ljust(width) if i in (0, last) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return [line.rstrip() for line in lines]
