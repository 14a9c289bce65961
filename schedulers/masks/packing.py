"""Packing: many small bands that share no row, in one kernel call."""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from cqsa_stream.schedulers.masks.arrays import LEAST, MOST, Bands64, shifted

__all__ = ["Packed", "packed"]

_FAR = 8_192  # columns of a call from its first to its last
_SPREAD = 128  # columns around its own that a kernel may compute for a row


@dataclass(frozen=True, eq=False)
class Packed:
    """One kernel call for ``bands`` that share no row, in the order of their rows."""

    bands: Bands64

    @property
    def rows(self) -> range:
        """From the first row of any band to the last."""
        return range(int(self.bands[0, 0]), int(self.bands[1, -1]))

    @property
    def reach(self) -> range:
        """From the first column of any band to the last."""
        return range(int(self.bands[2].min()), int(self.bands[3].max()))

    @property
    def width(self) -> int:
        """Columns that a row is computed against, about."""
        return int(np.mean(self.bands[3] - self.bands[2])) + _SPREAD

    @property
    def here(self) -> Bands64:
        """The bands, rows and columns counted from the first of these."""
        return shifted(self.bands, -self.rows.start, -self.reach.start)


def packed(bands: Bands64, most: int, *, alike: bool) -> Iterator[Packed]:
    """Yield the calls of sorted bands: few, each of about ``most`` rows at the most.

    ``alike``: in a call all rows see as far to both sides, counted from the last row and the last column of their band.
    """
    for layer in _layers(bands):
        for kind in _kinds(layer) if alike else (layer,):
            number = (kind[0] - kind[0, 0]) // most
            for part in np.split(kind, np.flatnonzero(np.diff(number)) + 1, axis=1):
                yield from [Packed(part)] if alike else _near(part)


def _layers(bands: Bands64) -> Iterator[Bands64]:
    """Share the bands out to lists whose bands share no row: as few as can be."""
    if np.all(bands[0, 1:] >= np.maximum.accumulate(bands[1])[:-1]):
        yield bands
        return
    layer = np.empty(bands.shape[1], np.int64)
    free: list[tuple[int, int]] = []  # (the row from which on it is free, layer)
    for index, (first, stop) in enumerate(zip(bands[0].tolist(), bands[1].tolist(), strict=True)):
        number = heappop(free)[1] if free and free[0][0] <= first else len(free)
        layer[index] = number
        heappush(free, (stop, number))
    for number in range(len(free)):
        yield bands[:, layer == number]


def _near(bands: Bands64) -> Iterator[Packed]:
    """Share bands out so that the columns of a call are not far apart: a kernel may gather all between them."""
    segment = (bands[2] - bands[2].min()) // _FAR
    for number in np.unique(segment) if bands[3].max() - bands[2].min() > _FAR else segment[:1]:
        yield Packed(bands[:, segment == number])


def _kinds(bands: Bands64) -> Iterator[Bands64]:
    _, r1, _, c1, lo, hi = bands
    left = np.where(lo == LEAST, -1, c1 - r1 - lo)
    right = np.where(hi == MOST, -1, hi + r1 - c1)
    kinds, number = np.unique(np.stack([left, right]), axis=1, return_inverse=True)
    for kind in range(kinds.shape[1]):
        yield bands[:, np.reshape(number, -1) == kind]
