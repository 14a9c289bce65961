"""The formula, written out: in float64 the yardstick of tests, and what mends the rows that a kernel spoils."""

import torch
from jaxtyping import Bool
from torch import Tensor

from cqsa_stream.kernels.contract import Abilities, Attended, Keys, Queries, Scores, Values
from cqsa_stream.kernels.seeing import hidden_by, ranges
from cqsa_stream.schedulers.masks.arrays import Bands64, band_at
from cqsa_stream.schedulers.masks.calls import Tile

__all__ = ["PlainKernel", "formula", "scored"]


class PlainKernel:
    """Softmax of the scores, times v, by plain matrix products in one dtype."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.abilities = Abilities(
            dtypes=(dtype,),
            tile=Tile(2_048, 2_048, 2_048, 1_024, bands=True, small=1_024),  # its scores are written out
            terms=frozenset({"soft_cap", "alibi"}),
            score_bytes=12,
            score_columns=2_048,
        )

    def attend(
        self, q: Queries, k: Keys, v: Values, left: int | None, right: int | None, scores: Scores, ahead: int = 0
    ) -> Attended:
        rows, columns = q.shape[1], k.shape[1]
        hidden = None
        if left is not None or right is not None:
            hidden = hidden_by(*ranges(rows, columns, left, right, q.device), torch.arange(columns, device=q.device))[0]
        return self._formula(q, k, v, hidden, scores, ahead)

    def attend_packed(self, q: Queries, k: Keys, v: Values, bands: Bands64, scores: Scores, ahead: int = 0) -> Attended:
        row, column = torch.arange(q.shape[1], device=q.device)[:, None], torch.arange(k.shape[1], device=q.device)
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        for r0, r1, c0, c1, lo, hi in (band_at(bands, index) for index in range(bands.shape[1])):
            seen = (row >= r0) & (row < r1) & (column >= c0) & (column < c1)
            seen &= (column - row >= lo) if lo is not None else True
            seen &= (column - row <= hi) if hi is not None else True
            hidden &= ~seen
        return self._formula(q, k, v, hidden, scores, ahead)

    def _formula(
        self, q: Queries, k: Keys, v: Values, hidden: Bool[Tensor, "q k"] | None, scores: Scores, ahead: int
    ) -> Attended:
        rows, columns = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
        q, k, v = (x.to(self.dtype) for x in (q, k, v))
        return formula(scored(q, k, scores, rows, columns + ahead), v, hidden)


def scored(q: Queries, k: Keys, scores: Scores, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the scores ``[heads, q, k]`` of rows and columns at these positions."""
    grouped = q.reshape(k.shape[0], -1, q.shape[2])  # the rows of all query heads of one K/V head
    found = (grouped @ k.transpose(1, 2)).mul_(scores.scale).reshape(q.shape[0], q.shape[1], k.shape[1])
    if scores.soft_cap is not None:
        found = found.div_(scores.soft_cap).tanh_().mul_(scores.soft_cap)
    if scores.slopes is not None:
        distance = (rows[:, None] - columns).abs().to(found.dtype)
        found -= scores.slopes.to(found.dtype)[:, None, None] * distance
    return found


def formula(scores: Tensor, v: Values, hidden: Bool[Tensor, "q k"] | None) -> Attended:
    """Return (out, lse in float64) of one tile; ``hidden`` keys, and such of no weight, change nothing."""
    heads, rows, columns = scores.shape
    if columns == 0:
        return scores.new_zeros(heads, rows, v.shape[2]), scores.new_full((heads, rows), -torch.inf).double()
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    highest = scores.amax(2, keepdim=True)
    weights = scores.sub(highest.masked_fill(highest.isneginf(), 0.0)).exp_()  # -inf - -inf where no key is seen
    total = weights.sum(2, keepdim=True)
    weights = weights.div_(total.masked_fill(total == 0, 1.0))  # divided before, no sum can overflow
    out = _weighted(weights.reshape(v.shape[0], -1, columns), v)
    lse = highest.double() + total.double().log()  # float64: float32 would round large scores before they merge
    return out.reshape(heads, rows, -1), lse.reshape(heads, rows)


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
