"""torch's flash attention for CPU, by the aten operator that returns the log-sum-exp.

16-bit and 8-bit tiles are computed in float32: as fast there, and each tile would otherwise be rounded to 16 bits
before merging. A causal square is the operator's own; other edges are added to the scores, for low tiles only.
"""

from functools import lru_cache

import torch
from torch import Tensor

from cqsa_stream.kernels.contract import Abilities, Attended, Keys, Queries, Values
from cqsa_stream.kernels.fold import fold
from cqsa_stream.kernels.reference import formula, unseen
from cqsa_stream.schedulers.masks.calls import Tile

__all__ = ["TorchCpuKernel"]

_ROWS, _KEYS = 256, 1_024  # of the formula at a time: their scores are written out


class TorchCpuKernel:
    """float32 tiles on the CPU, and float64 ones of float64 arrays."""

    abilities = Abilities(
        dtypes=(torch.float32, torch.float64), tile=Tile(16_384, 16_384, 1_024, 128, bands=True), whole_dims=1
    )

    def attend(self, q: Queries, k: Keys, v: Values, left: int | None, right: int | None, scale: float) -> Attended:
        if k.shape[1] == 0:
            return q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -torch.inf)
        value_dim = v.shape[2]
        q, k, v = self.abilities.padded(q, k, v)
        causal = (left, right) == (None, 0) and q.shape[1] == k.shape[1]
        hidden = None if causal else _added(q.shape[1], k.shape[1], left, right, q.dtype)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = (x[0] for x in attend(q[None], k[None], v[None], 0.0, causal, attn_mask=hidden, scale=scale))
        out = out[:, :, :value_dim]
        _mend(out, lse, q, k, v[:, :, :value_dim], left, right, scale)
        return out, lse


@lru_cache(1)
def _added(rows: int, columns: int, left: int | None, right: int | None, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to the scores: -inf where a row does not see a column. None where all see all."""
    hidden = unseen(torch.arange(rows), torch.arange(columns), left, right)
    return None if hidden is None else torch.zeros(1, 1, rows, columns, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _mend(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, scale: float
) -> None:
    """Compute those rows anew, by the formula, that the operator may have got wrong; as a rule there are none.

    It gives lse 0 to a row all of whose scores are -inf, and a lse can be 0; and it multiplies values that are inf or
    NaN by the weight 0 of a key that the row does not see.
    """
    odd = (lse == 0) | ~out.sum(2).isfinite()
    if not odd.any():
        return
    group = q.shape[0] // k.shape[0]
    for head in range(q.shape[0]):
        keys, values = (x[head // group, None] for x in (k, v))
        for rows in torch.split(odd[head].nonzero()[:, 0], _ROWS):
            found = v.new_zeros(1, len(rows), v.shape[2])
            found_lse = v.new_full((1, len(rows)), -torch.inf, dtype=torch.float64)
            for first in range(0, k.shape[1], _KEYS):
                part = slice(first, min(first + _KEYS, k.shape[1]))
                hidden = unseen(rows, torch.arange(part.start, part.stop), left, right)
                tile = formula(q[head, None, rows], keys[:, part], values[:, part], hidden, scale)
                fold(found, found_lse, *tile)
            out[head, rows], lse[head, rows] = found[0], found_lse[0].to(lse.dtype)
