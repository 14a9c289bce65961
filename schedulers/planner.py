"""The planner: how many chunks, which schedule and what shapes, under the budgets; a plan says what a run will need."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product, takewhile
from typing import Any

from cqsa_stream.schedulers.costs import Cost, Rates, Stored, cost
from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.memory import Footprint, Layout, Workload, footprint
from cqsa_stream.schedulers.quorums import quorum_size, singer_numbers
from cqsa_stream.schedulers.schedules import Cqs, Rectangular, Schedule

__all__ = ["MOST_CHUNKS", "Machine", "Plan", "Request", "make_plan", "make_schedule"]

_TIE = (
    1.02  # schedules whose seconds differ by less are equal: then CQS if nothing spills, its tasks being free to move
)
MOST_CHUNKS = 100_000
_CHOSEN_CHUNKS = 10_303  # the most that the planner takes by itself
_OUT_CHUNK_BYTES = 4 << 20
_LEAST_OUT_CHUNK_BYTES = 64 << 10
_SMALLEST_BLOCK = 64
_GRIDS_WEIGHED = 3  # of those that fit, the fewest chunks first: more cost more


@dataclass(frozen=True)
class Machine:
    """A device as the planner sees it: budgets in bytes, rates, and the shapes that its kernel likes, in tokens.

    A plan is chosen by ``rates``, which are the same from day to day, so that the same command makes the same plan; its
    seconds are told by ``measured``. ``step_flops`` bounds the work between two moments at which a run can stop.
    """

    device: str
    device_allowed_bytes: int | None
    host_allowed_bytes: int
    device_reserved_bytes: int
    host_reserved_bytes: int
    rates: Rates
    measured: Rates
    tile_rows: int
    tile_columns: int
    leaf: int
    block_tokens: int
    column_tokens: int
    step_flops: float


@dataclass(frozen=True)
class Request:
    """What is to be planned. ``chunks`` and ``schedule`` are given where a user forces them; ``grid`` and
    ``out_tokens`` where a run has begun, whose output is stored in chunks of so many tokens.

    ``keys_seen(rows)``: the keys that any of the rows sees; ``arrays``: how query, key and value are stored.
    """

    work: Workload
    queries: int
    keys: int
    first_query: int
    same_positions: bool
    keys_seen: Callable[[range], range]
    arrays: tuple[Stored, Stored, Stored]
    schedule: str = "auto"
    chunks: int | None = None
    grid: Grid | None = None
    out_tokens: int | None = None


@dataclass(frozen=True)
class Plan:
    """A schedule over a grid, with what it will hold, move and take. Sizes in bytes, times in seconds."""

    schedule: str
    grid: Grid
    layout: Layout
    tasks: int
    pairs: int
    flops: int
    cost: Cost
    footprint: Footprint
    device_allowed_bytes: int | None
    host_allowed_bytes: int
    candidates: tuple["Plan", ...] = ()

    @property
    def fits(self) -> bool:
        return self.footprint.host_bytes <= self.host_allowed_bytes and (
            self.device_allowed_bytes is None or self.footprint.device_bytes <= self.device_allowed_bytes
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``cqsa plan --json`` prints."""
        described = {
            "schedule": self.schedule,
            "chunks": self.grid.rows.chunks,
            "chunk_tokens": self.grid.rows.chunk_tokens,
            "column_chunks": self.grid.columns.chunks,
            "column_chunk_tokens": self.grid.columns.chunk_tokens,
            "quorum_size": quorum_size(self.grid.rows.chunks) if self.schedule == "cqs" else None,
            "tasks": self.tasks,
            "pairs": self.pairs,
            "layout": asdict(self.layout),
            "device_projected_bytes": self.footprint.device_bytes,
            "host_projected_bytes": self.footprint.host_bytes,
            "device_allowed_bytes": self.device_allowed_bytes,
            "host_allowed_bytes": self.host_allowed_bytes,
            "device_parts_bytes": self.footprint.device,
            "host_parts_bytes": self.footprint.host,
            "fits": self.fits,
            "bytes_read": self.cost.bytes_read,
            "bytes_written": self.cost.bytes_written,
            "spills": self.cost.spills,
            "flops": self.flops,
            "seconds": self.cost.seconds,
        }
        if self.candidates:
            described["candidates"] = [candidate.to_dict() for candidate in self.candidates]
        return described

    def __str__(self) -> str:
        def size(n: int) -> str:
            return f"{n / 2**20:,.1f} MiB"

        def pool(projected: int, allowed: int) -> str:
            return f"{size(projected)} of {size(allowed)} allowed" + ("" if projected <= allowed else "  OVER BUDGET")

        lines = [
            f"schedule    {self.schedule}: {self.tasks} tasks of {self.layout.rows_per_task} row chunks",
            f"grid        {self.grid.rows.chunks} chunks of {self.grid.rows.chunk_tokens} tokens, {self.pairs} pairs",
            f"host        {pool(self.footprint.host_bytes, self.host_allowed_bytes)}",
        ]
        if self.device_allowed_bytes is not None:
            lines.append(f"device      {pool(self.footprint.device_bytes, self.device_allowed_bytes)}")
        return "\n".join(
            [
                *lines,
                f"read        {size(self.cost.bytes_read)}",
                f"written     {size(self.cost.bytes_written)}, {self.cost.spills} spilled partials",
                f"compute     {self.flops / 1e12:,.3f} TFLOP",
                f"time        {self.cost.seconds:,.1f} s",
            ]
        )


def make_schedule(name: str, grid: Grid, rows_per_task: int) -> Schedule:
    """Return the schedule of that name over the grid. Raises ValueError where it cannot be."""
    return Cqs(grid) if name == "cqs" else Rectangular(grid, rows_per_task)


def make_plan(request: Request, machine: Machine) -> Plan:
    """Return the cheapest plan that fits; where none does, the one that needs the least, with ``fits`` False.

    ``candidates`` holds the best of each schedule weighed. Raises ValueError where a forced schedule or number of
    chunks cannot be.
    """
    if request.chunks is not None and request.chunks > MOST_CHUNKS:
        raise ValueError(f"{request.chunks} chunks; expected at most {MOST_CHUNKS}")
    if request.schedule == "cqs":
        _refuse_cqs_where_positions_differ(request)
    names = ["cqs", "rectangular"] if request.schedule == "auto" else [request.schedule]
    if not request.same_positions or (request.grid is not None and not request.grid.same_positions):
        names = ["rectangular"]
    best = {name: _best(request, machine, name) for name in names}
    candidates = tuple(best.values())
    told = {id(plan): _told(plan, request, machine) for plan in candidates}
    fitting = [plan for plan in candidates if plan.fits]
    if fitting:
        fastest = min(plan.cost.seconds for plan in fitting)
        equal = [plan for plan in fitting if plan.cost.seconds <= _TIE * fastest]
        chosen = next((plan for plan in equal if not plan.cost.spills), equal[0])
    else:
        chosen = min(candidates, key=lambda plan: plan.footprint.host_bytes + plan.footprint.device_bytes)
    return replace(told[id(chosen)], candidates=tuple(told.values()))


def _refuse_cqs_where_positions_differ(request: Request) -> None:
    if not request.same_positions:
        raise ValueError(
            "schedule 'cqs' needs queries and keys to be the same positions (as many queries as keys, q_start 0, no "
            "query slice); take 'rectangular' or 'auto'"
        )


def _best(request: Request, machine: Machine, name: str) -> Plan:
    """Return the cheapest fitting plan of a schedule; where none fits, the smallest."""
    fitting: list[Plan] = []
    smallest: tuple[int, Grid, Layout] | None = None
    weighed = 0
    for grid in _grids(request, machine):
        layouts = list(_layouts(request, machine, name, grid))
        plans = [_price(request, machine, name, grid, it) for it in layouts if _fits(request, machine, grid, it)]
        fitting += plans
        weighed += bool(plans)
        if weighed == _GRIDS_WEIGHED:
            break
        for layout in layouts if not fitting else ():
            held = _footprint(request, machine, grid, layout)
            if smallest is None or held.host_bytes + held.device_bytes < smallest[0]:
                smallest = held.host_bytes + held.device_bytes, grid, layout
    if fitting:
        return min(fitting, key=lambda plan: plan.cost.seconds)
    assert smallest is not None
    return _price(request, machine, name, *smallest[1:])


def _grids(request: Request, machine: Machine) -> Iterator[Grid]:
    """Yield the grids to weigh, the fewest chunks first."""
    if request.grid is not None:
        yield request.grid
    elif request.same_positions:
        for c in _same_position_chunks(request, machine):
            axis = Axis.cut(request.keys, c)
            yield Grid.of(axis, axis, request.keys_seen, True)
    else:
        tokens = min(request.keys, machine.column_tokens)
        columns = Axis(request.keys, tokens, -(-request.keys // tokens))
        for c in _row_chunks(request, machine):
            yield Grid.of(Axis.cut(request.queries, c), columns, request.keys_seen, False)


def _same_position_chunks(request: Request, machine: Machine) -> list[int]:
    """Return the Singer numbers whose pairs a run can stop between soon enough, as far as there are such."""
    if request.chunks is not None:
        quorum_size(request.chunks)
        return [request.chunks]
    numbers = list(takewhile(lambda c: c <= _CHOSEN_CHUNKS, singer_numbers()))
    useful = [c for c in numbers if c <= max(7, request.keys)]
    quick = [
        c for c in useful if _pair_flops(request, -(-request.keys // c), -(-request.keys // c)) <= machine.step_flops
    ]
    return quick or useful[-1:]


def _row_chunks(request: Request, machine: Machine) -> list[int]:
    if request.chunks is not None:
        if request.chunks < 1:
            raise ValueError(f"{request.chunks} chunks; expected at least 1")
        return [request.chunks]
    tokens, chunks = machine.tile_rows, []
    while tokens >= 1:
        if (
            _pair_flops(request, min(tokens, request.queries), machine.column_tokens) <= machine.step_flops
            or tokens == 1
        ):
            chunks.append(-(-request.queries // tokens))
        tokens //= 2
    return sorted(set(chunks))


def _pair_flops(request: Request, rows: int, columns: int) -> float:
    return 2.0 * (request.work.head_dim + request.work.value_dim) * request.work.group * rows * columns


def _layouts(request: Request, machine: Machine, name: str, grid: Grid) -> Iterator[Layout]:
    """Yield layouts from the largest blocks down; each holds as many row chunks as the budget allows."""
    filled = sum(1 for needed in grid.needed if needed) or 1
    pieces = -(-grid.columns.chunk_tokens // machine.block_tokens)
    while True:
        block = max(1, -(-grid.columns.chunk_tokens // pieces))  # equal blocks: no short call at a chunk's end
        for slots, out in product((6, 4), _out_tokens(request, machine, grid)):
            least = _layout(request, machine, name, grid, filled, block, slots, out)
            yield _grown(request, machine, name, grid, filled, least)
        if block <= _SMALLEST_BLOCK:
            return
        pieces *= 2


def _layout(
    request: Request, machine: Machine, name: str, grid: Grid, filled: int, block: int, slots: int, out: int
) -> Layout:
    rows = quorum_size(grid.rows.chunks) if name == "cqs" else 1
    whole = name == "cqs" and not request.work.durable  # partials that cannot leave memory must all fit in it
    return Layout(
        rows_per_task=rows,
        resident_rows=max(rows, filled) if whole else rows,
        block_tokens=block,
        ring_slots=slots,
        tile_rows=machine.tile_rows,
        tile_columns=min(machine.tile_columns, block),
        leaf=min(machine.leaf, block),
        out_tokens=out,
    )


def _grown(request: Request, machine: Machine, name: str, grid: Grid, filled: int, layout: Layout) -> Layout:
    """Hold more row chunks (rectangular) or more partials (CQS), as far as the budget and the step allow."""
    most = filled if name == "cqs" else _rows_within_step(request, machine, grid, filled)
    low = layout.resident_rows if name == "cqs" else 1
    high = max(low, most)
    while low < high:
        middle = (low + high + 1) // 2
        if _fits(request, machine, grid, _with_rows(name, layout, middle, filled)):
            low = middle
        else:
            high = middle - 1
    return _with_rows(name, layout, low, filled)


def _with_rows(name: str, layout: Layout, rows: int, filled: int) -> Layout:
    """A rectangular task has one place more for partials than rows: a row leaves while the next one comes."""
    if name == "cqs":
        return replace(layout, resident_rows=rows)
    return replace(layout, resident_rows=max(rows, min(rows + 1, filled)), rows_per_task=rows)


def _rows_within_step(request: Request, machine: Machine, grid: Grid, filled: int) -> int:
    pair = _pair_flops(request, grid.rows.chunk_tokens, grid.columns.chunk_tokens)
    return max(1, min(filled, int(machine.step_flops / pair)))


def _fits(request: Request, machine: Machine, grid: Grid, layout: Layout) -> bool:
    held = _footprint(request, machine, grid, layout)
    return held.host_bytes <= machine.host_allowed_bytes and (
        machine.device_allowed_bytes is None or held.device_bytes <= machine.device_allowed_bytes
    )


def _footprint(request: Request, machine: Machine, grid: Grid, layout: Layout) -> Footprint:
    return footprint(
        request.work, grid, layout, machine.device, machine.device_reserved_bytes, machine.host_reserved_bytes
    )


def _out_tokens(request: Request, machine: Machine, grid: Grid) -> list[int]:
    """Return the tokens of one stored output chunk to weigh, dividing the row chunk: 4 MiB's worth or what is small
    beside the budget; and, so that the least a plan needs does not depend on the budget, 64 KiB's worth.
    """
    if request.out_tokens is not None:
        return [request.out_tokens]
    sizes = []
    for most in (min(_OUT_CHUNK_BYTES, machine.host_allowed_bytes // 64), _LEAST_OUT_CHUNK_BYTES):
        tokens = grid.rows.chunk_tokens
        while tokens % 2 == 0 and tokens * request.work.value_dim * request.work.out_itemsize > most:
            tokens //= 2
        sizes.append(tokens)
    return sizes


def _told(plan: Plan, request: Request, machine: Machine) -> Plan:
    """Return the plan with its seconds as this machine was measured."""
    schedule = make_schedule(plan.schedule, plan.grid, plan.layout.rows_per_task)
    return replace(plan, cost=_cost(request, plan.grid, schedule, plan.layout, machine.measured))


def _cost(request: Request, grid: Grid, schedule: Schedule, layout: Layout, rates: Rates) -> Cost:
    return cost(request.work, grid, schedule, layout, rates, request.arrays, request.first_query)


def _price(request: Request, machine: Machine, name: str, grid: Grid, layout: Layout) -> Plan:
    schedule = make_schedule(name, grid, layout.rows_per_task)
    return Plan(
        schedule=name,
        grid=grid,
        layout=layout,
        tasks=len(schedule) * request.work.lanes,
        pairs=grid.pairs * request.work.lanes,
        flops=request.work.flops,
        cost=_cost(request, grid, schedule, layout, machine.rates),
        footprint=_footprint(request, machine, grid, layout),
        device_allowed_bytes=machine.device_allowed_bytes,
        host_allowed_bytes=machine.host_allowed_bytes,
    )
