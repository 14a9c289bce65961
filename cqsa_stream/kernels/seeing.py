"""Which columns the rows of a tile see, as ranges, one of each row; and bands that share no row, as small tiles.

Ranges are ``first``, ``stop`` of shape [tiles, rows]: row i of tile t sees the columns ``first[t, i]`` up to, without,
``stop[t, i]``.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn.functional import pad

from cqsa_stream.kernels.contract import Attended, Keys, Queries, Values
from cqsa_stream.schedulers.masks.arrays import Bands64, cut_and_kept

__all__ = ["PACKING_BYTES", "PACKING_NUMBERS", "Ranges", "Seen", "by_tiles", "hidden_by", "ranges"]

_HEIGHT = 128  # rows of a gathered tile
_LEAST_WIDTH = 64
_MOST_SCORES = 1 << 20  # of gathered tiles at a time
PACKING_BYTES = 2 * 4 * _MOST_SCORES  # what is added to their scores, and how it is made
PACKING_NUMBERS = 2 * _MOST_SCORES // _LEAST_WIDTH  # of each feature: gathered keys or values, rows

Ranges = tuple[Int64[Tensor, "tiles q"], Int64[Tensor, "tiles q"]]


class Seen(NamedTuple):
    """What the rows of tiles see; ``ahead [tiles]``: by how much the first column stands after the first row."""

    first: Int64[Tensor, "tiles q"]
    stop: Int64[Tensor, "tiles q"]
    ahead: Int64[Tensor, " tiles"]


def ranges(rows: int, columns: int, left: int | None, right: int | None, device: torch.device) -> Ranges:
    """Return what each row of one tile sees."""
    own = torch.arange(rows, device=device)[None]
    first = torch.zeros_like(own) if left is None else (own - min(left, rows)).clamp_(min=0)
    stop = torch.full_like(own, columns) if right is None else (own + min(right, columns) + 1).clamp_(max=columns)
    return first, stop


def hidden_by(first: Tensor, stop: Tensor, columns: Int64[Tensor, " k"]) -> Bool[Tensor, "tiles q k"]:
    """Return which of these columns each row does not see."""
    return (columns < first.unsqueeze(2)) | (columns >= stop.unsqueeze(2))


def by_tiles(
    q: Queries,
    k: Keys,
    v: Values,
    bands: Bands64,
    ahead: int,
    attend: Callable[[Tensor, Tensor, Tensor, Seen], Attended],
) -> Attended:
    """Attend rows of bands that share no row by tiles of few rows and the columns that these see, gathered.

    ``attend`` takes tiles as so many times the heads.
    """
    (heads, rows, dim), columns, device = q.shape, k.shape[1], q.device
    count = -(-rows // _HEIGHT)
    q = pad(q, (0, 0, 0, count * _HEIGHT - rows)).view(heads, count, _HEIGHT, dim)
    out = q.new_zeros(heads, count, _HEIGHT, v.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
    lse = torch.full((heads, count, _HEIGHT), -torch.inf, dtype=torch.float64, device=device)
    for tiles, starts, width, first, stop in _gathered(bands, columns):
        of_tile = torch.from_numpy(tiles).to(device)
        place = (torch.from_numpy(starts).to(device)[:, None] + torch.arange(width, device=device)).flatten()
        seen = Seen(*(torch.from_numpy(x).to(device) for x in (first, stop, starts + ahead - tiles * _HEIGHT)))
        query = q[:, of_tile].transpose(0, 1).flatten(0, 1)
        key, value = (
            x[:, place].view(len(x), len(tiles), width, x.shape[2]).transpose(0, 1).flatten(0, 1) for x in (k, v)
        )
        found, found_lse = (x.view(len(tiles), heads, *x.shape[1:]) for x in attend(query, key, value, seen))
        out[:, of_tile] = found.transpose(0, 1).to(out.dtype)
        lse[:, of_tile] = found_lse.transpose(0, 1).double()
    return out.flatten(1, 2)[:, :rows], lse.flatten(1, 2)[:, :rows]


def _gathered(bands: Bands64, columns: int) -> Iterator[tuple[np.ndarray, np.ndarray, int, np.ndarray, np.ndarray]]:
    """Yield (tiles, their first columns, how many columns each has, first and stop of their rows).

    Tiles that see about equally many columns come together.
    """
    first, last = bands[0] // _HEIGHT, (bands[1] - 1) // _HEIGHT
    of_band = np.repeat(np.arange(bands.shape[1]), last - first + 1)
    tile = np.arange(len(of_band)) - np.repeat(np.cumsum(last - first + 1) - (last - first + 1), last - first + 1)
    tile += first[of_band]
    parts, kept = cut_and_kept(bands[:, of_band], tile * _HEIGHT, (tile + 1) * _HEIGHT, 0, columns)
    tile = tile[kept]
    tiles, index = np.unique(tile, return_index=True)
    starts, stops = np.minimum.reduceat(parts[2], index), np.maximum.reduceat(parts[3], index)
    sizes = np.ceil(np.log2(np.maximum(stops - starts, _LEAST_WIDTH)))
    for size in np.unique(sizes):
        those = np.flatnonzero(sizes == size)
        width = int((stops - starts)[those].max())
        width = min(columns, -(-width // 32) * 32)
        most = max(1, _MOST_SCORES // (_HEIGHT * width))
        for some in np.split(those, range(most, len(those), most)):
            begin = np.minimum(starts[some], columns - width)
            inside = np.isin(tile, tiles[some])
            place = np.searchsorted(tiles[some], tile[inside])
            yield tiles[some], begin, width, *_painted(parts[:, inside], tiles[some], begin, place)


def _painted(parts: Bands64, tiles: np.ndarray, starts: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return first and stop of each row, columns counted from the tile's first."""
    r0, r1, c0, c1, lo, hi = parts
    height = r1 - r0
    within = np.arange(int(height.sum())) - np.repeat(np.cumsum(height) - height, height)
    lo, hi = np.maximum(lo, c0 - r1 + 1), np.minimum(hi, c1 - r0 - 1)
    c0, c1, lo, hi, row, number = (np.repeat(x, height) for x in (c0, c1, lo, hi, r0, place))
    row = row + within
    first, stop = np.zeros((2, len(tiles), _HEIGHT), np.int64)
    at = number, row - tiles[number] * _HEIGHT
    first[at] = np.maximum(c0, row + lo) - starts[number]
    stop[at] = np.minimum(c1, row + hi + 1) - starts[number]
    return first, stop
