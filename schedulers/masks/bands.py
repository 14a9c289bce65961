"""Masks as lists of disjoint bands: which keys a query sees, in closed form.

A band is a rectangle of (query, key) positions between two diagonals. Bands are closed under cutting and shifting;
whether a rectangle is empty, full or partial, and how many scores it holds, takes a few additions however large it is.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from cqsa_stream.schedulers.runs import Runs

__all__ = ["Band", "Mask"]

_LEAST, _MOST = -(2**63), 2**63 - 1  # in an array: no lower, no upper diagonal
_FARTHEST = 2**62  # of a position
_MOST_LISTED = 256  # each is compared with those before it


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
        by = columns - rows
        lo, hi = (None if bound is None else bound + by for bound in (self.lo, self.hi))
        return Band(self.r0 + rows, self.r1 + rows, self.c0 + columns, self.c1 + columns, lo, hi)

    def transposed(self) -> "Band":
        """Return the band with rows and keys exchanged."""
        lo, hi = (None if bound is None else -bound for bound in (self.hi, self.lo))
        return Band(self.c0, self.c1, self.r0, self.r1, lo, hi)

    def meets(self, other: "Band") -> bool:
        """Return whether a query sees a key by both bands."""
        lows = [bound for bound in (self.lo, other.lo) if bound is not None]
        highs = [bound for bound in (self.hi, other.hi) if bound is not None]
        both = self._replace(lo=max(lows, default=None), hi=min(highs, default=None))
        return both.cut(other.rows, other.columns) is not None

    @property
    def full(self) -> bool:
        """Whether each of its rows sees each of its keys, of a band that ``cut`` returned."""
        return self.lo is None and self.hi is None

    @property
    def scores(self) -> int:
        """How many pairs (q, k) see each other, of a band that ``cut`` returned."""
        count = self.r1 - self.r0
        ends = count * self.c1 if self.hi is None else _sum_of_least(self.r0 + self.hi + 1, count, self.c1)
        starts = count * self.c0 if self.lo is None else -_sum_of_least(-(self.r1 - 1 + self.lo), count, -self.c0)
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


class Mask:
    """An ordered list of disjoint bands, with a name for people. Immutable; equal where the bands are.

    The bands lie in six sorted arrays of 64-bit integers and are found by binary search.
    """

    def __init__(self, bands: Iterable[Band], name: str) -> None:
        """Raises ValueError where bands overlap, or lie beyond 2^62."""
        found = [tight for band in bands if (tight := band.cut(band.rows, band.columns)) is not None]
        found.sort(key=lambda band: (band.r0, band.c0))
        for band in found:
            if max(map(abs, filter(None, band)), default=0) > _FARTHEST:
                raise ValueError(f"{band}: expected positions and diagonals of at most 2^62")
        _refuse_overlaps(found)
        self.name = name
        self._fields = tuple(array("q", column) for column in zip(*map(_bounded, found), strict=True))
        self._reach = array("q", accumulate((band.r1 for band in found), max))

    def __len__(self) -> int:
        return len(self._reach)

    def __iter__(self) -> Iterator[Band]:
        return map(self._band, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._fields == other._fields

    def __hash__(self) -> int:
        return hash((len(self), next(iter(self), None)))

    def __repr__(self) -> str:
        return f"Mask({self.name!r}, {len(self)} bands)"

    def __str__(self) -> str:
        return self.name

    def _band(self, index: int) -> Band:
        r0, r1, c0, c1, lo, hi = (field[index] for field in self._fields)
        return Band(r0, r1, c0, c1, None if lo == _LEAST else lo, None if hi == _MOST else hi)

    def cut(self, rows: range, columns: range) -> Iterator[Band]:
        """Yield what of each band lies in a rectangle, in order; each is tight."""
        if not self._fields:
            return
        first, stop = bisect_right(self._reach, rows.start), bisect_left(self._fields[0], rows.stop)
        for index in range(first, stop):
            if (band := self._band(index).cut(rows, columns)) is not None:
                yield band

    def shifted(self, rows: int, columns: int) -> "Mask":
        """Return the mask with its rows and its keys moved."""
        return Mask((band.shifted(rows, columns) for band in self), self.name)

    def restricted(self, rows: range, columns: range) -> "Mask":
        """Return the mask of a rectangle alone."""
        return Mask(self.cut(rows, columns), self.name)

    @cached_property
    def transposed(self) -> "Mask":
        """The mask with rows and keys exchanged."""
        return Mask((band.transposed() for band in self), self.name)

    def scores(self, rows: range, columns: range) -> int:
        """Return how many scores of a rectangle are visible."""
        return sum(band.scores for band in self.cut(rows, columns))

    def keys(self, rows: range) -> Runs:
        """Return the keys that any of these rows sees."""
        return Runs(sorted((band.columns for band in self.cut(rows, _EVERYWHERE)), key=lambda part: part.start))

    def to_list(self) -> list[list[int | None]]:
        """Return six numbers of each band, as JSON holds them."""
        return [list(band) for band in self]

    @classmethod
    def from_list(cls, numbers: Any, name: str) -> "Mask":
        """Raises ValueError where this is not what ``to_list`` returned of a mask."""
        if type(numbers) is not list or not all(type(band) is list and len(band) == 6 for band in numbers):
            raise ValueError("bands; expected lists of six numbers")
        if len(numbers) > _MOST_LISTED:
            raise ValueError(f"{len(numbers)} bands; expected at most {_MOST_LISTED}")
        if not all(type(n) is int for band in numbers for n in band[:4]):
            raise ValueError("bands; expected whole numbers of rows and keys")
        if not all(n is None or type(n) is int for band in numbers for n in band[4:]):
            raise ValueError("bands; expected whole numbers or nothing as diagonals")
        return cls((Band(*band) for band in numbers), name)


_EVERYWHERE = range(-2 * _FARTHEST, 2 * _FARTHEST)


def _bounded(band: Band) -> tuple[int, ...]:
    lo, hi = _LEAST if band.lo is None else band.lo, _MOST if band.hi is None else band.hi
    return (*band[:4], lo, hi)


def _refuse_overlaps(bands: list[Band]) -> None:
    """Raise ValueError where two of these bands, sorted by their first row, show a query the same key."""
    active: list[Band] = []
    for band in bands:
        active = [earlier for earlier in active if earlier.r1 > band.r0]
        for earlier in active:
            if earlier.meets(band):
                raise ValueError(f"{earlier} and {band} overlap; expected disjoint bands: a score would count twice")
        active.append(band)
