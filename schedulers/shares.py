"""Shares: how the tasks of a run are dealt out, whoever computes them.

A share is a fixed list of tasks. It folds them in order, from nothing, into partials of its own; a row is the merge of
its shares' partials in the order of the shares. So the bits of a result depend on the number of shares, never on who
worked, or how often.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cqsa_stream.schedulers.tasks import Schedule, Task

__all__ = ["Share"]


@dataclass(frozen=True)
class Share:
    """Share ``number`` of ``count``: neighbouring tasks, as many as any other share has, or one more."""

    number: int = 0
    count: int = 1

    def tasks(self, schedule: Schedule, lane: int, lanes: int) -> Iterator[Task]:
        """Yield the tasks of this share in a lane, in order; some may have no pairs."""
        each = len(schedule)
        first, stop = (lanes * each * n // self.count for n in (self.number, self.number + 1))
        for number in range(max(first - lane * each, 0), min(stop - lane * each, each)):
            yield schedule.task(number, lane)
