"""Tasks, the units of work; and what a schedule is: an order of all needed pairs of a lane, grouped into tasks."""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from cqsa_stream.schedulers.grid import Axis, Grid

__all__ = ["NEVER", "Schedule", "Task"]

NEVER = 1 << 62  # the number of a task that never comes


@dataclass(frozen=True)
class Task:
    """Hold the rows on the device; for each step stream the column past the step's rows, in this order."""

    number: int
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
    def of(cls, number: int, lane: int, steps: Iterable[tuple[int, tuple[int, ...]]]) -> "Task":
        """Build a task of the steps that have rows at all."""
        kept = tuple(step for step in steps if step[1])
        return cls(number, lane, tuple(sorted({row for _, rows in kept for row in rows})), kept)

    def only(self, lacks: Callable[[int, int], bool]) -> "Task":
        """Return the task with those of its pairs (row, column) alone that something lacks."""
        steps = ((column, tuple(row for row in rows if lacks(row, column))) for column, rows in self.steps)
        return Task.of(self.number, self.lane, steps)


class Schedule(Hashable, Protocol):
    """An order of all needed pairs of a lane.

    ``returns``: several tasks add to the sums of a row chunk, which come and go between them. ``movable``: the tasks
    are equal under a full or causal mask, and may run anywhere. ``grows``: a task may hold more rows than the least.
    ``same_positions``: queries and keys must be the same positions, as ``needs`` says.
    """

    name: ClassVar[str]
    returns: ClassVar[bool]
    movable: ClassVar[bool]
    grows: ClassVar[bool]
    same_positions: ClassVar[bool]
    needs: ClassVar[str]
    grid: Grid
    rows_per_task: int

    @classmethod
    def least_rows(cls, rows: Axis) -> int:
        """Return how many row chunks a task holds at least. Raises ValueError where the axis cannot be so cut."""

    @classmethod
    def over(cls, grid: Grid, rows_per_task: int, stride: int) -> "Schedule":
        """Return the schedule over a grid. Raises ValueError where it cannot be."""

    def __len__(self) -> int:
        """The number of tasks of one lane."""

    def task(self, number: int, lane: int) -> Task:
        """Return a task of a lane; it may have no pairs."""

    def weights(self) -> Sequence[int]:
        """How much work each task of a lane is, compared with the others."""

    def chunks_of(self, number: int) -> tuple[Collection[int], Sequence[int]]:
        """Return the row chunks and the column chunks of a task."""

    def next_row(self, row: int, after: int) -> int:
        """Return the number of the first task after number ``after`` that may hold the row, NEVER where none does."""

    def next_column(self, column: int, after: int) -> int:
        """Return the number of the first task after number ``after`` that may stream the column, or NEVER."""

    def found_again(self, slots: float) -> float:
        """Return which share of the uses of a chunk finds it in memory that keeps so many chunks' worth of blocks."""

    def partials_found(self, places: int) -> float:
        """Return which share of the partials that a task needs again is found in so many places."""

    def ending_together(self) -> int:
        """Return how many rows need their last column at the same time."""
