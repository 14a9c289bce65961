"""The contract of kernels: exact attention of one tile on one device, with the log-sum-exp that merging needs.

``attend(q, k, v, left, right, scores, ahead) -> (out, lse)``, tested for every back end by one suite:

- ``q [heads, rows, d]``, ``k [kv_heads, columns, d]``, ``v [kv_heads, columns, dv]``, the heads a multiple of kv_heads;
  keys and values may be views whose heads overlap;
- row i of the tile sees column j where ``-left <= j - i <= right`` (both at least 0; None: unbounded), so the top left
  corner is on the diagonal;
- ``scores`` says what the scores are; for what depends on positions, column j is ``j + ahead - i`` after row i;
- ``out [heads, rows, dv]`` float32 (float64 from the reference, 16 bits from the vendor's CUDA kernels), normalised;
  ``lse [heads, rows]``, natural logarithm, float32 or float64;
- a row that sees no key gives (0, -inf).

``attend_packed(q, k, v, bands, scores, ahead)`` is the same for several bands that share no row, counted from the first
row of q and the first column of k: many small documents in one call.

A kernel that ``merges`` adds a call's tiles to the partial (out, lse) of their rows by itself, in place: no tile is
written, and none is rounded to 16 bits. The log-sum-exp is summed up in float64; weights are float32 functions of its
differences, so their errors do not add up.

Every kernel attends full tiles (None, None) and squares of which a row sees the columns up to its own (None, 0), or
those from its own on (0, None). Where ``Tile.bands`` says so, any other left and right, of any rectangle, too; where
``Tile.skips`` does, of no more rows than columns, such that each row sees a column and each column is seen.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from cqsa_stream.schedulers.masks.arrays import Bands64
from cqsa_stream.schedulers.masks.calls import Call, Packed, Tile

__all__ = [
    "TRIANGLES", "Abilities", "Attended", "Fold", "Kernel", "KernelChoice", "Keys", "Merging", "Partial", "Queries",
    "Scores", "Values",
]  # fmt: skip

Queries = Float[Tensor, "heads q d"]
Keys = Float[Tensor, "kv_heads k d"]
Values = Float[Tensor, "kv_heads k dv"]
Attended = tuple[Float[Tensor, "heads q dv"], Float[Tensor, "heads q"]]
Partial = tuple[Float[Tensor, "heads q dv"], Float[Tensor, "heads q"]]

# Merges a tile into an accumulator, in place, as ``kernels.fold.fold`` does.
Fold = Callable[[Tensor, Tensor, Tensor, Tensor], None]
# Left and right of what every kernel attends: full tiles, causal squares, and reversed ones.
TRIANGLES: tuple[tuple[int | None, int | None], ...] = ((None, None), (None, 0), (0, None))


@dataclass(frozen=True)
class Scores:
    """What the score of a query and a key is: ``s = scale q.k``; with a soft cap ``cap tanh(s / cap)``; with slopes
    ``[heads]``, on the device, from this ``slope * |distance|`` is taken (ALiBi).
    """

    scale: float
    soft_cap: float | None = None
    slopes: Float[Tensor, " heads"] | None = None

    def of_tiles(self, tiles: int) -> "Scores":
        """Return those of so many tiles, which go in as so many times the heads."""
        return self if self.slopes is None or tiles == 1 else replace(self, slopes=self.slopes.repeat(tiles))


@dataclass(frozen=True)
class Abilities:
    """What a kernel can do, and what it takes.

    ``dtypes``: it computes in; ``tile``: the largest call it likes; ``terms``: names of the score terms that it knows,
    of ``scores.TERMS``; ``score_bytes``: what a call holds besides its result, for each of up to ``score_rows`` rows
    and ``score_columns`` keys; ``packing_bytes``: what a call of packed bands holds besides its result, and
    ``packing_numbers`` for each feature; ``calls_at_a_time``: on streams of their own; ``workspace_bytes``: what its
    libraries take from torch's allocator, once; ``whole_dims``: head dims must be equal, and multiples of it (0: any);
    ``rounded_tiles``: each tile's output is rounded to 16 bits before it is merged. ``merges``: it is a ``Merging``.
    ``block_rows``: (head dims up to, rows that one processor takes at a time), ascending; none where that is not known.
    """

    dtypes: tuple[torch.dtype, ...]
    tile: Tile
    terms: frozenset[str] = frozenset()
    score_bytes: int = 0
    score_rows: int = 1 << 48
    score_columns: int = 0
    calls_at_a_time: int = 1
    workspace_bytes: int = 0
    whole_dims: int = 0
    rounded_tiles: bool = False
    packing_bytes: int = 0
    packing_numbers: int = 0
    merges: bool = False
    block_rows: tuple[tuple[int, int], ...] = ()

    def turn(self, head_dim: int, processors: int) -> int:
        """Return the rows that so many processors take at a time; 1 where that is not known."""
        return next((processors * rows for most, rows in self.block_rows if head_dim <= most), 1) or 1

    def merging(self, head_dim: int, value_dim: int) -> bool:
        """Return whether the kernel merges tiles of these head dims itself: those that it takes as they are."""
        return self.merges and head_dim == value_dim and not head_dim % max(1, self.whole_dims)

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Return the dtype in which tiles must stand on the device: the stored one, or the first that holds it."""
        return stored if stored in self.dtypes else self.dtypes[0]

    def padded(self, q: Queries, k: Keys, v: Values) -> tuple[Tensor, Tensor, Tensor]:
        """Return them with the head dims that the kernel takes: zeros are added, which change no score."""
        whole = self.whole_dims
        width = whole and -(-max(q.shape[-1], v.shape[-1]) // whole) * whole
        q, k, v = (x if width in (0, x.shape[-1]) else pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        return q, k, v


class Kernel(Hashable, Protocol):
    """One back end."""

    @property
    def abilities(self) -> Abilities:
        """What it can do."""

    def attend(
        self, q: Queries, k: Keys, v: Values, left: int | None, right: int | None, scores: Scores, ahead: int = 0
    ) -> Attended:
        """Return (out, lse) of the tile."""

    def attend_packed(self, q: Queries, k: Keys, v: Values, bands: Bands64, scores: Scores, ahead: int = 0) -> Attended:
        """Return (out, lse) of the rows of several bands."""


class Merging(Kernel, Protocol):
    """A back end that merges its tiles itself."""

    def merge(
        self, partial: Partial, q: Queries, k: Keys, v: Values, call: Call | Packed, scores: Scores, ahead: int = 0
    ) -> None:
        """Merge what the rows see of the columns, those of the call's reach, into their partial, in place."""


@dataclass(frozen=True)
class KernelChoice:
    """The kernel and the operator of a run, by name: part of its plan and of its state."""

    kernel: str
    operator: str
