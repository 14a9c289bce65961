"""The two schedules. Each groups and orders the needed pairs of one lane into tasks; every pair is in exactly one.

*CQS Divide*: one task for each cyclic quorum, rows and columns being the same k chunks (arXiv 2604.20819).
*Rectangular*: one task for each block of neighbouring row chunks, columns being all that these need. It moves the
fewest bytes on one device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.quorums import quorum, quorum_size, singer_set

__all__ = ["Cqs", "Rectangular", "Schedule", "Task"]

_COUNTED_TASKS = 400  # with more CQS tasks than these, loads are those of the average chunk


@dataclass(frozen=True)
class Task:
    """Hold the rows on the device; for each step stream the column past the step's rows, in this order."""

    lane: int
    rows: tuple[int, ...]
    steps: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def columns(self) -> tuple[int, ...]:
        return tuple(column for column, _ in self.steps)

    @property
    def pairs(self) -> Iterator[tuple[int, int]]:
        return ((row, column) for column, rows in self.steps for row in rows)

    @classmethod
    def of(cls, lane: int, steps: Iterator[tuple[int, tuple[int, ...]]]) -> "Task":
        """Build a task of the steps that have rows at all."""
        kept = tuple(step for step in steps if step[1])
        return cls(lane, tuple(sorted({row for _, rows in kept for row in rows})), kept)

    def without(self, covers: dict[int, int]) -> "Task":
        """Drop the pairs that the rows' covers already hold."""
        return Task.of(
            self.lane,
            ((column, tuple(r for r in rows if not covers.get(r, 0) >> column & 1)) for column, rows in self.steps),
        )


class Schedule(Protocol):
    """An order of all needed pairs of a lane."""

    name: str
    rows_per_task: int

    def __len__(self) -> int:
        """The number of tasks of one lane."""

    def tasks(self, lane: int) -> Iterator[Task]:
        """Yield the tasks of one lane, lazily; some may have no pairs."""

    def next_use(self, row: int, after: int) -> float:
        """Return the index of the first task after number ``after`` that holds the row, infinity where none does."""

    def loads(self) -> tuple[list[int], list[int]]:
        """Return how many tasks of one lane hold each row chunk, and how many stream each column chunk."""


class Cqs:
    """CQS Divide: task i is quorum ``S_i``; two distinct chunks share one quorum, pair (i, i) is task i's."""

    name = "cqs"

    def __init__(self, grid: Grid) -> None:
        if not grid.same_positions:
            raise ValueError(
                "schedule 'cqs' needs queries and keys to be the same positions (as many queries as keys, q_start 0, "
                "no query slice); take 'rectangular' or 'auto'"
            )
        self.grid = grid
        self.rows_per_task = quorum_size(grid.rows.chunks)

    def __len__(self) -> int:
        return self.grid.rows.chunks

    def tasks(self, lane: int) -> Iterator[Task]:
        for i in range(len(self)):
            members = sorted(quorum(len(self), i))
            yield Task.of(
                lane,
                ((b, tuple(a for a in members if (a != b or a == i) and b in self.grid.needed[a])) for b in members),
            )

    def loads(self) -> tuple[list[int], list[int]]:
        rows, columns = [0] * len(self), [0] * len(self)
        if len(self) > _COUNTED_TASKS:
            return self._average_loads()
        for task in self.tasks(0):
            for row in task.rows:
                rows[row] += 1
            for column in task.columns:
                columns[column] += 1
        return rows, columns

    def _average_loads(self) -> tuple[list[int], list[int]]:
        """A chunk is in k quorums; under a causal mask it is on the wrong end of one of them, on average."""
        filled = [1 if needed else 0 for needed in self.grid.needed]
        full = self.grid.pairs > 0.75 * sum(filled) ** 2
        times = [f * (self.rows_per_task - (not full)) for f in filled]
        return times, list(times)

    def next_use(self, row: int, after: int) -> float:
        later = [task for d in singer_set(len(self)) if (task := (row - d) % len(self)) > after]
        return min(later, default=float("inf"))


class Rectangular:
    """Blocks of ``rows_per_task`` neighbouring row chunks against every column chunk that any of them needs."""

    name = "rectangular"

    def __init__(self, grid: Grid, rows_per_task: int) -> None:
        self.grid = grid
        self.rows_per_task = rows_per_task

    def __len__(self) -> int:
        return -(-self.grid.rows.chunks // self.rows_per_task)

    def tasks(self, lane: int) -> Iterator[Task]:
        for i in range(len(self)):
            block, columns = self._block(i)
            yield Task.of(lane, ((b, tuple(a for a in block if b in self.grid.needed[a])) for b in columns))

    def _block(self, i: int) -> tuple[range, range]:
        """Return the row chunks of a task and the range of column chunks that they need."""
        block = range(i * self.rows_per_task, min((i + 1) * self.rows_per_task, self.grid.rows.chunks))
        needed = [self.grid.needed[a] for a in block if self.grid.needed[a]]
        return block, range(min((r.start for r in needed), default=0), max((r.stop for r in needed), default=0))

    def loads(self) -> tuple[list[int], list[int]]:
        change = [0] * (self.grid.columns.chunks + 1)
        for i in range(len(self)):
            _, columns = self._block(i)
            change[columns.start] += 1
            change[columns.stop] -= 1
        return [1 if needed else 0 for needed in self.grid.needed], list(accumulate(change))[:-1]

    def next_use(self, row: int, after: int) -> float:
        task = row // self.rows_per_task
        return task if task > after else float("inf")
