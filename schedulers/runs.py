"""Sets of chunks or tokens as sorted ranges: a few numbers, however many they hold."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

__all__ = ["NONE", "Runs"]


class Runs(Sequence[int]):
    """A set of integers, as ascending ranges that neither overlap nor touch."""

    __slots__ = ("_starts", "ranges")

    def __init__(self, ranges: Iterable[range]) -> None:
        """Take ranges in ascending order of their starts; those that overlap or touch become one."""
        found: list[range] = []
        for part in ranges:
            if found and part.start <= found[-1].stop:
                found[-1] = range(found[-1].start, max(found[-1].stop, part.stop))
            elif part:
                found.append(part)
        self.ranges = tuple(found)
        self._starts = [part.start for part in found]

    @classmethod
    def of(cls, starts: np.ndarray, stops: np.ndarray) -> "Runs":
        """Take ranges in any order, by their ends."""
        order = np.argsort(starts, kind="stable")
        starts, stops = starts[order], np.maximum.accumulate(stops[order])
        first = np.ones(len(starts), bool)
        first[1:] = starts[1:] > stops[:-1]
        last = np.append(np.flatnonzero(first)[1:] - 1, len(starts) - 1) if len(starts) else np.empty(0, int)
        return cls(map(range, starts[first].tolist(), stops[last].tolist()))

    def __len__(self) -> int:
        return sum(map(len, self.ranges))

    def __iter__(self) -> Iterator[int]:
        for part in self.ranges:
            yield from part

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> "Runs": ...
    def __getitem__(self, index: int | slice) -> "int | Runs":
        assert isinstance(index, int), "a set of runs is not sliced"
        for part in self.ranges:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)

    def __contains__(self, number: object) -> bool:
        assert isinstance(number, int)
        index = bisect_right(self._starts, number) - 1
        return index >= 0 and number in self.ranges[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Runs) and self.ranges == other.ranges

    def __hash__(self) -> int:
        return hash(self.ranges)

    def __repr__(self) -> str:
        return f"Runs({list(self.ranges)})"

    def first_from(self, number: int) -> int | None:
        """Return the smallest member that is at least ``number``, None where there is none."""
        index = max(0, bisect_right(self._starts, number) - 1)
        for part in self.ranges[index : index + 2]:
            if number < part.stop:
                return max(number, part.start)
        return None

    def covers(self, part: range) -> bool:
        """Return whether all of a range is in the set."""
        index = bisect_right(self._starts, part.start) - 1
        return not part or (index >= 0 and part.stop <= self.ranges[index].stop)

    def meets(self, part: range) -> bool:
        """Return whether any of a range is in the set."""
        first = self.first_from(part.start)
        return first is not None and first < part.stop

    @property
    def bits(self) -> int:
        """The set as an integer whose bit n is set where n is a member: as files store it."""
        found = 0
        for part in self.ranges:
            found |= ((1 << len(part)) - 1) << part.start
        return found


NONE = Runs(())
