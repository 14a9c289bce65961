"""Masks as lists of disjoint bands: which keys a query sees, in closed form.

Whether a rectangle is empty, full or partial, and how many scores it holds, takes a few additions for each band in it,
however large it is. Short lists are walked; long ones lie in a sorted array and are found by binary search.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from cqsa_stream.schedulers.masks import arrays
from cqsa_stream.schedulers.masks.arrays import Bands64, band_at, bands64
from cqsa_stream.schedulers.masks.band import Band
from cqsa_stream.schedulers.runs import Runs

__all__ = ["Mask", "refuse_too_many"]

_MOST_BANDS = 1 << 22
_FARTHEST = 2**61  # of a position in a list: their differences fit 64 bits
_FEW = 16  # bands that are walked faster than searched


class Mask:
    """An ordered list of disjoint bands, with a name for people. Immutable; equal where the bands are."""

    def __init__(self, bands: Iterable[Band] | Bands64, name: str) -> None:
        """Raises ValueError where bands overlap, are too many, or lie beyond 2^61."""
        given = bands if isinstance(bands, np.ndarray) else _array(bands)
        refuse_too_many(given.shape[1])
        plain = np.where((given == arrays.LEAST) | (given == arrays.MOST), 0, given)
        odd = np.flatnonzero((plain < -_FARTHEST).any(0) | (plain > _FARTHEST).any(0))
        if odd.size:
            raise ValueError(f"{band_at(given, int(odd[0]))}; expected positions and diagonals of at most 2^61")
        found = arrays.sorted_bands(arrays.cut(given, *given[:4]))
        arrays.refuse_overlaps(found)
        self._take(found, name)

    @classmethod
    def of_disjoint(cls, bands: Bands64, name: str) -> "Mask":
        """Take bands that are known to be disjoint and tight."""
        found = cls.__new__(cls)
        found._take(arrays.sorted_bands(bands), name)
        return found

    @classmethod
    def of_few(cls, bands: Iterable[Band], name: str) -> "Mask":
        """Take bands that are known to be disjoint and tight."""
        return cls.of_disjoint(bands64(bands), name)

    def _take(self, bands: Bands64, name: str) -> None:
        self.name, self.bands = name, bands
        self.bands.flags.writeable = False
        self._few = [band_at(bands, index) for index in range(len(self))] if len(self) <= _FEW else None
        self._reach = np.maximum.accumulate(bands[1])

    def __len__(self) -> int:
        return int(self.bands.shape[1])

    def __iter__(self) -> Iterator[Band]:
        return (band_at(self.bands, index) for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and np.array_equal(self.bands, other.bands)

    def __hash__(self) -> int:
        return hash((len(self), next(iter(self), None)))

    def __repr__(self) -> str:
        return f"Mask({self.name!r}, {len(self)} bands)"

    def __str__(self) -> str:
        return self.name

    @property
    def nbytes(self) -> int:
        """What long lists hold in memory, those of the transposed mask and of the whole problem's among them."""
        return 0 if self._few is not None else 3 * (self.bands.nbytes + self._reach.nbytes)

    @property
    def has_lower_edges(self) -> bool:
        """Whether some query does not see the keys from a band's first on."""
        return bool(np.any(self.bands[4] != arrays.LEAST))

    def few(self, rows: range, columns: range) -> list[Band] | None:
        """Return what of each band lies in a rectangle, in order, each tight; None where the bands are many."""
        if self._few is None:
            return None
        return [found for band in self._few if (found := band.cut(rows, columns)) is not None]

    def cut(self, rows: range, columns: range) -> Bands64:
        """Return what of each band lies in a rectangle, in order; each is tight."""
        if (few := self.few(rows, columns)) is not None:
            return bands64(few)
        first = int(self._reach.searchsorted(rows.start, "right"))
        stop = int(self.bands[0].searchsorted(rows.stop, "left"))
        return arrays.cut(self.bands[:, first:stop], rows.start, rows.stop, columns.start, columns.stop)

    def shifted(self, rows: int, columns: int) -> "Mask":
        """Return the mask with its rows and its keys moved."""
        if self._few is not None:
            return Mask.of_few((band.shifted(rows, columns) for band in self._few), self.name)
        return Mask.of_disjoint(arrays.shifted(self.bands, rows, columns), self.name)

    def restricted(self, rows: range, columns: range) -> "Mask":
        """Return the mask of a rectangle alone."""
        return Mask.of_disjoint(self.cut(rows, columns), self.name)

    def joined(self, other: "Mask", name: str) -> "Mask":
        """Return what both let through."""
        return Mask.of_disjoint(arrays.joined(self.bands, other.bands), name)

    @cached_property
    def transposed(self) -> "Mask":
        """The mask with rows and keys exchanged."""
        return Mask.of_disjoint(arrays.transposed(self.bands), self.name)

    def scores(self, rows: range, columns: range) -> int:
        """Return how many scores of a rectangle are visible."""
        few = self.few(rows, columns)
        return arrays.scores(self.cut(rows, columns)) if few is None else sum(band.scores for band in few)

    def keys(self, rows: range, columns: range | None = None) -> Runs:
        """Return the keys, of these or of all, that any of these rows sees."""
        columns = _EVERYWHERE if columns is None else columns
        few = self.few(rows, columns)
        if few is None:
            _, _, starts, stops, *_ = self.cut(rows, columns)
            return Runs.of(starts, stops)
        return Runs(sorted((band.columns for band in few), key=lambda part: part.start))

    def seen_by_all(self, rows: range) -> list[range]:
        """Return the keys that all these rows see, of each band that shows them any."""
        few = self.few(rows, _EVERYWHERE)
        if few is None:
            found = self.cut(rows, _EVERYWHERE)
            found = found[:, (found[0] == rows.start) & (found[1] == rows.stop)]
            few = [band_at(found, index) for index in range(found.shape[1])]
        return [band.seen_by_all for band in few if band.rows == rows and band.seen_by_all]


_EVERYWHERE = range(-(2**62), 2**62)


def refuse_too_many(bands: int) -> None:
    """Raise ValueError where a mask would be too long a list."""
    if bands > _MOST_BANDS:
        raise ValueError(f"{bands:,} bands; expected at most {_MOST_BANDS:,}: take larger pieces, or fewer")


def _array(bands: Iterable[Band]) -> Bands64:
    try:
        return bands64(bands)
    except OverflowError as error:
        raise ValueError("a band beyond 2^63; expected positions and diagonals of at most 2^61") from error
