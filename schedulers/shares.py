"""Shares: how the tasks of a run are dealt out, whoever computes them.

A share is a fixed list of tasks. It folds them in order, from nothing, into partials of its own; a row is the merge of
its shares' partials in the order of the shares. So the bits of a result depend on the number of shares, never on who
worked, or how often.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from cqsa_stream.schedulers.tasks import Schedule, Task

__all__ = ["MOST_SHARES", "Share", "deal", "firsts"]

MOST_SHARES = 100_000


@dataclass(frozen=True)
class Share:
    """Share ``number`` of ``count``: neighbouring tasks of about as much work as those of any other share.

    Where there are fewer tasks than shares, a task is cut by its columns, and a share holds a part of it.
    """

    number: int = 0
    count: int = 1

    def tasks(self, schedule: Schedule, lane: int, lanes: int) -> Iterator[Task]:
        """Yield the tasks of this share in a lane, in order; some may have no pairs."""
        each = len(schedule)
        if self.count == 1:
            yield from (schedule.task(number, lane) for number in range(each))
        elif lanes * each >= self.count:
            first, stop = _cuts(schedule, lanes, self.count)[self.number : self.number + 2]
            for number in range(max(first - lane * each, 0), min(stop - lane * each, each)):
                yield schedule.task(number, lane)
        else:
            yield from self._parts(schedule, lane, lanes)

    def _parts(self, schedule: Schedule, lane: int, lanes: int) -> Iterator[Task]:
        """Yield what belongs to this share of each task of a lane: the steps in whose middle its pairs are."""
        tasks = [schedule.task(number, lane) for number in range(len(schedule))]
        pairs = sum(len(rows) for task in tasks for _, rows in task.steps)
        low, high = (pairs * lanes * n / self.count for n in (self.number, self.number + 1))
        done = pairs * lane
        for task in tasks:
            ends = list(accumulate((len(rows) for _, rows in task.steps), initial=done))
            middles = [(start + stop) / 2 for start, stop in pairwise(ends)]
            done = ends[-1]
            steps = (step for step, middle in zip(task.steps, middles, strict=True) if low <= middle < high)
            yield Task.of(task.number, lane, steps)


def deal(schedule: Schedule, lanes: int, count: int, worker: int = 0, workers: int = 1) -> list[int]:
    """Return all shares in the order in which a worker takes them: its own before those of others, and of these those
    with the most work first, so that the last ones to end are small.
    """
    numbers = list(range(count))
    if lanes * len(schedule) >= count:
        ends = _ends(schedule, lanes)
        work = [ends[stop] - ends[start] for start, stop in pairwise(_cuts(schedule, lanes, count))]
        numbers.sort(key=lambda number: -work[number])
    own = numbers[worker::workers]
    taken = set(own)
    return own + [number for number in numbers if number not in taken]


def firsts(schedule: Schedule, lanes: int, count: int) -> set[int]:
    """Return the tasks with which shares begin in the first lane, which is like the others; 0 is one of them."""
    each = len(schedule)
    return {0} if lanes * each < count else {first for first in _cuts(schedule, lanes, count) if first < each}


@lru_cache(maxsize=4)
def _cuts(schedule: Schedule, lanes: int, count: int) -> list[int]:
    """Return the first task of each share, of the tasks of all lanes, and their number; no share is without a task."""
    ends = _ends(schedule, lanes)
    middles, tasks = [start + stop for start, stop in pairwise(ends)], len(ends) - 1  # twice
    found = [0]
    for number in range(1, count):
        near = bisect_left(middles, 2 * ends[-1] * number // count)
        found.append(max(found[-1] + 1, min(near, tasks - count + number)))
    return [*found, tasks]


def _ends(schedule: Schedule, lanes: int) -> list[int]:
    """Return where the tasks of all lanes end, side by side and as long as their weights; 0 first."""
    return list(accumulate(list(schedule.weights()) * lanes, initial=0))
