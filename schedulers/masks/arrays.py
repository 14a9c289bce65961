"""Arithmetic on many bands at a time: int64 arrays ``[6, n]`` of (r0, r1, c0, c1, lo, hi).

An unbounded diagonal is LEAST or MOST. What these functions compute of a band is what ``Band`` computes of it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cqsa_stream.schedulers.masks.band import Band

__all__ = [
    "LEAST", "MOST", "Bands64", "band_at", "bands64", "cut", "cut_and_kept", "joined", "refuse_overlaps", "scores",
    "shifted", "sorted_bands", "transposed",
]  # fmt: skip

LEAST, MOST = -(2**63), 2**63 - 1
_PAIRS_AT_A_TIME = 1 << 20
_MOST_PAIRS = 1 << 27  # a minute or so

Bands64 = np.ndarray[Any, np.dtype[np.int64]]
Bounds = int | Bands64


def bands64(bands: Iterable[Band]) -> Bands64:
    """Return bands as an array. Raises OverflowError where a number does not fit."""
    rows = [(*b[:4], LEAST if b.lo is None else b.lo, MOST if b.hi is None else b.hi) for b in bands]
    return np.array(rows, np.int64).reshape(-1, 6).T.copy()


def band_at(bands: Bands64, index: int) -> Band:
    r0, r1, c0, c1, lo, hi = bands[:, index].tolist()
    return Band(r0, r1, c0, c1, None if lo == LEAST else lo, None if hi == MOST else hi)


def sorted_bands(bands: Bands64) -> Bands64:
    """Return the bands by their first row, then their first key."""
    r0, _, c0 = bands[:3]
    step = np.diff(r0)
    if np.all((step > 0) | ((step == 0) & (np.diff(c0) >= 0))):
        return bands
    return np.ascontiguousarray(bands[:, np.lexsort((c0, r0))])


def cut(bands: Bands64, first_row: Bounds, last_row: Bounds, first_key: Bounds, last_key: Bounds) -> Bands64:
    """Return what of each band lies in a rectangle, its own or one for all (ends exclusive), without those in which
    nothing does; tight, as ``Band.cut``.
    """
    return cut_and_kept(bands, first_row, last_row, first_key, last_key)[0]


def cut_and_kept(
    bands: Bands64, first_row: Bounds, last_row: Bounds, first_key: Bounds, last_key: Bounds
) -> tuple[Bands64, np.ndarray]:
    """Return what ``cut`` does, and whether something is left of each band."""
    r0, r1 = np.maximum(bands[0], first_row), np.minimum(bands[1], last_row)
    c0, c1 = np.maximum(bands[2], first_key), np.minimum(bands[3], last_key)
    there = (r0 < r1) & (c0 < c1) & (bands[4] <= bands[5])
    r0, r1, c0, c1 = (x[there] for x in (r0, r1, c0, c1))
    lo, hi = np.maximum(bands[4][there], c0 - r1 + 1), np.minimum(bands[5][there], c1 - r0 - 1)  # as good as unbounded
    r1 = np.minimum(r1, c1 - lo)
    c0 = np.maximum(c0, r0 + lo)
    r0 = np.maximum(r0, c0 - hi)
    c1 = np.minimum(c1, r1 + hi)
    c0 = np.maximum(c0, r0 + lo)
    left = (r0 < r1) & (c0 < c1)
    there[there] = left
    lo, hi = np.where(c0 - r1 + 1 >= lo, LEAST, lo), np.where(c1 - r0 - 1 <= hi, MOST, hi)
    return np.stack([r0, r1, c0, c1, lo, hi])[:, left], there


def shifted(bands: Bands64, rows: int, columns: int) -> Bands64:
    """Return the bands with their rows and keys moved."""
    r0, r1, c0, c1, lo, hi = bands
    by = columns - rows
    lo, hi = np.where(lo == LEAST, LEAST, lo + by), np.where(hi == MOST, MOST, hi + by)
    return np.stack([r0 + rows, r1 + rows, c0 + columns, c1 + columns, lo, hi])


def transposed(bands: Bands64) -> Bands64:
    """Return the bands with rows and keys exchanged, sorted."""
    r0, r1, c0, c1, lo, hi = bands
    lows, highs = np.where(hi == MOST, LEAST, -hi), np.where(lo == LEAST, MOST, -lo)
    return sorted_bands(np.stack([c0, c1, r0, r1, lows, highs]))


def scores(bands: Bands64) -> int:
    """Return how many pairs (q, k) tight, disjoint bands show; exact at any size."""
    if not bands.size:
        return 0
    count, width = bands[1] - bands[0], bands[3] - bands[2]
    if int(count.max()) * int(width.max()) * 4 * len(count) >= 2**63:
        return sum(band_at(bands, index).scores for index in range(len(count)))
    ahead = bands[0] - bands[2]
    lo, hi = np.maximum(bands[4], -ahead - count + 1), np.minimum(bands[5], width - 1 - ahead)
    ends = _sum_of_least(ahead + hi + 1, count, width)
    starts = -_sum_of_least(-(ahead + count - 1 + lo), count, np.zeros_like(count))
    return int((ends - starts).sum())


def _sum_of_least(first: Bands64, count: Bands64, most: Bands64) -> Bands64:
    below = np.clip(most - first, 0, count)
    found: Bands64 = below * first + below * (below - 1) // 2 + (count - below) * most
    return found


def joined(a: Bands64, b: Bands64) -> Bands64:
    """Return what both lists of sorted bands show, as disjoint as they are."""
    if _candidates(a, b)[1].sum() > _MOST_PAIRS:
        raise ValueError(f"{a.shape[1]:,} and {b.shape[1]:,} bands, too many of which share rows to join them")
    parts = [_meeting(a, b, *pairs)[0] for pairs in _overlapping(a, b)]
    return sorted_bands(np.concatenate(parts, axis=1)) if parts else a[:, :0]


def refuse_overlaps(bands: Bands64) -> None:
    """Raise ValueError where two of these sorted bands show a query the same key, or too many share rows and keys."""
    sides = [bands, transposed(bands)]
    bands = min(sides, key=lambda side: int(_candidates(side, side)[1].sum()))
    if _candidates(bands, bands)[1].sum() > _MOST_PAIRS:
        raise ValueError(f"{bands.shape[1]} bands, too many of which share rows and keys to see that none overlap")
    for first, second in _overlapping(bands, bands):
        later = first < second
        first, second = first[later], second[later]
        _, met = _meeting(bands, bands, first, second)
        if met.any():
            index = int(np.argmax(met))
            pair = [band_at(bands, int(of[index])) for of in (first, second)]
            raise ValueError(f"{pair[0]} and {pair[1]} overlap; expected disjoint bands: a score would count twice")


def _meeting(a: Bands64, b: Bands64, of_a: np.ndarray, of_b: np.ndarray) -> tuple[Bands64, np.ndarray]:
    """Return what both bands of each pair show, and whether that is anything."""
    a, b = a[:, of_a], b[:, of_b]
    ends = [0, 2, 4]
    both = np.empty_like(a)
    both[ends] = np.maximum(a[ends], b[ends])
    both[[1, 3, 5]] = np.minimum(a[[1, 3, 5]], b[[1, 3, 5]])
    return cut_and_kept(both, *both[:4])


def _candidates(a: Bands64, b: Bands64) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each band of a, the first of the sorted bands b that may share a row with it, and how many."""
    first = np.searchsorted(np.maximum.accumulate(b[1]), a[0], "right")
    return first, np.maximum(np.searchsorted(b[0], a[1], "left") - first, 0)


def _overlapping(a: Bands64, b: Bands64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the indices of pairs of sorted bands, of a and of b, that share rows and keys: some pairs at a time."""
    first, counts = _candidates(a, b)
    ends = np.cumsum(counts)
    start, done = 0, 0
    while start < len(counts):
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS_AT_A_TIME, "right")))
        some = counts[start:stop]
        of_a = np.repeat(np.arange(start, stop), some)
        of_b = np.arange(len(of_a)) + np.repeat(first[start:stop] - np.cumsum(some) + some, some)
        share = np.maximum(a[::2, of_a], b[::2, of_b])[:2] < np.minimum(a[1::2, of_a], b[1::2, of_b])[:2]
        meet = share[0] & share[1]
        yield of_a[meet], of_b[meet]
        start, done = stop, int(ends[stop - 1])
