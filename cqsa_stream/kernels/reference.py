"""The formula, written out: in float64 the yardstick of tests, in float32 the GPU's exact path."""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from cqsa_stream.kernels.contract import Abilities, Attended, Keys, Queries, Values
from cqsa_stream.schedulers.masks.calls import Tile

__all__ = ["PlainKernel", "formula", "unseen"]


class PlainKernel:
    """softmax(q k^T scale) v by plain matrix products in one dtype, without tf32."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.abilities = Abilities(
            dtypes=(dtype,),
            tile=Tile(2_048, 2_048, 2_048, 1_024, bands=True),  # its scores are written out
            score_bytes=12,
            score_columns=2_048,
            workspace_bytes=64 << 20,  # cuBLAS: 32 MiB on Hopper; and what tensors of its formula are rounded up by
        )

    def attend(self, q: Queries, k: Keys, v: Values, left: int | None, right: int | None, scale: float) -> Attended:
        rows, columns = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
        hidden = unseen(rows, columns, left, right)
        return formula(q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), hidden, scale)


def unseen(
    rows: Int64[Tensor, " q"], columns: Int64[Tensor, " k"], left: int | None, right: int | None
) -> Bool[Tensor, "q k"] | None:
    """Return which columns each row does not see; None where every row sees all."""
    if left is None and right is None:
        return None
    ahead = columns - rows[:, None]
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if left is not None:
        hidden |= ahead < -left
    if right is not None:
        hidden |= ahead > right
    return hidden


def formula(q: Queries, k: Keys, v: Values, hidden: Bool[Tensor, "q k"] | None, scale: float) -> Attended:
    """Return (out, lse in float64) of one tile; ``hidden`` keys, and such of no weight, change nothing."""
    if k.shape[1] == 0:
        return q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float64)
    grouped = q.reshape(k.shape[0], -1, q.shape[2])  # the rows of all query heads of one K/V head
    scores = (grouped @ k.transpose(1, 2)).mul_(scale)
    if hidden is not None:
        scores.masked_fill_(hidden.repeat(q.shape[0] // k.shape[0], 1), -torch.inf)
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
