"""Blocks of neighbouring row chunks against every column chunk that any of them needs.

It moves the fewest bytes on one device, and finishes rows one block after another.
"""

from typing import ClassVar

from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.runs import NONE, Runs
from cqsa_stream.schedulers.tasks import NEVER, Task

__all__ = ["Rectangular"]


class Rectangular:
    """Task t holds ``rows_per_task`` row chunks from ``t rows_per_task`` on."""

    name: ClassVar = "rectangular"
    returns: ClassVar = False
    movable: ClassVar = False
    grows: ClassVar = True
    same_positions: ClassVar = False
    needs: ClassVar = ""

    def __init__(self, grid: Grid, rows_per_task: int) -> None:
        self.grid = grid
        self.rows_per_task = rows_per_task
        self._weights: list[int] | None = None

    @classmethod
    def least_rows(cls, rows: Axis) -> int:
        return 1

    @classmethod
    def over(cls, grid: Grid, rows_per_task: int, stride: int) -> "Rectangular":
        return cls(grid, rows_per_task)

    def __len__(self) -> int:
        return -(-self.grid.rows.chunks // self.rows_per_task)

    def task(self, number: int, lane: int) -> Task:
        needed = {row: self.grid.needed(row) for row in self._rows(number)}
        columns = self.chunks_of(number)[1]
        return Task.of(number, lane, ((b, tuple(a for a, those in needed.items() if b in those)) for b in columns))

    def weights(self) -> list[int]:
        """The pairs of each task."""
        if self._weights is None:
            self._weights = [sum(len(self.grid.needed(row)) for row in self._rows(t)) for t in range(len(self))]
        return self._weights

    def chunks_of(self, number: int) -> tuple[list[int], Runs]:
        needed = {row: found for row in self._rows(number) if (found := self.grid.needed(row))}
        parts = (part for found in needed.values() for part in found.ranges)
        return list(needed), Runs(sorted(parts, key=lambda part: part.start))

    def _rows(self, number: int) -> range:
        first = number * self.rows_per_task
        return range(first, min(first + self.rows_per_task, self.grid.rows.chunks))

    def _keys(self, number: int) -> Runs:
        """Return the keys that a task's queries see."""
        rows, chunks = self.grid.rows, self._rows(number)
        queries = range(rows.span(chunks[0]).start, rows.span(chunks[-1]).stop)
        return self.grid.mask.keys(queries) if queries else NONE

    def next_row(self, row: int, after: int) -> int:
        task = row // self.rows_per_task
        return task if task > after else NEVER

    def next_column(self, column: int, after: int) -> int:
        row = self.grid.needing(column).first_from((after + 1) * self.rows_per_task)
        return NEVER if row is None else row // self.rows_per_task

    def found_again(self, slots: float) -> float:
        """What the task before has streamed last is still there, as far as this one streams it, too; before the first
        there is none.
        """
        found = streamed = 0.0
        sampled = range(1, len(self), max(1, len(self) // 64))
        for number in sampled:
            before, now = self._keys(number - 1), self._keys(number)
            either = Runs(sorted((*before.ranges, *now.ranges), key=lambda part: part.start))
            found += min(slots * self.grid.columns.chunk_tokens, len(before) + len(now) - len(either))
            streamed += len(now)
        every = (len(self) - 1) / max(1, len(sampled))
        return every * found / max(1.0, len(self._keys(0)) + every * streamed)

    def partials_found(self, places: int) -> float:
        return 1.0

    def ending_together(self) -> int:
        """Those of a task, where all see all keys; else one after another."""
        last = max(0, self.grid.rows.filled - self.rows_per_task)
        ends = {self.grid.needed(row) for row in range(last, self.grid.rows.filled)}
        return self.rows_per_task if len(ends) == 1 else 1
