"""Masks: which keys a query sees, and how a rectangle of scores falls into kernel calls.

Alignment is by position: query row i stands at position ``q_start + i`` and key j at position j. A causal query sees
the keys at positions up to and including its own. (Kernels align the corners of a tile that is not square, some the top
left, some the bottom right: the calls below have square causal tiles, where all agree.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from cqsa_stream.schedulers.model.memory import Tile

__all__ = ["Call", "Causal", "Full", "Mask", "TileMask", "mask_of"]

TileMask = Literal["full", "causal"]  # causal: a square tile, whose row i sees its columns 0..i


@dataclass(frozen=True)
class Call:
    """One kernel call: query rows against keys, both as token ranges of the whole axes.

    Where ``tiles`` is above 1, it is as many equal tiles along the diagonal, which share no row and no key.
    """

    rows: range
    columns: range
    mask: TileMask
    tiles: int = 1


class Mask(Protocol):
    """What an engine needs to know of a mask."""

    def keys_seen(self, rows: range) -> range:
        """Return the smallest range that holds every key seen by any of the (not empty) query rows."""

    def calls(self, rows: range, columns: range, tile: Tile) -> Iterator[Call]:
        """Cut the scores of the rows against the columns into calls that compute every visible score exactly once."""

    def seen_by(self, row: int) -> range:
        """Return the keys that one query row sees."""

    def scores(self, rows: range, columns: range) -> int:
        """Return how many scores of the rectangle are visible."""


@dataclass(frozen=True)
class Full:
    """Every query sees every key."""

    keys: int

    def keys_seen(self, rows: range) -> range:
        return range(self.keys)

    def seen_by(self, row: int) -> range:
        return range(self.keys)

    def scores(self, rows: range, columns: range) -> int:
        return len(rows) * len(columns)

    def calls(self, rows: range, columns: range, tile: Tile) -> Iterator[Call]:
        return _full(rows, columns, tile)


@dataclass(frozen=True)
class Causal:
    """Query row i sees keys ``0 .. q_start + i``; where that is negative, none."""

    keys: int
    q_start: int

    def keys_seen(self, rows: range) -> range:
        return self.seen_by(rows.stop - 1)

    def seen_by(self, row: int) -> range:
        return range(max(0, min(self.keys, self.q_start + row + 1)))

    def scores(self, rows: range, columns: range) -> int:
        """Sum over the rows of ``clip(q_start + row + 1 - columns.start, 0, len(columns))``."""
        first = self.q_start + rows.start + 1 - columns.start
        last = first + len(rows)
        width = len(columns)
        rising = range(max(first, 0), max(min(last, width), max(first, 0)))
        return (rising.start + rising.stop - 1) * len(rising) // 2 + width * max(0, last - max(first, width))

    def calls(self, rows: range, columns: range, tile: Tile) -> Iterator[Call]:
        for start in range(rows.start, rows.stop, tile.rows):
            yield from self._block(range(start, min(start + tile.rows, rows.stop)), columns, tile)

    def _block(self, rows: range, columns: range, tile: Tile) -> Iterator[Call]:
        """Split into the keys before the first row's own (seen by all), the diagonal, and the rows below it."""
        first, last = self.q_start + rows.start, self.q_start + rows.stop
        start = max(columns.start, min(first, columns.stop))
        stop = max(start, min(columns.stop, last))
        yield from _full(rows, range(columns.start, start), tile)
        below = rows.start + max(stop - first, 0)
        yield from _diagonal(range(below - (stop - start), below), range(start, stop), tile)
        yield from _full(range(below, rows.stop), range(start, stop), tile)


def _diagonal(rows: range, columns: range, tile: Tile) -> Iterator[Call]:
    """Cut an aligned square: its triangles of one leaf all in one call, and what lies below them by halving."""
    whole = len(rows) // tile.leaf
    if whole:
        yield Call(rows[: whole * tile.leaf], columns[: whole * tile.leaf], "causal", whole)
    if rows[whole * tile.leaf :]:
        yield Call(rows[whole * tile.leaf :], columns[whole * tile.leaf :], "causal")
    yield from _below(rows, columns, tile)


def _below(rows: range, columns: range, tile: Tile) -> Iterator[Call]:
    leaves = -(-len(rows) // tile.leaf)
    if leaves < 2:
        return
    half = (leaves + 1) // 2 * tile.leaf
    yield from _full(rows[half:], columns[:half], tile)
    yield from _below(rows[:half], columns[:half], tile)
    yield from _below(rows[half:], columns[half:], tile)


def _full(rows: range, columns: range, tile: Tile) -> Iterator[Call]:
    for row in range(rows.start, rows.stop, tile.rows):
        for column in range(columns.start, columns.stop, tile.columns):
            yield Call(
                range(row, min(row + tile.rows, rows.stop)),
                range(column, min(column + tile.columns, columns.stop)),
                "full",
            )


def mask_of(causal: bool, keys: int, q_start: int) -> Mask:
    """Return the mask of a problem."""
    return Causal(keys, q_start) if causal else Full(keys)
