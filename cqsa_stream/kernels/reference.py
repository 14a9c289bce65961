"""The formula, written out: in float64 the yardstick of tests, in float32 the GPU's exact path."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cqsa_stream.schedulers.masks.bands import TileMask
from cqsa_stream.schedulers.model.memory import Tile

__all__ = ["PlainKernel", "formula"]


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
        unseen = None
        if mask == "causal":
            unseen = torch.arange(q.shape[1], device=q.device)[:, None] < torch.arange(k.shape[1], device=q.device)
        return formula(q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), unseen, scale)


def formula(
    q: Float[Tensor, "heads q d"],
    k: Float[Tensor, "kv_heads k d"],
    v: Float[Tensor, "kv_heads k dv"],
    unseen: Bool[Tensor, "q k"] | None,
    scale: float,
) -> tuple[Float[Tensor, "heads q dv"], Float[Tensor, "heads q"]]:
    """Return (out, lse in float64) of one tile; ``unseen`` keys, and such of no weight, change nothing."""
    if k.shape[1] == 0:
        return q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float64)
    grouped = q.reshape(k.shape[0], -1, q.shape[2])  # the rows of all query heads of one K/V head
    scores = (grouped @ k.transpose(1, 2)).mul_(scale)
    if unseen is not None:
        scores.masked_fill_(unseen.repeat(q.shape[0] // k.shape[0], 1), -torch.inf)
    highest = scores.amax(2, keepdim=True)
    weights = scores.sub_(highest.masked_fill(highest.isneginf(), 0.0)).exp_()  # -inf - -inf where no key is seen
    total = weights.sum(2, keepdim=True)
    out = _weighted(weights.div_(total.masked_fill(total == 0, 1.0)), v)  # divided before, no sum can overflow
    lse = highest.double() + total.double().log()  # float64: float32 would round large scores before they merge
    return out.reshape(q.shape[0], q.shape[1], -1), lse.reshape(q.shape[:2])


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Return ``weights @ values``, in which a weight of 0 times inf or NaN is 0."""
    finite = values.isfinite()
    if finite.all():
        return weights @ values
    found = weights @ values.masked_fill(~finite, 0.0)
    counts = (weights > 0).to(weights.dtype)
    for number in (torch.inf, -torch.inf):
        met = counts @ (values == number).to(weights.dtype) > 0
        found = found + torch.where(met, number, 0.0).to(found.dtype)
    return found.masked_fill_(counts @ values.isnan().to(weights.dtype) > 0, torch.nan)
