"""The shapes of a run that fit the budgets: blocks, tiles, buffers, and how many rows and partials stand in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd

from cqsa_stream.schedulers.cqs import best_stride
from cqsa_stream.schedulers.cuts import pair_flops
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.model.memory import (
    Footprint,
    Layout,
    footprint,
    leaving_bytes,
    query_tokens,
    slot_bytes,
)
from cqsa_stream.schedulers.model.traffic import blocks_of_chunk
from cqsa_stream.schedulers.request import Machine, Request
from cqsa_stream.schedulers.tasks import Schedule

__all__ = ["Case", "Layouts"]

_OUT_CHUNK_BYTES = 16 << 20
_LEAST_OUT_CHUNK_BYTES = 64 << 10
_SMALLEST_BLOCK = 256
_RINGS = (6, 4)
_LONG_RING_SHARE = 4  # of the host's budget: a device starves while a task has few rows left, unless much was read
_LEAVING_SHARE = 8  # of the host's budget, for rows on their way to disk: under a causal mask many end at a time
_NEXT_QUERIES = 3  # places for queries of the next task, besides one: the rest come while its first rows compute
_IN_FLIGHT_SHARE = 64  # what reads in flight hold should be small beside the budget
_SIZES_WEIGHED = 3  # of blocks, the largest first


@dataclass(frozen=True)
class Case:
    """A schedule over rows and columns as they may be cut."""

    kind: type[Schedule]
    rows: Axis
    columns: Axis


class Layouts:
    """The layouts of one request on one machine."""

    def __init__(self, request: Request, machine: Machine) -> None:
        self.request, self.machine, self.work = request, machine, request.work
        self._one_pool = not machine.habits.own_memory

    def smallest(self, case: Case) -> Layout:
        """Return what needs the least memory of all that would be offered."""
        block, out = self._blocks(case.columns)[-1], self._out_tokens(case.rows)[-1]
        return self._layout(case, block, _RINGS[-1], out)

    def possible(self, case: Case, layout: Layout) -> bool:
        """Return whether a layout that a file claims is one of a run of this case, whatever it holds."""
        held, least = layout.rows_per_task, case.kind.least_rows(case.rows)
        block, tile = layout.block_tokens, layout.tile
        like = self._layout(case, block, layout.ring_slots, self._out_tokens(case.rows)[0])
        same = replace(
            layout,
            query_tokens=like.query_tokens,
            slot_bytes=like.slot_bytes,
            tile=replace(like.tile, rows=tile.rows),  # the most rows are measured, and may be others now
            out_tokens=like.out_tokens,
            resident_columns=like.resident_columns,
            parked_rows=0 if self._one_pool else layout.parked_rows,
        )
        return (
            block in self._blocks(case.columns)
            and layout == same
            and layout.ring_slots >= _RINGS[-1]
            and tile.rows >= min(_SMALLEST_BLOCK, case.rows.chunk_tokens)
            and least <= held <= (max(least, case.rows.filled) if case.kind.grows else least)
            and min(layout.query_places, layout.resident_rows) >= held
            and layout.in_place == self._one_pool
            and gcd(layout.stride, case.rows.chunks) == 1
        )

    def fitting(self, case: Case) -> Iterator[Layout]:
        """Yield layouts that fit, from the largest blocks down; each holds as many row chunks as the budget allows."""
        smallest = self._blocks(case.columns)[-1]
        frugal = (self._layout(case, smallest, _RINGS[-1], n) for n in self._out_tokens(case.rows))
        out_tokens = next((it.out_tokens for it in frugal if self.fits(case, it)), None)
        if out_tokens is None:
            return
        found = 0
        for block in self._blocks(case.columns):
            reading = [(ring, self._in_flight) for ring in self._rings(block)] + [(_RINGS[-1], 1)]
            layouts = (self._layout(case, block, ring, out_tokens, n) for ring, n in reading)
            layout = next((it for it in layouts if self.fits(case, it)), None)
            if layout is not None:
                yield from self._grown(case, layout)
                found += 1
            if found == _SIZES_WEIGHED:
                return

    def _blocks(self, columns: Axis) -> list[int]:
        """Return the sizes of blocks to weigh, the largest first: equal parts of a chunk, so that no call is short."""
        most = self.machine.habits.block_tokens
        if not self._one_pool:  # longer ones make no call longer
            most = min(most, self.machine.tile.columns)
        sizes = [self._part(columns.chunk_tokens, most)]
        while sizes[-1] > _SMALLEST_BLOCK:
            sizes.append(self._part(columns.chunk_tokens, -(-sizes[-1] // 2)))
        return sizes

    def _part(self, tokens: int, most: int) -> int:
        """Return the size of equal parts of so many tokens at the most."""
        part, unit = -(-tokens // -(-tokens // most)), self.machine.habits.whole_tokens
        return part if part < unit else min(tokens, -(-part // unit) * unit)

    def _rings(self, block: int) -> list[int]:
        """Return the slots for reading ahead to weigh, the most first."""
        affordable = self.machine.host_allowed_bytes // _LONG_RING_SHARE // slot_bytes(self.work, block)
        longest = min(self.machine.habits.long_ring, affordable)
        return [*([longest] if longest > _RINGS[0] else []), *_RINGS]

    @cached_property
    def _in_flight(self) -> int:
        """How many pieces of reads may be under way, without much memory for it."""
        affordable = self.machine.host_allowed_bytes // _IN_FLIGHT_SHARE // max(1, self.work.staging_bytes)
        return max(1, min(self.machine.habits.most_in_flight, affordable))

    def _layout(self, case: Case, block: int, ring: int, out: int, in_flight: int = 1) -> Layout:
        held = case.kind.least_rows(case.rows)
        whole = case.kind.returns and not self.work.durable  # partials that cannot leave memory must all fit in it
        missing = max(0, case.rows.filled - held) if whole else 0
        tile = self.machine.tile
        return Layout(
            rows_per_task=held,
            query_places=held if self._one_pool else held + 1,
            resident_rows=held + missing * self._one_pool,
            block_tokens=block,
            query_tokens=query_tokens(self.work, block),
            slot_bytes=slot_bytes(self.work, block),
            ring_slots=ring,
            cache_slots=0,
            tile=replace(
                tile,
                rows=tile.rows if self._one_pool else self._part(case.rows.chunk_tokens, tile.rows),
                columns=min(tile.columns, block) if self._one_pool else self._part(block, tile.columns),
                leaf=min(tile.leaf, block) if self._one_pool else self._part(block, tile.leaf),
                edge=tile.edge if tile.skips else min(tile.edge, block),
            ),
            out_tokens=out,
            parked_rows=0 if self._one_pool else _parked(missing),
            leaving_rows=0 if self._one_pool else 1,
            in_flight=in_flight,
        )

    def _grown(self, case: Case, layout: Layout) -> Iterator[Layout]:
        """Hold more row chunks, as far as the step allows, and more partials; then, or not, blocks used again."""
        filled = case.rows.filled
        most = filled
        if case.kind.grows:
            layout, most = self._more_rows(case, layout)
        low = layout.resident_rows

        def resident(n: int) -> Layout:  # those that must be parked otherwise need not be
            return replace(layout, resident_rows=n, parked_rows=_parked(max(0, layout.parked_rows - 1 - (n - low))))

        layout = self._most(case, low, max(low, most), resident)
        if not self._one_pool:
            layout = self._beside_the_device(case, layout)
        blocks = 2 * case.columns.filled * -(-case.columns.chunk_tokens // layout.block_tokens)
        queries = -(-case.rows.chunk_tokens // layout.query_tokens)
        blocks += filled * queries if case.kind.returns else min(queries, layout.ring_slots)
        useful = max(0, blocks - _RINGS[0])
        cached = self._most(case, 0, useful, lambda n: replace(layout, cache_slots=n)).cache_slots
        for slots in (0, cached) if cached else (0,):
            yield self._ordered(case, replace(layout, cache_slots=slots))

    def _more_rows(self, case: Case, layout: Layout) -> tuple[Layout, int]:
        """Return the layout with as many rows a task as fit, and how many partials are useful."""
        filled = case.rows.filled
        pair = pair_flops(self.work, case.rows.chunk_tokens, case.columns.chunk_tokens)
        most = max(1, min(filled, int(self.machine.step_flops / pair)))
        if self.work.lanes * filled >= self.request.shares:  # else they are ranges of columns
            most = min(most, filled // -(-self.request.shares // self.work.lanes))
        leaving = replace(layout, resident_rows=min(2, filled))  # a row leaves while the next one comes
        fits = self._one_pool and self.fits(case, leaving)  # elsewhere they leave through the outbox
        spare = leaving.resident_rows - 1 if fits else 0
        places = layout.query_places - 1

        def held(n: int) -> Layout:
            resident = min(n + spare, max(n, filled + (self.work.lanes > 1)))  # the next lane begins meanwhile
            return replace(layout, rows_per_task=n, query_places=places + n, resident_rows=resident)

        layout = self._most(case, 1, most, held)
        if self._all_see_all and self._one_pool:  # then all rows of a task leave at the same time
            return layout, min(2 * layout.rows_per_task, filled * min(2, self.work.lanes))
        return layout, layout.resident_rows

    def _beside_the_device(self, case: Case, layout: Layout) -> Layout:
        """Park more partials in host memory, let more rows leave at a time, and take more queries ahead."""
        filled = case.rows.filled
        if case.kind.returns:
            low = layout.parked_rows
            most = max(low, _parked(max(0, filled - layout.resident_rows)))
            layout = self._most(case, low, most, lambda n: replace(layout, parked_rows=n))
        budget = self.machine.host_allowed_bytes // _LEAVING_SHARE
        affordable = budget // leaving_bytes(self.work, case.rows.chunk_tokens)
        most = max(1, min(max(layout.rows_per_task + 1, affordable), filled))
        layout = self._most(case, 1, most, lambda n: replace(layout, leaving_rows=n))
        low = layout.query_places
        return self._most(case, low, min(2 * low - 2, low + _NEXT_QUERIES), lambda n: replace(layout, query_places=n))

    def _ordered(self, case: Case, layout: Layout) -> Layout:
        """Take the tasks in the order in which most of what stays in memory is used again."""
        room = layout.resident_rows + layout.parked_rows
        spilling = layout.resident_rows < case.rows.filled >= room
        if not case.kind.returns or not (spilling or layout.cache_slots):
            return layout
        partials = room - layout.rows_per_task if spilling else 0
        blocks = layout.cache_slots / blocks_of_chunk(case.rows, layout)
        return replace(layout, stride=best_stride(case.rows.chunks, partials, blocks))

    def _most(self, case: Case, low: int, high: int, layout: Callable[[int], Layout]) -> Layout:
        """Return the layout of the largest number, from low on, that fits; low is known to."""
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(case, layout(middle)) else (low, middle - 1)
        return layout(low)

    @cached_property
    def _all_see_all(self) -> bool:
        first, last = (range(row, row + 1) for row in (0, self.request.queries - 1))
        return self.request.mask.keys(first) == self.request.mask.keys(last)

    def fits(self, case: Case, layout: Layout) -> bool:
        """Return whether a layout keeps the budgets."""
        held, device = self.footprint(case, layout), self.machine.device_allowed_bytes
        return held.host_bytes <= self.machine.host_allowed_bytes and (device is None or held.device_bytes <= device)

    def footprint(self, case: Case, layout: Layout) -> Footprint:
        """Return what a run of this layout holds."""
        stored = case.rows.filled if case.kind.returns else min(layout.resident_rows, case.rows.filled)
        return footprint(
            self.work, case.rows, case.columns, layout, stored, self.machine.habits, self.machine.host_reserved_bytes
        )

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


def _parked(partials: int) -> int:
    """Return the places for partials in host memory: one more, as the next comes to the device when one has left."""
    return partials + 1 if partials else 0
