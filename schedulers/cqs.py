"""CQS Divide: one task for each cyclic quorum, rows and columns being the same k chunks (arXiv 2604.20819).

Any two quorums of a perfect difference set share exactly one chunk, so no order makes neighbours more alike; but how
soon a chunk comes back depends on it.
"""

from bisect import bisect_right
from functools import cache
from math import gcd
from typing import ClassVar

from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.quorums import quorum, quorum_size, singer_set
from cqsa_stream.schedulers.tasks import NEVER, Task

__all__ = ["Cqs", "best_stride", "gaps", "kept", "strides"]

_STRIDES_WEIGHED = 128


def gaps(c: int, stride: int) -> list[int]:
    """Return after how many tasks a chunk comes back, taken in the order 0, stride, 2 stride, ... of the quorums.

    They are the gaps of a difference set around the circle: each is a difference, so no two of them are equal.
    """
    places = _places(c, stride)
    return sorted(((b - a) % c for a, b in zip(places, (*places[1:], places[0]), strict=True)))


def kept(ordered: list[int], room: float, free: int) -> float:
    """Return how many of a chunk's uses fit the room: the soonest, each taking its place until it comes."""
    number = 0.0
    for gap in ordered[:-1]:
        if gap - free > room:
            return number + room / (gap - free)
        room -= gap - free
        number += 1
    return number


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


def best_stride(c: int, partials: int, blocks: float) -> int:
    """Return the stride by which most of what stays in memory is used again: partials first, then blocks.

    ``partials``: places for partials besides those that a task holds; ``blocks``: chunks whose blocks are kept.
    """

    def used_again(stride: int) -> tuple[float, float]:
        ordered = gaps(c, stride)
        return kept(ordered, partials, 1), kept(ordered, blocks, 0)

    return max(strides(c), key=used_again)


class Cqs:
    """Each task is a quorum ``S_i``; two distinct chunks share one quorum, pair (i, i) is S_i's.

    Task number t is quorum ``i = t stride mod c``: all orders compute the same.
    """

    name: ClassVar = "cqs"
    returns: ClassVar = True
    movable: ClassVar = True
    grows: ClassVar = False
    same_positions: ClassVar = True
    needs: ClassVar = (
        "schedule 'cqs' needs queries and keys to be the same positions (as many queries as keys, q_start 0, no query "
        "slice); take 'rectangular' or 'auto'"
    )

    def __init__(self, grid: Grid, stride: int = 1) -> None:
        if not grid.same_positions:
            raise ValueError(self.needs)
        self.grid = grid
        self.rows_per_task = quorum_size(grid.rows.chunks)
        self._stride, self._back = stride, pow(stride, -1, grid.rows.chunks)
        self._places = _places(grid.rows.chunks, stride)
        self._known: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    @classmethod
    def least_rows(cls, rows: Axis) -> int:
        return quorum_size(rows.chunks)

    @classmethod
    def over(cls, grid: Grid, rows_per_task: int, stride: int) -> "Cqs":
        return cls(grid, stride)

    def __len__(self) -> int:
        return self.grid.rows.chunks

    def task(self, number: int, lane: int) -> Task:
        i = number * self._stride % len(self)
        members = sorted(quorum(len(self), i))
        needed = {a: self.grid.needed(a) for a in members}
        steps = ((b, tuple(a for a in members if (a != b or a == i) and b in needed[a])) for b in members)
        return Task.of(number, lane, steps)

    def weights(self) -> list[int]:
        """All equal: so they are under a full or causal mask, and to count the pairs of others would take minutes."""
        return [1] * len(self)

    def chunks_of(self, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        known = self._known.get(number)
        if known is None:
            task = self.task(number, 0)
            known = self._known[number] = task.rows, task.columns
        return known

    def next_row(self, row: int, after: int) -> int:
        c = len(self)
        wanted = (row * self._back - after - 1) % c  # how far the row's own quorum is from the next task, backwards
        index = bisect_right(self._places, wanted) - 1
        task = after + 1 + (wanted - self._places[index]) % c
        return task if task < c else NEVER

    def next_column(self, column: int, after: int) -> int:
        return self.next_row(column, after)

    def found_again(self, slots: float) -> float:
        ordered = gaps(len(self), self._stride)
        return kept(ordered, slots, 0) / len(ordered)

    def partials_found(self, places: int) -> float:
        ordered = gaps(len(self), self._stride)
        if places >= self.grid.rows.filled:
            return 1.0
        return min(1.0, kept(ordered, places - self.rows_per_task, 1) / max(1, len(ordered) - 1))

    def ending_together(self) -> int:
        return self.rows_per_task
