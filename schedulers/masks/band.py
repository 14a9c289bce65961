"""A band: a rectangle of (query, key) positions between two diagonals. Closed under cutting, shifting, transposing."""

from typing import NamedTuple

__all__ = ["Band"]


class Band(NamedTuple):
    """Query row q sees key k where ``r0 <= q < r1``, ``c0 <= k < c1`` and ``lo <= k - q <= hi`` (None: unbounded)."""

    r0: int
    r1: int
    c0: int
    c1: int
    lo: int | None = None
    hi: int | None = None

    @property
    def rows(self) -> range:
        return range(self.r0, self.r1)

    @property
    def columns(self) -> range:
        return range(self.c0, self.c1)

    def cut(self, rows: range, columns: range) -> "Band | None":
        """Return what of the band lies in a rectangle, None where nothing does.

        The result is tight: each of its rows sees a key and each of its keys is seen; a diagonal that bounds nothing
        any more is None.
        """
        lo, hi = self.lo, self.hi
        r0, r1 = max(self.r0, rows.start), min(self.r1, rows.stop)
        c0, c1 = max(self.c0, columns.start), min(self.c1, columns.stop)
        if lo is not None:
            r1 = min(r1, c1 - lo)
            c0 = max(c0, r0 + lo)
        if hi is not None:
            r0 = max(r0, c0 - hi)
            c1 = min(c1, r1 + hi)
        if lo is not None:  # the first row is another by now
            c0 = max(c0, r0 + lo)
        if r0 >= r1 or c0 >= c1 or (lo is not None and hi is not None and lo > hi):
            return None
        if lo is not None and c0 - (r1 - 1) >= lo:
            lo = None
        if hi is not None and (c1 - 1) - r0 <= hi:
            hi = None
        return Band(r0, r1, c0, c1, lo, hi)

    def shifted(self, rows: int, columns: int) -> "Band":
        """Return the band with its rows and its keys moved."""
        lo, hi = (None if bound is None else bound + columns - rows for bound in (self.lo, self.hi))
        return Band(self.r0 + rows, self.r1 + rows, self.c0 + columns, self.c1 + columns, lo, hi)

    @property
    def full(self) -> bool:
        """Whether each of its rows sees each of its keys, of a band that ``cut`` returned."""
        return self.lo is None and self.hi is None

    @property
    def left(self) -> int | None:
        """How many columns before its own a row sees, if both are counted from the band's first; of a tight band."""
        return None if self.lo is None else self.c0 - self.r0 - self.lo

    @property
    def right(self) -> int | None:
        """How many columns after its own a row sees, if both are counted from the band's first; of a tight band."""
        return None if self.hi is None else self.hi - (self.c0 - self.r0)

    @property
    def scores(self) -> int:
        """How many pairs (q, k) see each other, of a band that ``cut`` returned."""
        count, width, ahead = self.r1 - self.r0, self.c1 - self.c0, self.r0 - self.c0
        ends = count * width if self.hi is None else _sum_of_least(ahead + self.hi + 1, count, width)
        starts = 0 if self.lo is None else -_sum_of_least(-(ahead + count - 1 + self.lo), count, 0)
        return ends - starts

    @property
    def seen_by_all(self) -> range:
        """The keys that each of its rows sees, of a band that ``cut`` returned."""
        first = self.c0 if self.lo is None else max(self.c0, self.r1 - 1 + self.lo)
        stop = self.c1 if self.hi is None else min(self.c1, self.r0 + self.hi + 1)
        return range(first, max(first, stop))


def _sum_of_least(first: int, count: int, most: int) -> int:
    """Return the sum of ``min(most, n)`` over n = first, first + 1, ..., ``count`` of them."""
    below = max(0, min(count, most - first))
    return below * first + below * (below - 1) // 2 + (count - below) * most
