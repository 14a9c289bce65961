"""torch's flash attention on CUDA, by the aten operator that returns the log-sum-exp; for float16 and bfloat16, and for
float8 arrays upcast to float16, which holds each of their numbers.

The operator wants head dims that are equal and multiples of 8: others are padded with zeros, which changes no score.
(The memory-efficient operator is never used: its log-sum-exp and long sequences are wrong, pytorch#162588.)
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from cqsa_stream.schedulers.masks import TileMask

__all__ = ["TorchCudaKernel"]


class TorchCudaKernel:
    """16-bit tiles on a CUDA device; each tile's output is rounded to 16 bits by the kernel."""

    name = "torch-cuda"

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        return torch.float16 if stored.itemsize == 1 else stored

    def attend(
        self,
        q: Float[Tensor, "heads q d"],
        k: Float[Tensor, "kv_heads k d"],
        v: Float[Tensor, "kv_heads k dv"],
        mask: TileMask,
        scale: float,
    ) -> tuple[Float[Tensor, "heads q dv"], Float[Tensor, "heads q"]]:
        if k.shape[1] == 0:
            empty = q.new_zeros(*q.shape[:2], v.shape[2], dtype=torch.float32)
            return empty, empty.new_full(q.shape[:2], -torch.inf)
        value_dim = v.shape[2]
        width = -(-max(q.shape[2], value_dim) // 8) * 8
        q, k, v = (x if x.shape[2] == width else pad(x, (0, width - x.shape[2])) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q[None], k[None], v[None], 0.0, mask == "causal", False, scale=scale
        )
        return out[0, :, :, :value_dim].float(), lse[0, :, : q.shape[1]]
