"""Our own tile kernel: an online softmax over blocks of scores by plain products, with a soft cap and ALiBi.

A slope's part is counted from the distance of the nearest key that the row sees, which the log-sum-exp takes back: far
tiles are as exact as near ones. The bits do not depend on how many threads compute: each row's sums are of blocks whose
size is fixed.
"""

from math import e, log2

import torch
from torch import Tensor

from cqsa_stream.kernels.contract import Abilities, Attended, Keys, Queries, Scores, Values
from cqsa_stream.kernels.mending import mend
from cqsa_stream.kernels.seeing import PACKING_BYTES, PACKING_NUMBERS, Seen, by_tiles, hidden_by, ranges
from cqsa_stream.schedulers.masks.arrays import Bands64
from cqsa_stream.schedulers.masks.calls import Tile

__all__ = ["OnlineKernel"]

_ROWS, _KEYS = 512, 1_024  # of scores at a time: they stay in a processor's cache
_BITS = log2(e)
_MOST_EXPONENT = 40.0  # of exp(2 x), beyond which tanh(x) is 1


class OnlineKernel:
    """Tiles of float32, and of float64, on any device."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, tall: bool = False) -> None:
        """``tall``: all rows of a call at a time, as a GPU likes it."""
        self._rows = 1 << 48 if tall else _ROWS
        edge = 1_024 if tall else 128
        self.abilities = Abilities(
            dtypes=(dtype,) if tall else (torch.float32, torch.float64),
            tile=Tile(8_192 if tall else 16_384, 16_384, 1_024, edge, bands=True, small=512),
            terms=frozenset({"soft_cap", "alibi"}),
            score_bytes=12,
            score_rows=self._rows,
            score_columns=_KEYS,
            workspace_bytes=64 << 20 if tall else 0,  # cuBLAS: 32 MiB on Hopper; and what tensors are rounded up by
            packing_bytes=PACKING_BYTES,
            packing_numbers=PACKING_NUMBERS,
        )

    def attend(
        self, q: Queries, k: Keys, v: Values, left: int | None, right: int | None, scores: Scores, ahead: int = 0
    ) -> Attended:
        rows, columns = q.shape[1], k.shape[1]
        seen = Seen(*ranges(rows, columns, left, right, q.device), torch.tensor([ahead], device=q.device))
        return self._attend(q, k, v, seen, scores, edges=(left, right))

    def attend_packed(self, q: Queries, k: Keys, v: Values, bands: Bands64, scores: Scores, ahead: int = 0) -> Attended:
        def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Attended:
            return self.attend_seen(q, k, v, seen, scores)

        return by_tiles(q, k, v, bands, ahead, attend)

    def attend_seen(self, q: Queries, k: Keys, v: Values, seen: Seen, scores: Scores) -> Attended:
        """Return (out, lse) of tiles, which come as so many times the heads; each row sees a range."""
        return self._attend(q, k, v, seen, scores.of_tiles(len(seen.ahead)), edges=(0, 0))

    def _attend(
        self, q: Queries, k: Keys, v: Values, seen: Seen, scores: Scores, *, edges: tuple[int | None, int | None]
    ) -> Attended:
        """``edges``: (None, None) where all rows see all columns; else what each sees is looked at."""
        (heads, rows, _), (kv_heads, columns, _) = q.shape, k.shape
        out, total = q.new_zeros(heads, rows, v.shape[2]), q.new_zeros(heads, rows)
        highest = q.new_full((heads, rows), -torch.inf)
        nearest = _own(seen, rows).clamp(seen.first, seen.stop - 1)
        for first_row in range(0, rows, self._rows):
            part = slice(first_row, min(first_row + self._rows, rows))
            query = q[:, part].reshape(kv_heads, -1, q.shape[2])
            first, stop = seen.first[:, part], seen.stop[:, part]
            begin, end = (0, columns) if edges == (None, None) else _extent(first, stop)
            for start in range(begin // _KEYS * _KEYS, end, _KEYS):
                columns_ = torch.arange(start, min(start + _KEYS, columns), device=q.device)
                block = slice(start, start + len(columns_))
                some = query @ k[:, block].transpose(1, 2)
                _score(
                    some.view(kv_heads, -1, part.stop - part.start, len(columns_)), scores, nearest[:, part], columns_
                )
                by_tile = some.view(len(first), -1, part.stop - part.start, len(columns_))
                if edges != (None, None):
                    by_tile.masked_fill_(hidden_by(first, stop, columns_).unsqueeze(1), -torch.inf)
                _sum_up((out[:, part], total[:, part], highest[:, part]), some, v[:, block])
        blind = total == 0
        out.div_(total.masked_fill(blind, 1.0).unsqueeze(2))
        lse = highest.double() + total.double().log()
        if scores.slopes is not None:
            distance = (_own(seen, rows) - nearest).abs().repeat_interleave(heads // len(seen.ahead), 0)
            lse -= scores.slopes.double().unsqueeze(1) * distance
        lse.masked_fill_(blind, -torch.inf)
        mend(out, lse, ~out.sum(2).isfinite(), q, k, v, seen, scores)
        return out, lse


def _own(seen: Seen, rows: int) -> Tensor:
    """Return the column, perhaps of another tile, that stands where a row does, ``[tiles, q]``."""
    return torch.arange(rows, device=seen.ahead.device) - seen.ahead.unsqueeze(1)


def _extent(first: Tensor, stop: Tensor) -> tuple[int, int]:
    """Return the columns that any row sees, as ends."""
    sees = first < stop
    return (int(first[sees].min()), int(stop[sees].max())) if sees.any() else (0, 0)


def _score(some: Tensor, scores: Scores, nearest: Tensor, columns: Tensor) -> None:
    """Make scores of products ``[kv_heads, group, q, k]``, in place.

    ``nearest [tiles, q]``: the column of the tile from which a row's distances are counted.
    """
    if scores.soft_cap is None:
        some.mul_(scores.scale)
    else:  # tanh(x) by exp(2 x) - 1: as exact, and twice as fast
        some.mul_(2 * scores.scale / scores.soft_cap).clamp_(max=_MOST_EXPONENT).expm1_()
        some.div_(some + 2.0).mul_(scores.soft_cap)
    if scores.slopes is not None:
        if bool((nearest == nearest[:, :1]).all()):
            nearest = nearest[:, :1]  # all rows are on one side of the tile
        distance = (nearest.to(some.dtype).unsqueeze(2) - columns.to(some.dtype)).abs()
        slopes = -scores.slopes.to(some.dtype)
        tiles = some.view(len(nearest), -1, *some.shape[2:])
        tiles.addcmul_(distance.unsqueeze(1), slopes.view(len(nearest), -1, 1, 1))


def _sum_up(sums: tuple[Tensor, Tensor, Tensor], some: Tensor, values: Tensor) -> None:
    """Add a block of scores ``[kv_heads, group q, k]`` and its values to the sums of their rows, in place."""
    out, total, highest = sums
    scores = some.view(*total.shape, -1)
    top = torch.maximum(highest, scores.amax(2))
    shift = top.masked_fill(top.isneginf(), 0.0)  # -inf - -inf where no key is seen
    scores.sub_(shift.unsqueeze(2)).mul_(_BITS).exp2_()  # as exact as exp, and faster
    keep = torch.exp(highest - shift)
    total.mul_(keep).add_(scores.sum(2))
    out.mul_(keep.unsqueeze(2)).add_((some @ values).view(out.shape))
    highest.copy_(top)
