"""The partial: exact attention of some queries over a part of the keys, and the algebra of merging.

``out`` is normalised, float32 (float64 of float64 inputs); ``lse`` is the natural log-sum-exp of the scores, float64.
Partials over disjoint keys merge into the partial of the union: associative and commutative to rounding, the identity
being ``lse = -inf``. Only differences of lse are exponentiated: ``exp(lse)`` itself overflows past 88.7. The weights
are float64, since float32 ones drift to several times the error of one kernel call where scores are large.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Partial", "fold", "merge"]


@dataclass
class Partial:
    """Attention of one row chunk over the column chunks in ``cover`` (bit b for column chunk b)."""

    out: Float[Tensor, "heads q dv"]
    lse: Float[Tensor, "heads q"]
    cover: int = 0

    @classmethod
    def empty(cls, heads: int, rows: int, value_dim: int, device: torch.device) -> "Partial":
        """Return the identity of merging."""
        return cls(
            torch.zeros(heads, rows, value_dim, dtype=torch.float32, device=device),
            torch.full((heads, rows), -torch.inf, dtype=torch.float64, device=device),
        )


def fold(
    out: Float[Tensor, "heads q dv"],
    lse: Float[Tensor, "heads q"],
    tile_out: Float[Tensor, "heads q dv"],
    tile_lse: Float[Tensor, "heads q"],
) -> None:
    """Merge a kernel's tile into the accumulator ``out`` (no narrower than the tile), ``lse`` (float64), in place."""
    tile_lse = tile_lse.double()
    total = torch.logaddexp(lse, tile_lse)
    weight = torch.exp(tile_lse - total).nan_to_num_(nan=0.0)  # -inf - -inf: neither side saw a key
    out.lerp_(tile_out.to(out.dtype), weight.to(out.dtype).unsqueeze(-1))
    lse.copy_(total)


def merge(a: Partial, b: Partial) -> Partial:
    """Return the partial of the union. Raises ValueError where the covers overlap: a pair would count twice."""
    if a.cover & b.cover:
        raise ValueError(f"covers {a.cover:#x} and {b.cover:#x} share column chunks; expected disjoint covers")
    merged = Partial(a.out.clone(), a.lse.clone(), a.cover | b.cover)
    fold(merged.out, merged.lse, b.out, b.lse)
    return merged
