"""A plan: what will be done, what it will hold, move and take; and how it reads as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.model.crew import Crew
from cqsa_stream.schedulers.model.memory import Footprint, Layout
from cqsa_stream.schedulers.model.seconds import Cost
from cqsa_stream.schedulers.plan_text import plan_html, plan_text
from cqsa_stream.schedulers.schedules import SCHEDULES

__all__ = ["Begun", "Chosen", "Plan"]

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
class Begun:
    """What is on disk of a run that a plan would continue: pairs, and their operations; ``flops_total`` of all."""

    pairs_done: int
    pairs_total: int
    flops_done: int
    flops_total: int


@dataclass(frozen=True)
class Plan:
    """A schedule over a grid, with what it will hold, move and take. Sizes in bytes, times in seconds.

    ``operator``: which of the operators of a kernel. ``least``: what the smallest plan for the same problem would hold.
    ``*_free_bytes``: what the machine has, and ``device_reserved_bytes`` what the driver and its libraries hold there
    besides; None where that is not known.
    ``scores``: those of one head that are visible. ``shares``: into how many the tasks are dealt, and ``crew``: what
    the workers take that compute them; the footprint is that of each, its disk that of all. ``candidates``: the best
    plan of each schedule weighed. ``about``: the problem, in a line. ``calibrated``: whether the seconds rest on what
    ``cqsa bench`` measured here. ``begun``: what is done already of the run that it would continue.
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
    calibrated: bool = False
    begun: Begun | None = None

    @property
    def seconds_left(self) -> float:
        """The seconds of what is not done yet, of all where nothing has begun."""
        done = 0.0 if self.begun is None else self.begun.flops_done / max(1, self.begun.flops_total)
        return self.cost.seconds * (1 - done)

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

    def predicted(self, left: float = 1.0) -> dict[str, float]:
        """Return the figures that a session measures too, of all workers, where so much of the work is left."""
        workers = 1 if self.crew is None else self.crew.workers
        return {
            "seconds": self.cost.seconds * left,
            "bytes_read": round(self.cost.bytes_read * left),
            "bytes_written": round(self.cost.bytes_written * left),
            "host_bytes": workers * self.footprint.host_bytes,
            "device_bytes": workers * self.footprint.device_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return what ``cqsa plan --json`` prints."""
        held, kind = self.footprint, SCHEDULES[self.schedule]
        described = {
            "about": self.about,
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
            "mask": str(self.grid.mask),
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
            "seconds_left": self.seconds_left,
            "calibrated": self.calibrated,
            "begun": None if self.begun is None else asdict(self.begun),
            "lacking": [list(pool) for pool in self.lacking()],
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
        """Say whether the plan fits, what it takes, and the candidates side by side."""
        return plan_text(self.to_dict())

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        return plan_html(self.to_dict())
