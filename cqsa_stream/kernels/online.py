"""Our own tile kernel: an online softmax over blocks of scores by plain products, with a soft cap and ALiBi.

A slope's part is counted from the distance of the nearest key that the row sees, which the log-sum-exp takes back: far
tiles are as exact as near ones. The bits do not depend on how many threads compute: each row's sums are of blocks whose
size is fixed.
"""

from collections.abc import Sequence
from itertools import product
from math import e, log2, prod

import torch
from torch import Tensor

from cqsa_stream.kernels.contract import Abilities, Attended, Keys, Queries, Scores, Values
from cqsa_stream.kernels.mending import mend
from cqsa_stream.kernels.seeing import PACKING_BYTES, PACKING_NUMBERS, Seen, by_tiles, hidden_by, ranges
from cqsa_stream.schedulers.masks.arrays import Bands64
from cqsa_stream.schedulers.masks.calls import Tile

__all__ = ["OnlineKernel"]

_ROWS, _KEYS = 1_024, 1_024  # of scores at a time: they stay in a processor's cache
_OF_A_HEAD = 512  # rows: more would compute more of what a triangle hides
_BITS = log2(e)
_MOST_EXPONENT = 40.0  # of exp(2 x), beyond which tanh(x) is 1


class OnlineKernel:
    """Tiles of float32, and of float64, on any device."""

    def __init__(self, rows: int = _ROWS, *, tall: bool = False) -> None:
        """``rows``: whose scores are held at a time; ``tall``: those of a whole call, as a GPU likes it."""
        self._rows = 1 << 48 if tall else rows
        self._of_a_head = self._rows if tall else min(rows, _OF_A_HEAD)
        edge = 1_024 if tall else 128
        self.abilities = Abilities(
            dtypes=(torch.float32,) if tall else (torch.float32, torch.float64),
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
        return self._attend(q, k, v, seen, scores, whole=left is right is None)

    def attend_packed(self, q: Queries, k: Keys, v: Values, bands: Bands64, scores: Scores, ahead: int = 0) -> Attended:
        def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Attended:
            return self.attend_seen(q, k, v, seen, scores)

        return by_tiles(q, k, v, bands, ahead, attend)

    def attend_seen(self, q: Queries, k: Keys, v: Values, seen: Seen, scores: Scores) -> Attended:
        """Return (out, lse) of tiles, which come as so many times the heads; each row sees a range."""
        return self._attend(q, k, v, seen, scores.of_tiles(len(seen.ahead)), whole=False)

    def _attend(self, q: Queries, k: Keys, v: Values, seen: Seen, scores: Scores, *, whole: bool) -> Attended:
        """``whole``: all rows see all columns."""
        (heads, rows, _), (kv_heads, columns, _) = q.shape, k.shape
        group, together = heads // kv_heads, kv_heads // len(seen.ahead)
        nearest = _own(seen, rows).clamp(seen.first, seen.stop - 1)
        first, stop, near = (x.repeat_interleave(together, 0) for x in (seen.first, seen.stop, nearest))
        slopes = None if scores.slopes is None else scores.slopes.to(q.dtype).view(kv_heads, group)
        grouped = q.reshape(kv_heads, group, rows, q.shape[2])
        out, total = q.new_zeros(*grouped.shape[:3], v.shape[2]), q.new_zeros(grouped.shape[:3])
        highest = torch.full_like(total, -torch.inf)
        at_a_time = min(rows, self._of_a_head)
        some_heads = min(kv_heads, max(1, self._rows // (group * at_a_time)))
        numbers = some_heads * group * at_a_time * min(columns, _KEYS)
        room = q.new_empty(1 if scores.soft_cap is None else 2, numbers)  # the same memory again stays in the cache
        for head, row in product(range(0, kv_heads, some_heads), range(0, rows, at_a_time)):
            of, part = slice(head, head + some_heads), slice(row, row + at_a_time)
            query, sums = grouped[of, :, part], [x[of, :, part] for x in (out, total, highest)]
            begin, end = (0, columns) if whole else _extent(first[of, part], stop[of, part])
            for start in range(begin // _KEYS * _KEYS, end, _KEYS):
                place = torch.arange(start, min(start + _KEYS, columns), device=q.device)
                key, value = (x[of, start : start + len(place)] for x in (k, v))
                some = _scored(query, key, room, scores)
                if slopes is not None:
                    _slope(some, slopes[of], near[of, part], place)
                if not whole:
                    some.masked_fill_(hidden_by(first[of, part], stop[of, part], place).unsqueeze(1), -torch.inf)
                _sum_up(sums, some, value)
        out, total, highest = (x.flatten(0, 1) for x in (out, total, highest))
        blind = total == 0
        out.div_(total.masked_fill(blind, 1.0).unsqueeze(2))
        lse = highest.double() + total.double().log()
        if scores.slopes is not None:  # what was left out of all distances
            distance = (_own(seen, rows) - nearest).abs().repeat_interleave(together * group, 0)
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


def _scored(query: Tensor, key: Tensor, room: Tensor, scores: Scores) -> Tensor:
    """Return the scores ``[kv_heads, group, q, k]`` but for slopes, in the first of the rooms; a soft cap takes two."""
    shape = *query.shape[:3], key.shape[1]
    some: Tensor
    some, *spare = (it[: prod(shape)].view(shape) for it in room)
    torch.matmul(query.flatten(1, 2), key.transpose(1, 2), out=some.view(len(key), -1, key.shape[1]))
    if scores.soft_cap is None:
        some.mul_(scores.scale)
    else:  # tanh(x) by exp(2 x) - 1: as exact, and twice as fast
        some.mul_(2 * scores.scale / scores.soft_cap).clamp_(max=_MOST_EXPONENT).expm1_()
        some.div_(torch.add(some, 2.0, out=spare[0])).mul_(scores.soft_cap)
    return some


def _slope(some: Tensor, slopes: Tensor, nearest: Tensor, columns: Tensor) -> None:
    """Take from scores ``[kv_heads, group, q, k]`` what grows with the distance from ``nearest [kv_heads, q]``."""
    if bool((nearest == nearest[:, :1]).all()):
        nearest = nearest[:, :1]  # all rows are on one side of the tile
    distance = (nearest.to(some.dtype).unsqueeze(2) - columns.to(some.dtype)).abs()
    some.addcmul_(distance.unsqueeze(1), -slopes[:, :, None, None])


def _sum_up(sums: Sequence[Tensor], some: Tensor, values: Tensor) -> None:
    """Add a block of scores ``[kv_heads, group, q, k]`` and its values to the sums of their rows, in place."""
    out, total, highest = sums
    top = torch.maximum(highest, some.amax(3))
    shift = top.masked_fill(top.isneginf(), 0.0)  # -inf - -inf where no key is seen
    some.sub_(shift.unsqueeze(3)).mul_(_BITS).exp2_()  # as exact as exp, and faster
    keep = torch.exp(highest - shift)
    total.mul_(keep).add_(some.sum(3))
    out.mul_(keep.unsqueeze(3)).add_((some.flatten(1, 2) @ values).view(out.shape))
    highest.copy_(top)
