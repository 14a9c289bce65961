"""Any mask, row by row: runs of keys, which become bands where their ends stand or move along from row to row."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cqsa_stream.schedulers.masks.arrays import LEAST, MOST, Bands64, cut
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.masks.rule import Rule, array_of

__all__ = ["Dense", "linked", "runs_of"]

_MOST_BANDS = 10**6
_SCORES_AT_A_TIME = 1 << 26


@dataclass(frozen=True, eq=False)
class Dense(Rule):
    """``start <= j < stop`` of one of the ``runs`` (i, start, stop): by rows, those of a row do not touch."""

    runs: np.ndarray
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        """Raises ValueError where these are no such runs, or become too many bands."""
        found = array_of("runs", np.empty((0, 3), np.int64) if np.size(self.runs) == 0 else self.runs, 2)
        if found.shape[1] != 3:
            raise ValueError(f"runs: found {found.shape[1]} numbers each; expected three: row, first key, end")
        row, start, end = found.T
        apart = (row[1:] > row[:-1]) | ((row[1:] == row[:-1]) & (start[1:] > end[:-1]))
        if not apart.all() or np.any(start >= end) or np.any(start < 0) or np.any((found < -(2**61)) | (found > 2**61)):
            raise ValueError("runs: expected ascending rows, and in each of them runs that do not touch")
        bands = linked(row, start, end)
        if bands.shape[1] > _MOST_BANDS:
            raise ValueError(
                f"{bands.shape[1]:,} bands; expected at most {_MOST_BANDS:,}: rows that have little in common with the "
                "next, and many runs each, are no mask that can be streamed"
            )
        object.__setattr__(self, "runs", found)
        object.__setattr__(self, "_bands", bands)

    @classmethod
    def of(cls, seen: np.ndarray, first: int) -> "Dense":
        """Return the mask of a boolean matrix [queries, keys], whose first row is the query at a position."""
        step, found = max(1, _SCORES_AT_A_TIME // max(1, seen.shape[1])), [np.empty((0, 3), np.int64)]
        for start in range(0, len(seen), step):
            row, begin, end = runs_of(seen[start : start + step])
            found.append(np.stack([row + start + first, begin, end], axis=1))
        return cls(np.concatenate(found))

    def over(self, rows: range, keys: int) -> Mask:
        bands: Bands64 = self._bands  # type: ignore[attr-defined]
        return Mask.of_disjoint(cut(bands, rows.start, rows.stop, 0, keys), str(self))

    def __str__(self) -> str:
        return f"{len(self.runs):,} runs of keys"


Runs3 = tuple[np.ndarray, np.ndarray, np.ndarray]


def runs_of(seen: np.ndarray) -> Runs3:
    """Return (row, first column, end) of each run of True, by rows."""
    edges = np.zeros((seen.shape[0], seen.shape[1] + 1), np.int8)
    edges[:, :-1] = seen
    edges[:, 1:] -= seen
    row, start = np.nonzero(edges == 1)
    return row, start, np.nonzero(edges == -1)[1]


def linked(row: np.ndarray, start: np.ndarray, end: np.ndarray, *, diagonal: bool = True) -> Bands64:
    """Return bands of runs that follow one another: both ends of each stand or, with ``diagonal``, move by one a row.

    The runs of a row do not touch, so at most one run of the next row follows a run.
    """
    numbers = np.arange(len(row))
    follower, move = _followers(row, start, end, diagonal=diagonal)
    before = np.full(len(row), -1)  # the move by which a run is reached
    goes_on = follower >= 0
    before[follower[goes_on]] = move[goes_on]
    goes_on &= (before == -1) | (before == move)  # where the move changes, a band ends
    root = numbers.copy()
    root[follower[goes_on]] = numbers[goes_on]
    while not np.array_equal(root, further := root[root]):
        root = further
    head, tail = np.flatnonzero(root == numbers), np.flatnonzero(~goes_on)
    tail = tail[np.argsort(root[tail])]  # in the order of their heads
    move = np.where(goes_on[head], move[head], 0)
    lo = np.where(move & 2, start[head] - row[head], LEAST)
    hi = np.where(move & 1, end[head] - 1 - row[head], MOST)
    return np.stack([row[head], row[tail] + 1, start[head], end[tail], lo, hi]).astype(np.int64)


def _followers(row: np.ndarray, start: np.ndarray, end: np.ndarray, *, diagonal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the run that follows each, -1 where none does, and how it moves: 2 its first column, plus 1 its end."""
    count, width = len(row), 2 * len(row) + 1
    rows, columns = (
        np.unique(np.concatenate([x, x + 1]), return_inverse=True)[1] for x in (row, start)
    )  # small numbers
    place = rows[:count] * width + columns[:count]
    follower, move = np.full(count, -1), np.zeros(count, int)
    for step in (0, 1) if diagonal else (0,):
        wanted = rows[count:] * width + (columns[count:] if step else columns[:count])
        found = np.minimum(np.searchsorted(place, wanted), count - 1)
        grown = end[found] - end
        there = (place[found] == wanted) & ((grown == 0) | ((grown == 1) & diagonal))
        follower[there], move[there] = found[there], 2 * step + grown[there]
    return follower, move
