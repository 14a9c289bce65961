"""Mending: rows that a fast kernel got wrong are computed anew by the formula; as a rule there are none.

Values that are inf or NaN are multiplied by the weight 0 of a key that the row does not see, or that counts nothing.
"""

import torch
from torch import Tensor

from cqsa_stream.kernels.contract import Scores
from cqsa_stream.kernels.fold import fold
from cqsa_stream.kernels.reference import formula, scored
from cqsa_stream.kernels.seeing import hidden_by

__all__ = ["mend"]

_ROWS, _KEYS = 256, 1_024  # at a time: their scores are written out


def mend(
    out: Tensor,
    lse: Tensor,
    odd: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: tuple[Tensor, Tensor, Tensor],
    scores: Scores,
) -> None:
    """Compute the ``odd [heads, q]`` rows of tiles anew, in place; ``seen``: first, stop and ahead of each tile."""
    if not odd.any():
        return
    first, stop, ahead = seen
    group, of_tile = q.shape[0] // k.shape[0], q.shape[0] // len(first)
    for head in odd.any(1).nonzero()[:, 0].tolist():
        tile, slopes = head // of_tile, scores.slopes if scores.slopes is None else scores.slopes[head, None]
        own = Scores(scores.scale, scores.soft_cap, slopes)
        for rows in torch.split(odd[head].nonzero()[:, 0], _ROWS):
            found = v.new_zeros(1, len(rows), v.shape[2])
            found_lse = v.new_full((1, len(rows)), -torch.inf, dtype=torch.float64)
            for start in range(0, k.shape[1], _KEYS):
                columns = torch.arange(start, min(start + _KEYS, k.shape[1]), device=q.device)
                hidden = hidden_by(first[tile, None, rows], stop[tile, None, rows], columns)[0]
                some = scored(q[head, None, rows], k[head // group, None, columns], own, rows, columns + ahead[tile])
                fold(found, found_lse, *formula(some, v[head // group, None, columns], hidden))
            out[head, rows], lse[head, rows] = found[0].to(out.dtype), found_lse[0].to(lse.dtype)
