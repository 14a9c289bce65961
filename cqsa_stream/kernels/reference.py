"""The formula, written out: in float64 the yardstick of tests, in float32 the GPU's exact path."""

import torch
from jaxtyping import Float
from torch import Tensor

from cqsa_stream.schedulers.masks import TileMask
from cqsa_stream.schedulers.memory import Tile

__all__ = ["PlainKernel"]


class PlainKernel:
    """softmax(q k^T scale) v by plain matrix products in one dtype, without tf32."""

    tile = Tile(2_048, 2_048, 2_048)  # its scores are written out
    score_bytes = 12
    score_columns = 2_048
    at_a_time = 1
    workspace_bytes = 64 << 20  # cuBLAS: 32 MiB on Hopper; and what tensors of its formula are rounded up by

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.name = f"plain-{str(dtype).removeprefix('torch.')}"

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        return self.dtype

    def attend(
        self,
        q: Float[Tensor, "heads q d"],
        k: Float[Tensor, "kv_heads k d"],
        v: Float[Tensor, "kv_heads k dv"],
        mask: TileMask,
        scale: float,
    ) -> tuple[Float[Tensor, "heads q dv"], Float[Tensor, "heads q"]]:
        q, k, v = q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
        if k.shape[1] == 0:
            return q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -torch.inf)
        grouped = q.reshape(k.shape[0], -1, q.shape[2])  # the rows of all query heads of one K/V head
        scores = (grouped * scale) @ k.transpose(1, 2)
        if mask == "causal":
            rows = torch.arange(q.shape[1], device=q.device).repeat(q.shape[0] // k.shape[0])
            unseen = rows[:, None] < torch.arange(k.shape[1], device=q.device)
            scores.masked_fill_(unseen, -torch.inf)
        highest = scores.amax(2, keepdim=True).clamp_min(torch.finfo(self.dtype).min)  # finite where no key is seen
        weights = scores.sub_(highest).exp_()
        total = weights.sum(2, keepdim=True)
        out = (weights @ v) / total.clamp_min(1.0)  # the largest term is 1, but where no key is seen
        lse = highest.double() + total.double().log()  # float64: float32 would round large scores before they merge
        return out.reshape(q.shape[0], q.shape[1], -1), lse.reshape(q.shape[:2])
