"""The contract of kernels: exact attention of one tile on one device, with the log-sum-exp that merging needs.

``attend(q, k, v, left, right, scale) -> (out, lse)``, tested for every back end by one suite:

- ``q [heads, rows, d]``, ``k [kv_heads, columns, d]``, ``v [kv_heads, columns, dv]``, the heads a multiple of kv_heads;
  keys and values may be views whose heads overlap;
- row i of the tile sees column j where ``-left <= j - i <= right`` (both at least 0; None: unbounded), so the top left
  corner is on the diagonal;
- ``out [heads, rows, dv]`` float32 (float64 from the reference, 16 bits from the vendor's CUDA kernels), normalised;
  ``lse [heads, rows]``, natural logarithm, float32 or float64;
- a row that sees no key gives (0, -inf).

Every kernel attends full tiles (None, None) and squares of which a row sees the columns up to its own (None, 0), or
those from its own on (0, None). Where ``Tile.bands`` says so, any other left and right, of any rectangle, too.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from cqsa_stream.schedulers.masks.calls import Tile

__all__ = [
    "TRIANGLES", "Abilities", "Attend", "Attended", "Fold", "Kernel", "KernelChoice", "Keys", "Queries", "Values",
    "by_triangles",
]  # fmt: skip

Queries = Float[Tensor, "heads q d"]
Keys = Float[Tensor, "kv_heads k d"]
Values = Float[Tensor, "kv_heads k dv"]
Attended = tuple[Float[Tensor, "heads q dv"], Float[Tensor, "heads q"]]

# Merges a tile into an accumulator, in place, as ``kernels.fold.fold`` does.
Fold = Callable[[Tensor, Tensor, Tensor, Tensor], None]
# What vendors offer: q, k, v, whether the tile is a causal square, scale.
Attend = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
# Left and right of what every kernel attends: full tiles, causal squares, and reversed ones.
TRIANGLES: tuple[tuple[int | None, int | None], ...] = ((None, None), (None, 0), (0, None))


@dataclass(frozen=True)
class Abilities:
    """What a kernel can do, and what it takes.

    ``dtypes``: it computes in; ``tile``: the largest call it likes; ``score_terms``: names of what it can add to
    scores; ``score_bytes``: what a call holds besides its result, for each row and each of up to ``score_columns``
    keys; ``calls_at_a_time``: on streams of their own; ``workspace_bytes``: what its libraries take from torch's
    allocator, once; ``whole_dims``: head dims must be equal, and multiples of it (0: any); ``rounded_tiles``: each
    tile's output is rounded to 16 bits before it is merged; ``backward``: whether it can compute gradients.
    """

    dtypes: tuple[torch.dtype, ...]
    tile: Tile
    score_terms: frozenset[str] = frozenset()
    score_bytes: int = 0
    score_columns: int = 0
    calls_at_a_time: int = 1
    workspace_bytes: int = 0
    whole_dims: int = 0
    rounded_tiles: bool = False
    backward: bool = False

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Return the dtype in which tiles must stand on the device: the stored one, or the first that holds it."""
        return stored if stored in self.dtypes else self.dtypes[0]

    def padded(self, q: Queries, k: Keys, v: Values) -> tuple[Tensor, Tensor, Tensor]:
        """Return them with the head dims that the kernel takes: zeros are added, which change no score."""
        whole = self.whole_dims
        width = whole and -(-max(q.shape[2], v.shape[2]) // whole) * whole
        q, k, v = (x if width in (0, x.shape[2]) else pad(x, (0, width - x.shape[2])) for x in (q, k, v))
        return q, k, v


class Kernel(Hashable, Protocol):
    """One back end."""

    @property
    def abilities(self) -> Abilities:
        """What it can do."""

    def attend(self, q: Queries, k: Keys, v: Values, left: int | None, right: int | None, scale: float) -> Attended:
        """Return (out, lse) of the tile."""


@dataclass(frozen=True)
class KernelChoice:
    """The kernel and the operator of a run, by name: part of its plan and of its state."""

    kernel: str
    operator: str


def by_triangles(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend by a vendor's kernel, which knows full tiles and causal squares.

    (On other rectangles kernels align either the top left or the bottom right corner.) A row that sees the columns from
    its own on is a causal one of the square turned round: rows and keys are reversed, and so is the result.
    """
    if left is None and right is None:
        return attend(q, k, v, False, scale)
    assert q.shape[1] == k.shape[1], "a triangle is a square tile"
    if (left, right) == (None, 0):
        return attend(q, k, v, True, scale)
    assert (left, right) == (0, None), f"left {left}, right {right}; expected a triangle"
    out, lse = attend(q.flip(1), k.flip(1), v.flip(1), True, scale)
    return out.flip(1), lse.flip(1)
