"""The two schedules. Each groups and orders the needed pairs of one lane into tasks; every pair is in exactly one.

*CQS Divide*: one task for each cyclic quorum, rows and columns being the same k chunks (arXiv 2604.20819).
*Rectangular*: one task for each block of neighbouring row chunks, columns being all that these need. It moves the
fewest bytes on one device.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from math import gcd
from typing import Protocol

from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.quorums import quorum, quorum_size, singer_set

__all__ = ["NEVER", "Cqs", "Rectangular", "Schedule", "Task", "gaps", "strides"]

NEVER = 1 << 62  # the number of a task that never comes
_STRIDES_WEIGHED = 128


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

    def pairs_by_row(self) -> Counter[int]:
        """Return how many pairs of each row the task computes."""
        return Counter(row for _, rows in self.steps for row in rows)

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
    grid: Grid
    rows_per_task: int

    def __len__(self) -> int:
        """The number of tasks of one lane."""

    def tasks(self, lane: int) -> Iterator[Task]:
        """Yield the tasks of one lane, lazily; some may have no pairs."""

    def next_row(self, row: int, after: int) -> int:
        """Return the number of the first task after number ``after`` that may hold the row, NEVER where none does."""

    def next_column(self, column: int, after: int) -> int:
        """Return the number of the first task after number ``after`` that may stream the column, or NEVER."""

    def loads(self) -> tuple[list[float], list[float]]:
        """Return how many tasks of one lane hold each row chunk and stream each column chunk; for CQS, on average."""


def gaps(c: int, stride: int) -> list[int]:
    """Return after how many tasks a chunk comes back, taken in the order 0, stride, 2 stride, ... of the quorums.

    They are the gaps of a difference set around the circle: each is a difference, so no two of them are equal.
    """
    places = _places(c, stride)
    return sorted(((b - a) % c for a, b in zip(places, (*places[1:], places[0]), strict=True)))


@cache
def _places(c: int, stride: int) -> tuple[int, ...]:
    """Return the places, before that of quorum i, of the quorums i - d that hold chunk i."""
    back = pow(stride, -1, c)
    return tuple(sorted(d * back % c for d in singer_set(c)))


@cache
def strides(c: int) -> tuple[int, ...]:
    """Return strides that take the quorums in different orders, 1 first."""
    found = [stride for stride in range(1, c // 2 + 1) if gcd(stride, c) == 1]
    return tuple(found[:: -(-len(found) // _STRIDES_WEIGHED)])


class Cqs:
    """CQS Divide: each task is a quorum ``S_i``; two distinct chunks share one quorum, pair (i, i) is S_i's.

    Task number t is quorum ``i = t stride mod c``: all orders compute the same, but in some a chunk comes back sooner.
    """

    name = "cqs"

    def __init__(self, grid: Grid, stride: int = 1) -> None:
        if not grid.same_positions:
            raise ValueError(
                "schedule 'cqs' needs queries and keys to be the same positions (as many queries as keys, q_start 0, "
                "no query slice); take 'rectangular' or 'auto'"
            )
        self.grid = grid
        self.rows_per_task = quorum_size(grid.rows.chunks)
        self._stride, self._back = stride, pow(stride, -1, grid.rows.chunks)
        self._places = _places(grid.rows.chunks, stride)

    def __len__(self) -> int:
        return self.grid.rows.chunks

    def tasks(self, lane: int) -> Iterator[Task]:
        for number in range(len(self)):
            i = number * self._stride % len(self)
            members = sorted(quorum(len(self), i))
            yield Task.of(
                lane,
                ((b, tuple(a for a in members if (a != b or a == i) and b in self.grid.needed[a])) for b in members),
            )

    def loads(self) -> tuple[list[float], list[float]]:
        """A chunk is in k quorums; under a causal mask the first of them has no keys to see, the last no queries to
        be seen by, where it is not the quorum's own.
        """
        c, k = len(self), self.rows_per_task
        filled = [1 if needed else 0 for needed in self.grid.needed]
        full = self.grid.pairs > 0.75 * sum(filled) ** 2
        lost = (0.0, 0.0) if full else (singer_set(c)[-1] / c, (c - 1) / c)
        return [f * (k - lost[0]) for f in filled], [f * (k - lost[1]) for f in filled]

    def next_row(self, row: int, after: int) -> int:
        c = len(self)
        wanted = (row * self._back - after - 1) % c  # how far the row's own quorum is from the next task, backwards
        index = bisect_right(self._places, wanted) - 1
        task = after + 1 + (wanted - self._places[index]) % c
        return task if task < c else NEVER

    def next_column(self, column: int, after: int) -> int:
        return self.next_row(column, after)


class Rectangular:
    """Blocks of ``rows_per_task`` neighbouring row chunks against every column chunk that any of them needs."""

    name = "rectangular"

    def __init__(self, grid: Grid, rows_per_task: int) -> None:
        self.grid = grid
        self.rows_per_task = rows_per_task

    def __len__(self) -> int:
        return -(-self.grid.rows.chunks // self.rows_per_task)

    def tasks(self, lane: int) -> Iterator[Task]:
        for i, columns in enumerate(self.columns):
            rows = range(i * self.rows_per_task, min((i + 1) * self.rows_per_task, self.grid.rows.chunks))
            yield Task.of(lane, ((b, tuple(a for a in rows if b in self.grid.needed[a])) for b in columns))

    @cached_property
    def columns(self) -> list[range]:
        """The range of column chunks that the rows of each task need."""
        found = []
        for start in range(0, self.grid.rows.chunks, self.rows_per_task):
            needed = [columns for columns in self.grid.needed[start : start + self.rows_per_task] if columns]
            found.append(range(min(r.start for r in needed), max(r.stop for r in needed)) if needed else range(0))
        return found

    def loads(self) -> tuple[list[float], list[float]]:
        change = [0.0] * (self.grid.columns.chunks + 1)
        for columns in self.columns:
            change[columns.start] += 1
            change[columns.stop] -= 1
        return [1.0 if needed else 0.0 for needed in self.grid.needed], list(accumulate(change))[:-1]

    def next_row(self, row: int, after: int) -> int:
        task = row // self.rows_per_task
        return task if task > after else NEVER

    def next_column(self, column: int, after: int) -> int:
        """Later rows see later keys: what the next task leaves out no other takes up."""
        task = after + 1
        return task if task < len(self) and column in self.columns[task] else NEVER
