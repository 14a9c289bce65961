"""torch's flash attention for CPU, by the aten operator that returns the log-sum-exp.

16-bit and 8-bit tiles are computed in float32: as fast there, and each tile would otherwise be rounded to 16 bits
before merging. A causal square is the operator's own; other edges are added to the scores, for low tiles only.
"""

from functools import lru_cache

import torch
from torch import Tensor

from cqsa_stream.kernels.contract import Abilities, Attended, Keys, Queries, Scores, Values
from cqsa_stream.kernels.mending import mend
from cqsa_stream.kernels.online import OnlineKernel
from cqsa_stream.kernels.seeing import PACKING_BYTES, PACKING_NUMBERS, Seen, by_tiles, hidden_by, ranges
from cqsa_stream.schedulers.masks.arrays import Bands64
from cqsa_stream.schedulers.masks.calls import Tile

__all__ = ["TorchCpuKernel"]

_EXACT = OnlineKernel(rows=128)  # its log-sum-exp is as fine as its scores; few rows, since its memory is not planned
_MOST_LSE = 128.0  # its last bit is 2^-17: half of it changes a weight by 4e-6


class TorchCpuKernel:
    """float32 tiles on the CPU, and float64 ones of float64 arrays."""

    abilities = Abilities(
        dtypes=(torch.float32, torch.float64),
        block_rows=((1 << 20, 256),),  # of calls of 768 rows and more
        tile=Tile(16_384, 16_384, 1_024, 192, bands=True, small=512),
        whole_dims=1,
        packing_bytes=PACKING_BYTES,
        packing_numbers=PACKING_NUMBERS,
    )

    def attend(
        self, q: Queries, k: Keys, v: Values, left: int | None, right: int | None, scores: Scores, ahead: int = 0
    ) -> Attended:
        if k.shape[1] == 0:
            return q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -torch.inf)
        (_, rows, _), columns = q.shape, k.shape[1]
        causal = (left, right) == (None, 0) and rows == columns
        added = None if causal else _added(rows, columns, left, right, q.dtype)
        out, lse = self._operator(q, k, v, added, scores.scale, causal=causal)
        fine, good = _looked_at(out, lse)
        if not fine:
            del out, lse  # they take what the exact ones will
            return _EXACT.attend(q, k, v, left, right, scores, ahead)
        if not good:
            seen = *ranges(rows, columns, left, right, q.device), torch.tensor([ahead])
            mend(out, lse, _odd(out, lse), q, k, v, seen, scores)
        return out, lse

    def attend_packed(self, q: Queries, k: Keys, v: Values, bands: Bands64, scores: Scores, ahead: int = 0) -> Attended:
        def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Attended:
            hidden = hidden_by(seen.first, seen.stop, torch.arange(k.shape[1]))
            added = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
            query, key, value = (x.view(len(added), -1, *x.shape[1:]) for x in (q, k, v))
            found = self._operator(query, key, value, added[:, None], scores.scale, causal=False)
            if not _looked_at(*found)[0]:
                del found
                return _EXACT.attend_seen(q, k, v, seen, scores)
            blind = (seen.first >= seen.stop).repeat_interleave(len(q) // len(added), 0)
            out = found[0].flatten(0, 1).masked_fill(blind.unsqueeze(2), 0.0)
            lse = found[1].flatten(0, 1).masked_fill(blind, -torch.inf)
            mend(out, lse, _odd(out, lse), q, k, v, seen, scores)
            return out, lse

        return by_tiles(q, k, v, bands, ahead, attend)

    def _operator(
        self, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the operator on ``[heads, ...]``, or on several batches of these."""
        batched = q.dim() == 4
        attend, value_dim = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, v.shape[-1]
        q, k, v = self.abilities.padded(*((x if batched else x[None]) for x in (q, k, v)))
        out, lse = attend(q, k, v, 0.0, causal, attn_mask=added, scale=scale)
        out = out[..., :value_dim]
        return (out, lse) if batched else (out[0], lse[0])


@lru_cache(4)  # at the ends of a row chunk others come in between
def _added(rows: int, columns: int, left: int | None, right: int | None, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to the scores: -inf where a row does not see a column. None where all see all."""
    if left is None and right is None:
        return None
    hidden = hidden_by(*ranges(rows, columns, left, right, torch.device("cpu")), torch.arange(columns))
    return torch.zeros(1, 1, rows, columns, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _looked_at(out: Tensor, lse: Tensor) -> tuple[bool, bool]:
    """Return whether float32 is fine enough for each log-sum-exp, by which tiles are weighed when they merge; and
    whether no row can be wrong. Both at a glance: they are as a rule.
    """
    low, high = (float(end) for end in lse.aminmax())
    fine = lse.dtype != torch.float32 or -_MOST_LSE <= low <= high <= _MOST_LSE
    fine = fine or not bool(((lse.abs() > _MOST_LSE) & lse.isfinite()).any())
    return fine, not low <= 0.0 <= high and bool(out.sum().isfinite())


def _odd(out: Tensor, lse: Tensor) -> Tensor:
    """Return the rows that the operator may have got wrong.

    It gives lse 0 to a row all of whose scores are -inf, and a lse can be 0; and see ``mending``.
    """
    return (lse == 0) | ~out.sum(2).isfinite()
