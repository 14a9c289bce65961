"""The search: how many chunks, which schedule and what shapes, under the budgets."""

from dataclasses import replace
from functools import cached_property

from cqsa_stream.schedulers.cuts import MOST_CHUNKS, cuts
from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.layouts import Case, Layouts
from cqsa_stream.schedulers.masks.calls import Tile
from cqsa_stream.schedulers.model.crew import Crew, crew
from cqsa_stream.schedulers.model.memory import Footprint, Layout
from cqsa_stream.schedulers.model.rates import Rates, TileTimes
from cqsa_stream.schedulers.model.seconds import Cost, cost, kernel_s
from cqsa_stream.schedulers.model.traffic import Traffic, moved
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.schedulers.request import Machine, Request
from cqsa_stream.schedulers.schedules import AUTO, SCHEDULES, make_schedule
from cqsa_stream.schedulers.tasks import Schedule

__all__ = ["MOST_CHUNKS", "make_plan", "plan_again"]

_TIE = 1.02  # seconds that differ by less are equal: the model is no better than that
_FEW_BYTES = 1.25  # more bytes, in the same seconds, for fewer blocks
_WEIGHED = 3  # numbers of chunks that fit, the fewest first

Kind = type[Schedule]


def make_plan(request: Request, machine: Machine) -> Plan:
    """Return the cheapest plan that fits; where none does, the one that needs the least, with ``fits`` False.

    ``candidates`` holds the best of each schedule weighed. Raises ValueError where a forced schedule or number of
    chunks cannot be.
    """
    if request.chunks is not None and request.chunks > MOST_CHUNKS:
        raise ValueError(f"{request.chunks} chunks; expected at most {MOST_CHUNKS}")
    search = _Search(request, machine)
    best = [search.best(kind) for kind in _kinds(request)]
    counts = [search.counted(plan) for plan in best]
    chosen = _choose([search.costed(*it, machine.rates) for it in zip(best, counts, strict=True)], even=_even(request))
    least = min((plan.least for plan in best), key=_held)
    found = tuple(
        replace(search.costed(*it, machine.measured, request.cached), least=least)
        for it in zip(best, counts, strict=True)
    )
    return replace(found[chosen], candidates=found)


def plan_again(request: Request, machine: Machine, schedule: str, layout: Layout) -> Plan | None:
    """Return the plan of a run that has begun by what it used before; None where that does not fit any more."""
    return _Search(request, machine).again(schedule, layout)


def _kinds(request: Request) -> list[Kind]:
    """Return the schedules to weigh. Raises ValueError where the one that is asked for cannot be."""
    same = request.same_positions and (request.grid is None or request.grid.same_positions)
    if request.schedule == AUTO:
        return [kind for kind in SCHEDULES.values() if same or not kind.same_positions]
    kind = SCHEDULES[request.schedule]
    if kind.same_positions and not same:
        raise ValueError(kind.needs)
    return [kind]


def _even(request: Request) -> bool:
    """Return whether the tasks of a movable schedule are equal: under a full or causal mask."""
    return len(request.mask) == 1 and all(band.lo is None for band in request.mask)


def _choose(candidates: list[Plan], *, even: bool) -> int:
    """Return which: the fastest that fits; of equals one whose tasks are free to move, where no partial leaves."""
    fitting = [i for i, plan in enumerate(candidates) if plan.fits]
    if not fitting:
        return min(range(len(candidates)), key=lambda i: _held(candidates[i].least))
    fastest = min(candidates[i].cost.seconds for i in fitting)
    equal = [i for i in fitting if candidates[i].cost.seconds <= _TIE * fastest]
    equal = [i for i in equal if even or not SCHEDULES[candidates[i].schedule].movable] or equal
    staying = (i for i in equal if not candidates[i].cost.spills and not candidates[i].layout.parked_rows)
    return next(staying, min(equal, key=lambda i: candidates[i].layout.parked_rows))


def _held(footprint: Footprint) -> int:
    return footprint.host_bytes + footprint.device_bytes


def _cheapest(plans: list[Plan]) -> Plan:
    """Return, of the plans that are as fast as any, the one that moves the fewest bytes; for a device with memory of
    its own, which waits for whoever hands it blocks, of those that move few and compute as soon as any the one with the
    fewest blocks.
    """
    fastest = min(plan.cost.seconds for plan in plans)
    equal = [plan for plan in plans if plan.cost.seconds <= _TIE * fastest]
    if equal[0].layout.in_place:
        return min(equal, key=lambda p: (_moved(p), p.cost.seconds))
    few = _FEW_BYTES * min(map(_moved, equal))
    frugal = [plan for plan in equal if _moved(plan) <= few]
    soon = _TIE * min(plan.cost.compute_s for plan in frugal)
    return min((plan for plan in frugal if plan.cost.compute_s <= soon), key=lambda p: (p.cost.blocks, _moved(p)))


def _moved(plan: Plan) -> int:
    return plan.cost.bytes_read + plan.cost.bytes_written


class _Search:
    """One request on one machine."""

    def __init__(self, request: Request, machine: Machine) -> None:
        self.request, self.machine, self.work = request, machine, request.work
        self._layouts = Layouts(request, machine)
        self._grids: dict[tuple[Axis, Axis], Grid] = {}
        self._schedules: dict[tuple[str, Axis, int, int], Schedule] = {}
        self._kernel_s: dict[tuple[Axis, int, Tile, TileTimes], float] = {}

    def best(self, kind: Kind) -> Plan:
        """Return the cheapest fitting plan of a schedule; where none fits, the smallest."""
        least, layout = self._least(kind)
        held = self._layouts.footprint(least, layout)
        fitting: list[Plan] = []
        weighed: set[int] = set()
        for rows, columns in self._axes:
            if len(weighed) == _WEIGHED and rows.chunks not in weighed:
                break
            case = Case(kind, rows, columns)
            plans = [self._priced(case, it, held) for it in self._layouts.fitting(case)]
            if plans:  # of each grid one, as if it were given: so a run that has begun finds its layout again
                fitting.append(_cheapest(plans))
                weighed.add(rows.chunks)
        return _cheapest(fitting) if fitting else self._priced(least, layout, held)

    def again(self, name: str, layout: Layout) -> Plan | None:
        """Return the plan of a schedule and layout that were used before; None where it does not fit any more."""
        assert self.request.grid is not None
        case = Case(SCHEDULES[name], self.request.grid.rows, self.request.grid.columns)
        if not self._layouts.possible(case, layout) or not self._layouts.fits(case, layout):
            return None
        plan = self._priced(case, layout, self._layouts.footprint(*self._least(case.kind)))
        plan = self.costed(plan, self.counted(plan), self.machine.measured, self.request.cached)
        return None if plan.lacking() else replace(plan, candidates=(plan,))

    def counted(self, plan: Plan) -> Traffic:
        """Return what a plan moves, counted as exactly as a moment allows."""
        schedule, asked = self._schedule(plan.schedule, plan.grid, plan.layout), self.request
        return moved(self.work, schedule, plan.layout, asked.arrays, shares=asked.shares)

    def costed(self, plan: Plan, count: Traffic, rates: Rates, cached: float = 0.0) -> Plan:
        """Return a plan with its price by these rates, where a share of the arrays is in memory already."""
        schedule = self._schedule(plan.schedule, plan.grid, plan.layout)
        cost = self._cost(schedule, plan.layout, count, rates, plan.footprint, cached)
        if self.request.shares == 1:
            return replace(plan, cost=cost)
        found = self._crew(schedule, plan.layout, cost, rates, plan.footprint)
        disk = {**plan.footprint.disk, "partials of shares": found.merge_bytes}
        held = replace(plan.footprint, disk=disk if self.work.durable else {})
        read, written = (size + found.merge_bytes for size in (cost.bytes_read, cost.bytes_written))
        cost = replace(cost, seconds=found.seconds, bytes_read=read, bytes_written=written)
        return replace(plan, cost=cost, crew=found, footprint=held)

    def _crew(self, schedule: Schedule, layout: Layout, cost: Cost, rates: Rates, held: Footprint) -> Crew:
        """Return what the workers of the run take."""
        asked, one = self.request, self.request.together and not self.machine.habits.own_memory
        dealt = asked.shares, asked.workers
        return crew(self.work, schedule, layout, cost, rates.speeds, *dealt, held.host_bytes, one_processor=one)

    def _priced(self, case: Case, layout: Layout, least: Footprint) -> Plan:
        grid = self._grid(case)
        schedule = self._schedule(case.kind.name, grid, layout)
        held = self._layouts.footprint(case, layout)
        count = moved(self.work, schedule, layout, self.request.arrays, exactly=False)
        machine = self.machine
        return Plan(
            schedule=case.kind.name,
            kernel=machine.kernel,
            operator=machine.operator,
            grid=grid,
            layout=layout,
            tasks=len(schedule) * self.work.lanes,
            pairs=grid.pairs * self.work.lanes,
            flops=self.work.flops,
            scores=self.work.scores,
            cost=self._cost(schedule, layout, count, machine.rates, held),
            footprint=held,
            least=least,
            device_allowed_bytes=machine.device_allowed_bytes,
            host_allowed_bytes=machine.host_allowed_bytes,
            device_free_bytes=machine.device_free_bytes,
            device_reserved_bytes=machine.device_reserved_bytes,
            host_free_bytes=machine.host_free_bytes,
            disk_free_bytes=machine.disk_free_bytes,
            calibrated=machine.calibrated,
        )

    def _cost(
        self,
        schedule: Schedule,
        layout: Layout,
        count: Traffic,
        rates: Rates,
        held: Footprint,
        cached: float = 0.0,
    ) -> Cost:
        known = (schedule.grid.rows, layout.block_tokens, layout.tile, rates.tiles)
        if known not in self._kernel_s:
            self._kernel_s[known] = kernel_s(self.work, schedule.grid, layout, rates.tiles)
        touched = held.host_bytes - self.machine.host_reserved_bytes
        every = self.request.checkpoint_every_s
        on_disk = [array for array in self.request.arrays if not array.in_memory]
        stored = sum(array.bytes * self.work.lanes // array.lanes for array in on_disk)
        total = self.machine.host_total_bytes  # more is not kept by the system; what is free changes every day
        if on_disk and all(array.past_cache for array in on_disk):
            stored = count.fetched_bytes
        cold = count.fetched_bytes if total is not None and stored > total else min(stored, count.fetched_bytes)
        cold = round(cold * (1 - cached))
        habits, kernel = self.machine.habits, self._kernel_s[known]
        beside = (habits.reads_at_a_time, habits.writers) if habits.own_memory else (1, 1)  # else all share processors
        return cost(self.work, schedule, layout, count, kernel, rates, every, cold, touched, *beside)

    def _schedule(self, name: str, grid: Grid, layout: Layout) -> Schedule:
        kind = name, grid.rows, layout.rows_per_task, layout.stride
        if kind not in self._schedules:
            self._schedules[kind] = make_schedule(name, grid, layout)
        return self._schedules[kind]

    def _grid(self, case: Case) -> Grid:
        if self.request.grid is not None:
            return self.request.grid
        axes = case.rows, case.columns
        if axes not in self._grids:
            self._grids[axes] = Grid(*axes, self.request.mask, self.request.same_positions)
        return self._grids[axes]

    @cached_property
    def _axes(self) -> list[tuple[Axis, Axis]]:
        found = cuts(self.request, self.machine)
        enough = [axes for axes in found if self.work.lanes * axes[0].filled >= self.request.shares]
        return enough or found  # a share that has row chunks of its own has nothing to merge

    def _least(self, kind: Kind) -> tuple[Case, Layout]:
        """Return what needs the least memory of all that the planner would offer."""
        cases = [Case(kind, *axes) for axes in self._axes]
        found = [(case, self._layouts.smallest(case)) for case in cases]
        return min(found, key=lambda it: _held(self._layouts.footprint(*it)))
