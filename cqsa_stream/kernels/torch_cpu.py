"""torch's flash attention for CPU, by the aten operator that returns the log-sum-exp.

16-bit and 8-bit tiles are computed in float32: as fast there, and each tile would otherwise be rounded to 16 bits
before merging.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from cqsa_stream.schedulers.masks import TileMask
from cqsa_stream.schedulers.memory import Tile

__all__ = ["TorchCpuKernel"]


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
        return out[0, :, :, :value_dim], lse[0]
