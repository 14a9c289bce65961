"""How the visible scores of a rectangle fall into kernel calls: each score in exactly one.

Kernels take full rectangles, and triangles on squares: causal ones, whose row i sees columns 0 to i, and reversed ones,
whose row i sees columns i and later. A band between two diagonals is cut into these, or, for kernels that take it, into
tiles with both edges. (Kernels align the corners of a tile that is not square, some the top left, some the bottom
right: in a square all agree.) Bands that share no row go into one call: equal ones that follow one another as a stack
of tiles, small ones packed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from cqsa_stream.schedulers.masks.arrays import LEAST, MOST, Bands64, band_at, bands64
from cqsa_stream.schedulers.masks.band import Band
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.masks.packing import Packed, packed

__all__ = ["Call", "Packed", "Tile", "calls"]

_NARROW = 4  # leaves: bands up to so wide are cut into stacks of low tiles, wider ones into large triangles
_LOWEST = 32  # rows of a tile with two edges: lower ones cost as much


@dataclass(frozen=True)
class Tile:
    """The largest kernel call, in tokens.

    ``leaf`` is the longest side of a causal triangle, ``edge`` the most rows of a tile with a lower edge. ``bands``: a
    tile may have both edges; else a lower edge is a reversed triangle. ``skips``: a call takes no time for what its
    rows do not see; where it has edges, it has no more rows than columns. ``small``: bands of fewer rows and columns
    are packed, up to ``pack`` rows in one call.
    """

    rows: int
    columns: int
    leaf: int
    edge: int
    bands: bool = False
    skips: bool = False
    small: int = 0
    pack: int = 4_096


@dataclass(frozen=True)
class Call:
    """One kernel call: ``tiles`` tiles of equal height whose rows follow one another. The columns of tile t are those
    of the first, moved by t times the height.

    Row i of a tile sees its column j where ``-left <= j - i <= right``; None is unbounded.
    """

    rows: range
    columns: range
    left: int | None = None
    right: int | None = None
    tiles: int = 1

    @property
    def height(self) -> int:
        """Rows of one tile."""
        return len(self.rows) // self.tiles

    @property
    def triangle(self) -> bool:
        """Whether half of each tile is visible."""
        return (self.left is None) != (self.right is None)

    @property
    def reach(self) -> range:
        """The columns of all tiles: from the first of the first to the last of the last."""
        return range(self.columns.start, self.columns.stop + (self.tiles - 1) * self.height)

    def parts(self, most: int) -> Iterator["Call"]:
        """Cut the stack into such of at most so many tiles."""
        for first in range(0, self.tiles, most):
            tiles, moved = min(most, self.tiles - first), first * self.height
            rows = self.rows[moved : moved + tiles * self.height]
            columns = range(self.columns.start + moved, self.columns.stop + moved)
            yield replace(self, rows=rows, columns=columns, tiles=tiles)


def calls(mask: Mask, rows: range, columns: range, tile: Tile) -> Iterator[Call | Packed]:
    """Cut the scores of the rows against the columns into calls that compute every visible score exactly once."""
    few = mask.few(rows, columns)
    if few is None or len(few) > 1:
        yield from _together(mask.cut(rows, columns) if few is None else bands64(few), tile)
    else:
        for band in few:
            yield from _band(band, tile)


def _together(bands: Bands64, tile: Tile) -> Iterator[Call | Packed]:
    """Put bands that share no row together, as far as kernels allow; the others go one by one."""
    height, width = bands[1] - bands[0], bands[3] - bands[2]
    first, counts = _stacks(bands)
    alone = np.ones(len(height), bool)
    for index, count in zip(first.tolist(), counts.tolist(), strict=True):
        band = band_at(bands, index)
        if _is_a_tile(band, tile) and count * len(band.rows) >= tile.small:
            alone[index : index + count] = False
            yield from _stacked(band, count, tile)
    small = alone & (height < tile.small) & (width < tile.small)
    if tile.skips:
        small &= ((bands[4] == LEAST) & (bands[5] == MOST)) | (height <= width)
    if np.count_nonzero(small) > 1:
        yield from packed(bands[:, small], min(tile.pack, tile.rows), alike=tile.skips)
        alone &= ~small
    for index in np.flatnonzero(alone):
        yield from _band(band_at(bands, int(index)), tile)


def _stacks(bands: Bands64) -> tuple[np.ndarray, np.ndarray]:
    """Return the first of each two or more equal bands that follow one another along the diagonal, and how many."""
    r0, r1, c0, c1, lo, hi = bands
    like = np.stack([r1 - r0, c1 - c0, c0 - r0, np.where(lo == LEAST, 0, lo), np.where(hi == MOST, 0, hi)])
    like = np.concatenate([like, lo[None] == LEAST, hi[None] == MOST])
    goes_on = (like[:, 1:] == like[:, :-1]).all(0) & (r0[1:] == r1[:-1])
    edges = np.diff(np.concatenate([[False], goes_on, [False]]).astype(np.int8))
    first, last = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return first, last - first + 1


def _is_a_tile(band: Band, tile: Tile) -> bool:
    """Return whether a kernel takes a whole band as a tile."""
    height, width = len(band.rows), len(band.columns)
    most = tile.rows if band.full else tile.edge if band.lo is not None else tile.leaf
    triangle = height == width and (band.left, band.right) in ((None, 0), (0, None))
    return height <= most and width <= tile.columns and (band.full or triangle or tile.bands)


def _stacked(band: Band, count: int, tile: Tile) -> Iterator[Call]:
    height = len(band.rows)
    together = max(1, tile.rows // height)
    for done in range(0, count, together):
        tiles, start = min(together, count - done), band.r0 + done * height
        columns = range(band.c0 + done * height, band.c1 + done * height)
        yield Call(range(start, start + tiles * height), columns, band.left, band.right, tiles)


def _band(band: Band, tile: Tile) -> Iterator[Call]:
    for start in range(band.r0, band.r1, tile.rows):
        block = band.cut(range(start, min(start + tile.rows, band.r1)), band.columns)
        if block is not None:
            yield from _with_edges(block, tile) if tile.skips and block.lo is not None else _block(block, tile)


def _with_edges(band: Band, tile: Tile) -> Iterator[Call]:
    """Cut into tiles with edges of no more rows than columns: below the last key's own row is a reversed triangle."""
    width = len(band.columns)
    if width > 2 * tile.columns or not tile.bands:
        yield from _block(band, tile)
    elif len(band.rows) <= width:
        yield Call(band.rows, band.columns, band.left, band.right)
    else:
        for rows in (range(band.r0, band.r0 + width), range(band.r0 + width, band.r1)):
            part = band.cut(rows, band.columns)
            if part is not None:
                yield from _with_edges(part, tile) if part.lo is not None else _block(part, tile)


def _block(band: Band, tile: Tile) -> Iterator[Call]:
    """Cut at the rows where a diagonal enters or leaves the band's keys: between them each edge stands or moves."""
    enters = band.r0 if band.lo is None else max(band.r0, band.c0 - band.lo)  # from here on the first key moves
    leaves = band.r1 if band.hi is None else min(band.r1, band.c1 - band.hi)  # up to here the last key moves
    places = sorted({band.r0, min(enters, band.r1), max(leaves, band.r0), band.r1})
    for start, stop in pairwise(places):
        first, last = band.c0, band.c1
        if band.lo is not None and start >= enters:
            first = start + band.lo
        if band.hi is not None and stop <= leaves:
            last = start + band.hi
        moving = (band.lo is not None and start >= enters, band.hi is not None and stop <= leaves)
        yield from _segment(range(start, stop), first, last, moving, tile)


def _segment(rows: range, first: int, last: int, moving: tuple[bool, bool], tile: Tile) -> Iterator[Call]:
    """Cut rows that see keys from ``first`` on and up to ``last``: an edge that moves goes one key further each row.

    ``first`` is the first row's first key; ``last`` its last key where that edge moves, else the end of the keys.
    """
    if moving == (True, True):
        yield from _diagonal_band(rows, first, last, tile)
        return
    count = len(rows)
    if moving[0]:
        yield from _reversed(rows, first, tile)
        yield from _full(rows, range(first + count, last), tile)
    elif moving[1]:
        yield from _full(rows, range(first, last), tile)
        yield from _causal(rows, last, tile)
    else:
        yield from _full(rows, range(first, last), tile)


def _diagonal_band(rows: range, first: int, last: int, tile: Tile) -> Iterator[Call]:
    """Cut rows that see equally many keys, each one further than the row before.

    A block of h rows, h below the band's width, sees a reversed triangle of side h, keys that all its rows see, and a
    causal triangle of side h: three calls, or one of both edges.
    """
    between = last - first  # keys that a row sees, but one
    narrow = between <= _NARROW * tile.leaf
    height = min(tile.edge, tile.leaf, between) if narrow else min(tile.rows, between)
    low = min(tile.edge, max(_LOWEST, between))
    one_call = narrow and tile.bands and low + between <= tile.columns
    height = max(1, low if one_call else height)
    together = max(1, tile.rows // height) if narrow else 1  # keys that tiles share are not copied
    done = 0
    while left := len(rows) - done:
        side = min(height, left)
        tiles = max(1, min(together, left // side))
        block = range(rows.start + done, rows.start + done + tiles * side)
        if one_call:
            yield Call(block, range(first + done, last + done + side), 0, between, tiles)
        else:
            yield from _three(block, first + done, last + done, side, tiles, tile)
        done += tiles * side


def _three(rows: range, first: int, last: int, side: int, tiles: int, tile: Tile) -> Iterator[Call]:
    """Cut blocks of ``side`` rows into their triangles and what is between them."""
    if first == last:  # a single diagonal
        yield Call(rows, range(last, last + side), None, 0, tiles)
    elif tiles > 1:
        yield Call(rows, range(first, first + side), 0, None, tiles)
        for start in range(first + side, last, tile.columns):
            yield Call(rows, range(start, min(start + tile.columns, last)), tiles=tiles)
        yield Call(rows, range(last, last + side), None, 0, tiles)
    else:
        yield from _reversed(rows, first, tile)
        yield from _full(rows, range(first + side, last), tile)
        yield from _causal(rows, last, tile)


def _causal(rows: range, first: int, tile: Tile) -> Iterator[Call]:
    """Cut the triangle in which row i sees the keys ``first`` to ``first + i``."""
    yield from _leaves(rows, first, tile.leaf, (None, 0))
    yield from _beside(rows, first, tile.leaf, tile, lower=True)


def _reversed(rows: range, first: int, tile: Tile) -> Iterator[Call]:
    """Cut the triangle in which row i of n sees the keys ``first + i`` to ``first + n - 1``."""
    yield from _leaves(rows, first, tile.edge, (0, None))
    yield from _beside(rows, first, tile.edge, tile, lower=False)


def _leaves(rows: range, first: int, leaf: int, bounds: tuple[int | None, int | None]) -> Iterator[Call]:
    """Yield the triangles along the diagonal: those of one leaf all in one call, and the rest."""
    whole = len(rows) // leaf
    if whole:
        yield Call(rows[: whole * leaf], range(first, first + leaf), *bounds, whole)
    if rest := rows[whole * leaf :]:
        yield Call(rest, range(first + whole * leaf, first + len(rows)), *bounds)


def _beside(rows: range, first: int, leaf: int, tile: Tile, *, lower: bool) -> Iterator[Call]:
    """Cut what lies on one side of the leaves of a square by halving: below them, or above."""
    count = -(-len(rows) // leaf)
    if count < 2:
        return
    half = (count + 1) // 2 * leaf
    near, far = range(first, first + half), range(first + half, first + len(rows))
    yield from _full(rows[half:], near, tile) if lower else _full(rows[:half], far, tile)
    yield from _beside(rows[:half], first, leaf, tile, lower=lower)
    yield from _beside(rows[half:], first + half, leaf, tile, lower=lower)


def _full(rows: range, columns: range, tile: Tile) -> Iterator[Call]:
    for row in range(rows.start, rows.stop, tile.rows):
        for column in range(columns.start, columns.stop, tile.columns):
            yield Call(
                range(row, min(row + tile.rows, rows.stop)),
                range(column, min(column + tile.columns, columns.stop)),
            )
