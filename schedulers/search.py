"""The planner: how many chunks, which schedule and what shapes, under the budgets; a plan says what a run will need."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from cqsa_stream.schedulers.cuts import MOST_CHUNKS, cuts, pair_flops
from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.model.memory import (
    Footprint,
    Layout,
    Tile,
    footprint,
    leaving_bytes,
    query_tokens,
    slot_bytes,
)
from cqsa_stream.schedulers.model.rates import Rates, TileTimes
from cqsa_stream.schedulers.model.seconds import Cost, cost, kernel_s
from cqsa_stream.schedulers.model.traffic import Traffic, blocks_of_chunk, countable, counted, estimated, kept
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.schedulers.quorums import quorum_size
from cqsa_stream.schedulers.request import Machine, Request
from cqsa_stream.schedulers.schedules import Cqs, Rectangular, Schedule, gaps, strides

__all__ = ["MOST_CHUNKS", "Machine", "Request", "make_plan", "make_schedule"]

_TIE = 1.02  # seconds that differ by less are equal: the model is no better than that
_OUT_CHUNK_BYTES = 16 << 20
_LEAST_OUT_CHUNK_BYTES = 64 << 10
_SMALLEST_BLOCK = 256
_WEIGHED = 3  # numbers of chunks that fit, the fewest first; and of each as many sizes of blocks, the largest first
_RINGS = (6, 4)
_LONG_RING = 64  # where a device computes: it starves while a task has few rows left, unless much was read before
_LONG_RING_SHARE = 4
_LEAVING_SHARE = 8  # of the host's budget, for rows on their way to disk: under a causal mask many end at a time
_NEXT_QUERIES = 3  # places for queries of the next task, besides one: the rest come while its first rows compute
_WHOLE = 128  # kernels of a device take so many rows or keys at a time: parts of chunks are whole numbers of that
_MOST_IN_FLIGHT = {"cpu": 6, "cuda": 12}  # pieces of reads; what they hold besides should be small beside the budget
_IN_FLIGHT_SHARE = 64


def make_schedule(name: str, grid: Grid, layout: Layout) -> Schedule:
    """Return the schedule of that name over the grid. Raises ValueError where it cannot be."""
    return Cqs(grid, layout.stride) if name == "cqs" else Rectangular(grid, layout.rows_per_task)


def make_plan(request: Request, machine: Machine) -> Plan:
    """Return the cheapest plan that fits; where none does, the one that needs the least, with ``fits`` False.

    ``candidates`` holds the best of each schedule weighed. Raises ValueError where a forced schedule or number of
    chunks cannot be.
    """
    if request.chunks is not None and request.chunks > MOST_CHUNKS:
        raise ValueError(f"{request.chunks} chunks; expected at most {MOST_CHUNKS}")
    same = request.same_positions and (request.grid is None or request.grid.same_positions)
    if request.schedule == "cqs" and not same:
        raise ValueError(
            "schedule 'cqs' needs queries and keys to be the same positions (as many queries as keys, q_start 0, no "
            "query slice); take 'rectangular' or 'auto'"
        )
    names = ["cqs", "rectangular"] if request.schedule == "auto" and same else [request.schedule]
    search = _Search(request, machine)
    best = [search.best(name if same else "rectangular") for name in names]
    moved = [search.counted(plan) for plan in best]
    candidates = tuple(search.costed(plan, it, machine.rates) for plan, it in zip(best, moved, strict=True))
    chosen = _choose(candidates)
    least = min((plan.least for plan in candidates), key=_held)
    told = tuple(
        replace(search.costed(plan, it, machine.measured), least=least)
        for plan, it in zip(candidates, moved, strict=True)
    )
    return replace(told[chosen], candidates=told)


def _choose(candidates: tuple[Plan, ...]) -> int:
    """Return which: the fastest that fits; of equals CQS, its tasks being free to move, where no partial leaves."""
    fitting = [i for i, plan in enumerate(candidates) if plan.fits]
    if not fitting:
        return min(range(len(candidates)), key=lambda i: _held(candidates[i].least))
    fastest = min(candidates[i].cost.seconds for i in fitting)
    equal = [i for i in fitting if candidates[i].cost.seconds <= _TIE * fastest]
    staying = (i for i in equal if not candidates[i].cost.spills and not candidates[i].layout.parked_rows)
    return next(staying, min(equal, key=lambda i: candidates[i].layout.parked_rows))


def _held(footprint: Footprint) -> int:
    return footprint.host_bytes + footprint.device_bytes


def _cheapest(plans: list[Plan]) -> Plan:
    """Return, of the plans that are as fast as any, the one that moves the fewest bytes."""
    fastest = min(plan.cost.seconds for plan in plans)
    equal = [plan for plan in plans if plan.cost.seconds <= _TIE * fastest]
    return min(equal, key=lambda p: (p.cost.bytes_read + p.cost.bytes_written, p.cost.seconds))


class _Search:
    """One request on one machine."""

    def __init__(self, request: Request, machine: Machine) -> None:
        self.request, self.machine, self.work = request, machine, request.work
        self._schedules: dict[tuple[str, Axis, int, int], Schedule] = {}
        self._grids: dict[tuple[Axis, Axis], Grid] = {}
        self._kernel_s: dict[tuple[Axis, int, TileTimes], float] = {}

    def best(self, name: str) -> Plan:
        """Return the cheapest fitting plan of a schedule; where none fits, the smallest."""
        least = self._least(name)
        fitting: list[Plan] = []
        weighed = 0
        for rows, columns in self._axes:
            plans = [self._priced(name, rows, columns, it, least) for it in self._layouts(name, rows, columns)]
            if plans:  # of each grid one, as if it were given: so a run that has begun finds its layout again
                fitting.append(_cheapest(plans))
                weighed += 1
            if weighed == _WEIGHED:
                break
        if not fitting:
            return self._priced(name, least.rows, least.columns, least.layout, least)
        return _cheapest(fitting)

    def counted(self, plan: Plan) -> Traffic:
        """Return what the plan moves: counted rather than estimated, where that takes a moment only."""
        schedule = self._schedule(plan.schedule, plan.grid, plan.layout)
        count = counted if countable(schedule, plan.layout) else estimated
        return count(self.work, schedule, plan.layout, self.request.arrays, self.request.first_query)

    def costed(self, plan: Plan, moved: Traffic, rates: Rates) -> Plan:
        """Return the plan with its price by these rates."""
        schedule = self._schedule(plan.schedule, plan.grid, plan.layout)
        return replace(plan, cost=self._cost(schedule, plan.layout, moved, rates, plan.footprint))

    def _schedule(self, name: str, grid: Grid, layout: Layout) -> Schedule:
        kind = (name, grid.rows, layout.rows_per_task, layout.stride)
        if kind not in self._schedules:
            self._schedules[kind] = make_schedule(name, grid, layout)
        return self._schedules[kind]

    def _priced(self, name: str, rows: Axis, columns: Axis, layout: Layout, least: "_Least") -> Plan:
        grid = self._grid(rows, columns)
        schedule = self._schedule(name, grid, layout)
        held = self._footprint(name, rows, columns, layout)
        moved = estimated(self.work, schedule, layout, self.request.arrays, self.request.first_query)
        return Plan(
            schedule=name,
            grid=grid,
            layout=layout,
            tasks=len(schedule) * self.work.lanes,
            pairs=grid.pairs * self.work.lanes,
            flops=self.work.flops,
            cost=self._cost(schedule, layout, moved, self.machine.rates, held),
            footprint=held,
            least=least.footprint,
            device_allowed_bytes=self.machine.device_allowed_bytes,
            host_allowed_bytes=self.machine.host_allowed_bytes,
            device_free_bytes=self.machine.device_free_bytes,
            device_reserved_bytes=self.machine.device_reserved_bytes,
            host_free_bytes=self.machine.host_free_bytes,
            disk_free_bytes=self.machine.disk_free_bytes,
        )

    def _cost(self, schedule: Schedule, layout: Layout, moved: Traffic, rates: Rates, held: Footprint) -> Cost:
        kind = (schedule.grid.rows, layout.block_tokens, rates.tiles)
        if kind not in self._kernel_s:
            self._kernel_s[kind] = kernel_s(self.work, schedule.grid, layout, self.request.mask, rates.tiles)
        touched = held.host_bytes - self.machine.host_reserved_bytes
        every = self.request.checkpoint_every_s
        on_disk = [array for array in self.request.arrays if not array.in_memory]
        stored = sum(a.fetched_bytes(range(a.axis_tokens)) * self.work.lanes // a.lanes for a in on_disk)
        total = self.machine.host_total_bytes  # more is not kept by the system; what is free changes every day
        if on_disk and all(array.past_cache for array in on_disk):
            stored = moved.fetched_bytes
        cold = moved.fetched_bytes if total is not None and stored > total else min(stored, moved.fetched_bytes)
        return cost(self.work, schedule, layout, moved, self._kernel_s[kind], rates, every, cold, touched)

    def _grid(self, rows: Axis, columns: Axis) -> Grid:
        if self.request.grid is not None:
            return self.request.grid
        if (rows, columns) not in self._grids:
            same = self.request.same_positions
            self._grids[rows, columns] = Grid.of(rows, columns, self.request.mask.keys_seen, same)
        return self._grids[rows, columns]

    @cached_property
    def _axes(self) -> list[tuple[Axis, Axis]]:
        return cuts(self.request, self.machine)

    def _least(self, name: str) -> "_Least":
        """Return what needs the least memory of all that the planner would offer."""
        found = []
        for rows, columns in self._axes:
            layout = self._layout(name, rows, self._blocks(columns)[-1], _RINGS[-1], self._out_tokens(rows)[-1])
            found.append(_Least(self._footprint(name, rows, columns, layout), rows, columns, layout))
        return min(found, key=lambda least: _held(least.footprint))

    def _layouts(self, name: str, rows: Axis, columns: Axis) -> Iterator[Layout]:
        """Yield layouts that fit, from the largest blocks down; each holds as many row chunks as the budget allows."""
        least = (self._layout(name, rows, self._blocks(columns)[-1], _RINGS[-1], n) for n in self._out_tokens(rows))
        frugal = next((it for it in least if self._fits(name, rows, columns, it)), None)
        if frugal is None:
            return
        found = 0
        for block in self._blocks(columns):
            reading = [(ring, self._in_flight) for ring in self._rings(block)] + [(_RINGS[-1], 1)]
            layouts = (self._layout(name, rows, block, ring, frugal.out_tokens, n) for ring, n in reading)
            layout = next((it for it in layouts if self._fits(name, rows, columns, it)), None)
            if layout is not None:
                yield from self._grown(name, rows, columns, layout)
                found += 1
            if found == _WEIGHED:
                return

    def _blocks(self, columns: Axis) -> list[int]:
        """Return the sizes of blocks to weigh, the largest first: equal parts of a chunk, so that no call is short."""
        sizes = [self._part(columns.chunk_tokens, self.machine.block_tokens)]
        while sizes[-1] > _SMALLEST_BLOCK:
            sizes.append(self._part(columns.chunk_tokens, -(-sizes[-1] // 2)))
        return sizes

    def _part(self, tokens: int, most: int) -> int:
        """Return the size of equal parts of so many tokens at the most."""
        part = -(-tokens // -(-tokens // most))
        return part if self.machine.device == "cpu" or part < _WHOLE else min(tokens, -(-part // _WHOLE) * _WHOLE)

    def _rings(self, block: int) -> list[int]:
        """Return the slots for reading ahead to weigh, the most first."""
        if self.machine.device == "cpu":
            return list(_RINGS)
        affordable = self.machine.host_allowed_bytes // _LONG_RING_SHARE // slot_bytes(self.work, block)
        return [ring for ring in (min(_LONG_RING, affordable), *_RINGS) if ring >= _RINGS[-1]]

    @cached_property
    def _in_flight(self) -> int:
        """How many pieces of reads may be under way, without much memory for it."""
        affordable = self.machine.host_allowed_bytes // _IN_FLIGHT_SHARE // max(1, self.work.staging_bytes)
        return max(1, min(_MOST_IN_FLIGHT[self.machine.device], affordable))

    def _layout(self, name: str, rows: Axis, block: int, ring: int, out: int, in_flight: int = 1) -> Layout:
        held = quorum_size(rows.chunks) if name == "cqs" else 1
        whole = name == "cqs" and not self.work.durable  # partials that cannot leave memory must all fit in it
        missing = max(0, rows.filled - held) if whole else 0
        on_device = self.machine.device == "cpu"  # where the host's memory is the device's
        tile = self.machine.tile
        rows_of_call = tile.rows if on_device else self._part(rows.chunk_tokens, tile.rows)
        return Layout(
            rows_per_task=held,
            query_places=held + (not on_device),
            resident_rows=held + missing * on_device,
            block_tokens=block,
            query_tokens=query_tokens(self.work, block),
            slot_bytes=slot_bytes(self.work, block),
            ring_slots=ring,
            cache_slots=0,
            tile=Tile(rows_of_call, min(tile.columns, block), min(tile.leaf, block)),
            out_tokens=out,
            parked_rows=missing * (not on_device),
            leaving_rows=0 if on_device else 1,
            in_flight=in_flight,
        )

    def _grown(self, name: str, rows: Axis, columns: Axis, layout: Layout) -> Iterator[Layout]:
        """Hold more row chunks, as far as the step allows, and more partials; then, or not, blocks used again."""
        if name == "rectangular":
            pair = pair_flops(self.work, rows.chunk_tokens, columns.chunk_tokens)
            most = max(1, min(rows.filled, int(self.machine.step_flops / pair)))
            leaving = replace(layout, resident_rows=min(2, rows.filled))  # a row leaves while the next one comes
            from_their_places = self.machine.device == "cpu"  # elsewhere they leave through the outbox
            fits = from_their_places and self._fits(name, rows, columns, leaving)
            spare = leaving.resident_rows - 1 if fits else 0

            def held(n: int) -> Layout:
                places = layout.query_places + n - 1
                return replace(
                    layout, rows_per_task=n, query_places=places, resident_rows=min(n + spare, max(n, rows.filled))
                )

            layout = held(self._most(name, rows, columns, 1, most, held))
            most = layout.resident_rows
            if self._all_see_all and from_their_places:  # then all rows of a task leave at the same time
                most = min(2 * layout.rows_per_task, rows.filled * min(2, self.work.lanes))
        else:
            most = rows.filled
        low = layout.resident_rows

        def resident(n: int) -> Layout:  # those that must be parked otherwise need not be
            return replace(layout, resident_rows=n, parked_rows=max(0, layout.parked_rows - (n - low)))

        layout = resident(self._most(name, rows, columns, low, max(low, most), resident))
        if name == "cqs" and self.machine.device != "cpu":
            low = layout.parked_rows
            most = max(low, rows.filled - layout.resident_rows)
            parked = self._most(name, rows, columns, low, most, lambda n: replace(layout, parked_rows=n))
            layout = replace(layout, parked_rows=parked)
        if self.machine.device != "cpu":
            affordable = (
                self.machine.host_allowed_bytes // _LEAVING_SHARE // leaving_bytes(self.work, rows.chunk_tokens)
            )
            most = max(1, min(max(layout.rows_per_task + 1, affordable), rows.filled))
            out = self._most(name, rows, columns, 1, most, lambda n: replace(layout, leaving_rows=n))
            layout = replace(layout, leaving_rows=out)
            low = layout.query_places
            most = min(2 * low - 2, low + _NEXT_QUERIES)
            places = self._most(name, rows, columns, low, most, lambda n: replace(layout, query_places=n))
            layout = replace(layout, query_places=places)
        blocks = 2 * columns.filled * -(-columns.chunk_tokens // layout.block_tokens)
        queries = -(-rows.chunk_tokens // layout.query_tokens)  # each is used again by CQS alone
        blocks += rows.filled * queries if name == "cqs" else min(queries, layout.ring_slots)
        useful = max(0, blocks - _RINGS[0])
        cached = self._most(name, rows, columns, 0, useful, lambda n: replace(layout, cache_slots=n))
        yield self._ordered(name, rows, layout, 0)
        if cached:
            yield self._ordered(name, rows, layout, cached)

    def _ordered(self, name: str, rows: Axis, layout: Layout, cached: int) -> Layout:
        """Take the quorums in the order in which most of what stays in memory is used again."""
        layout = replace(layout, cache_slots=cached)
        room = layout.resident_rows + layout.parked_rows
        spilling = room < rows.filled
        if name != "cqs" or not (spilling or cached):
            return layout
        blocks = blocks_of_chunk(rows, layout)

        def reused(stride: int) -> tuple[float, float]:
            ordered = gaps(rows.chunks, stride)
            return (kept(ordered, room - layout.rows_per_task, 1) if spilling else 0.0), kept(
                ordered, cached / blocks, 0
            )

        return replace(layout, stride=max(strides(rows.chunks), key=reused))

    def _most(self, name: str, rows: Axis, columns: Axis, low: int, high: int, layout: Callable[[int], Layout]) -> int:
        """Return the largest number, from low on, whose layout fits; low is known to."""
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits(name, rows, columns, layout(middle)):
                low = middle
            else:
                high = middle - 1
        return low

    @cached_property
    def _all_see_all(self) -> bool:
        return self.request.mask.seen_by(0) == self.request.mask.seen_by(self.request.queries - 1)

    def _fits(self, name: str, rows: Axis, columns: Axis, layout: Layout) -> bool:
        held = self._footprint(name, rows, columns, layout)
        return held.host_bytes <= self.machine.host_allowed_bytes and (
            self.machine.device_allowed_bytes is None or held.device_bytes <= self.machine.device_allowed_bytes
        )

    def _footprint(self, name: str, rows: Axis, columns: Axis, layout: Layout) -> Footprint:
        machine = self.machine
        stored = rows.filled if name == "cqs" else min(layout.resident_rows, rows.filled)
        return footprint(
            self.work, rows, columns, layout, stored, machine.device,
            machine.host_reserved_bytes,
        )  # fmt: skip

    def _out_tokens(self, rows: Axis) -> list[int]:
        """Return the tokens of one stored output chunk to weigh, dividing the row chunk: 16 MiB's worth or what is
        small beside the budget; and, so that the least a plan needs does not depend on the budget, 64 KiB's worth.
        """
        if self.request.out_tokens is not None:
            return [self.request.out_tokens]
        sizes = []
        for most in (min(_OUT_CHUNK_BYTES, self.machine.host_allowed_bytes // 64), _LEAST_OUT_CHUNK_BYTES):
            tokens = rows.chunk_tokens
            while tokens % 2 == 0 and tokens * self.work.value_dim * self.work.out_itemsize > most:
                tokens //= 2
            sizes.append(tokens)
        return sizes


@dataclass(frozen=True)
class _Least:
    footprint: Footprint
    rows: Axis
    columns: Axis
    layout: Layout
