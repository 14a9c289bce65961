"""The partial: exact attention of some queries over a part of the keys, and the algebra of merging.

``out`` is normalised, float32 (float64 of float64 inputs); ``lse`` is the natural log-sum-exp of the scores, float64.
Partials over disjoint keys merge into the partial of the union: associative and commutative to rounding, the identity
being ``lse = -inf``. Only differences of lse are exponentiated: ``exp(lse)`` itself overflows past 88.7. The weights
are float64, since float32 ones drift to several times the error of one kernel call where scores are large.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["fold"]

_NUMBERS_AT_A_TIME = 1 << 22  # of a merge in steps, which holds a few times as many beside them


def fold(
    out: Float[Tensor, "heads q dv"],
    lse: Float[Tensor, "heads q"],
    tile_out: Float[Tensor, "heads q dv"],
    tile_lse: Float[Tensor, "heads q"],
) -> None:
    """Merge a kernel's tile into the accumulator ``out`` (no narrower than the tile), ``lse`` (float64), in place.

    A side that saw no key (``lse = -inf``), or none that counts beside the other's, changes nothing, whatever its
    numbers are. Infinite numbers and numbers near the largest come out as in one sum over all keys; NaN stays NaN.
    """
    added_lse = tile_lse.double()
    if not out.is_cuda and bool(lse.isneginf().all()) and bool(added_lse.isfinite().all()):
        out.copy_(tile_out)  # the first tile of its rows
        lse.copy_(added_lse)
        return
    total = torch.logaddexp(lse, added_lse)
    kept, weight = (_share(side, total).to(out.dtype).unsqueeze(-1) for side in (lse, added_lse))
    if not out.is_cuda and _ordinary(out) and _ordinary(tile_out):  # on CUDA it would cost a wait to know
        out.lerp_(tile_out.to(out.dtype), weight)
    else:
        step = max(1, _NUMBERS_AT_A_TIME // max(1, out.shape[0] * out.shape[2]))
        for start in range(0, out.shape[1], step):
            rows = slice(start, start + step)
            _merge_any(out[:, rows], kept[:, rows], tile_out[:, rows], weight[:, rows])
    lse.copy_(total)


def _merge_any(out: Tensor, kept: Tensor, added: Tensor, weight: Tensor) -> None:
    """Merge numbers of any kind: ``a + w (b - a)`` is the most exact, but NaN where a or b is inf or ``b - a`` is."""
    added = added.to(out.dtype)
    merged = torch.lerp(out, added, weight)
    terms = (torch.where(share == 0, 0.0, share * side) for share, side in ((kept, out), (weight, added)))
    out.copy_(torch.where(merged.isfinite(), merged, sum(terms)))


def _ordinary(values: Tensor) -> bool:
    """Return whether no difference of these numbers can overflow, and none is inf or NaN."""
    low, high = torch.aminmax(values)
    most = torch.finfo(values.dtype).max / 4
    return bool(-most < low) and bool(high < most)


def _share(part: Tensor, total: Tensor) -> Tensor:
    """Return the weight of one side of a merge, 0 where it saw no key: -inf - -inf would be NaN."""
    return torch.where(part.isneginf(), 0.0, torch.exp(part - total))
