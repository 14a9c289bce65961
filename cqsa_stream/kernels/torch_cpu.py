"""torch's flash attention for CPU, by the aten operator that returns the log-sum-exp.

16-bit and 8-bit tiles are computed in float32: as fast there, and each tile would otherwise be rounded to 16 bits
before merging.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from cqsa_stream.kernels.fold import fold
from cqsa_stream.kernels.reference import formula
from cqsa_stream.schedulers.masks.bands import TileMask
from cqsa_stream.schedulers.model.memory import Tile

__all__ = ["TorchCpuKernel"]

_ROWS, _KEYS = 256, 1_024  # of the formula at a time: their scores are written out


class TorchCpuKernel:
    """float32 tiles on the CPU, and float64 ones of float64 arrays."""

    name = "torch-cpu"
    tile = Tile(16_384, 16_384, 1_024)
    score_bytes = score_columns = 0
    at_a_time = 1
    workspace_bytes = 0

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        return torch.float64 if stored == torch.float64 else torch.float32

    def attend(
        self,
        q: Float[Tensor, "heads q d"],
        k: Float[Tensor, "kv_heads k d"],
        v: Float[Tensor, "kv_heads k dv"],
        mask: TileMask,
        scale: float,
    ) -> tuple[Float[Tensor, "heads q dv"], Float[Tensor, "heads q"]]:
        if k.shape[1] == 0:
            return q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -torch.inf)
        width, value_dim = max(q.shape[2], v.shape[2]), v.shape[2]  # the operator refuses dv != d: pad with zeros
        q, k, v = (x if x.shape[2] == width else pad(x, (0, width - x.shape[2])) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, mask == "causal", scale=scale
        )
        found = out[0, :, :, :value_dim], lse[0]
        _mend(*found, q, k, v[:, :, :value_dim], mask, scale)
        return found


def _mend(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float) -> None:
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
                unseen = rows[:, None] < torch.arange(part.start, part.stop) if mask == "causal" else None
                tile = formula(q[head, None, rows], keys[:, part], values[:, part], unseen, scale)
                fold(found, found_lse, *tile)
            out[head, rows], lse[head, rows] = found[0], found_lse[0].to(lse.dtype)
