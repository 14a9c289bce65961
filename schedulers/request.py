"""What a plan is asked for: the work and how it is stored, and the machine that is to do it."""

from dataclasses import dataclass

from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.masks.calls import Tile
from cqsa_stream.schedulers.model.habits import Habits
from cqsa_stream.schedulers.model.memory import Workload
from cqsa_stream.schedulers.model.rates import Rates
from cqsa_stream.schedulers.model.traffic import Stored
from cqsa_stream.schedulers.schedules import AUTO

__all__ = ["Machine", "Request"]


@dataclass(frozen=True)
class Machine:
    """A device as the planner sees it: budgets and what is free in bytes, rates, and the shapes that its kernel likes.

    A plan is chosen by ``rates``; its seconds are estimated by ``measured``: without a calibration, what a quick trial
    found, which must not change the plan from one day to the next. ``step_flops`` bounds the work between two moments
    at which a run can stop. ``turn``: rows of a call that keep all processors of the device busy to its end, as do
    multiples of it. ``host_reserved_bytes`` are the libraries' own, counted in the budget;
    ``device_reserved_bytes``, the driver's own and its libraries', are held besides it. What is None is not there, or
    not known. ``calibrated``: whether ``rates`` were measured here by ``cqsa bench``.
    """

    kernel: str
    operator: str
    habits: Habits
    device_allowed_bytes: int | None
    host_allowed_bytes: int
    host_reserved_bytes: int
    rates: Rates
    measured: Rates
    tile: Tile
    step_flops: float
    turn: int = 1
    device_free_bytes: int | None = None
    device_reserved_bytes: int | None = None
    host_free_bytes: int | None = None
    host_total_bytes: int | None = None
    disk_free_bytes: int | None = None
    calibrated: bool = False


@dataclass(frozen=True)
class Request:
    """What is to be planned. ``chunks`` and ``schedule`` are given where a user forces them; ``grid`` and
    ``out_tokens`` where a run has begun, whose output is stored in chunks of so many tokens.

    ``shares``: into how many lists the tasks are dealt, which ``workers`` compute at the same time, on one machine
    where they are ``together``.
    ``cached``: the share of the arrays that the system holds in memory now: it changes what a plan takes, not which.
    ``mask`` is over (query rows, keys), both counted from 0; ``arrays``: how query, key and value are stored.
    """

    work: Workload
    queries: int
    keys: int
    same_positions: bool
    mask: Mask
    arrays: tuple[Stored, Stored, Stored]
    cached: float = 0.0
    checkpoint_every_s: float = 60.0
    schedule: str = AUTO
    chunks: int | None = None
    grid: Grid | None = None
    out_tokens: int | None = None
    shares: int = 1
    workers: int = 1
    together: bool = True
