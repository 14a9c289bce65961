"""Block-sparse: a bitmap says which blocks of keys a block of queries sees."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cqsa_stream.schedulers.masks.arrays import LEAST, MOST, Bands64, cut
from cqsa_stream.schedulers.masks.bands import Mask, refuse_too_many
from cqsa_stream.schedulers.masks.dense import linked, runs_of
from cqsa_stream.schedulers.masks.rule import Rule, number_of

__all__ = ["Blocks"]


@dataclass(frozen=True, eq=False)
class Blocks(Rule):
    """``bitmap[i // size, j // size]``; positions outside the bitmap see nothing, and are not seen."""

    bitmap: np.ndarray
    size: int
    kind: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", number_of("block size", self.size))
        object.__setattr__(self, "bitmap", _bitmap(self.bitmap))
        if max(self.bitmap.shape) * self.size > 2**61:
            raise ValueError(f"blocks of {self.size}; expected positions of at most 2^61")

    def merged(self, other: Rule) -> "Blocks | None":
        if not isinstance(other, Blocks) or other.size != self.size:
            return None
        rows, columns = (min(ends) for ends in zip(self.bitmap.shape, other.bitmap.shape, strict=True))
        return Blocks(self.bitmap[:rows, :columns] & other.bitmap[:rows, :columns], self.size)

    def over(self, rows: range, keys: int) -> Mask:
        first, stop = (min(max(0, n), len(self.bitmap)) for n in (rows.start // self.size, -(-rows.stop // self.size)))
        row, start, end = runs_of(self.bitmap[first:stop])
        refuse_too_many(len(row))
        r0, r1, c0, c1 = linked(row + first, start, end, diagonal=False)[:4] * self.size
        bands: Bands64 = np.stack([r0, r1, c0, c1, np.full_like(r0, LEAST), np.full_like(r0, MOST)])
        return Mask.of_disjoint(cut(bands, rows.start, rows.stop, 0, keys), str(self))

    def __str__(self) -> str:
        return f"blocks of {self.size:,}"


def _bitmap(values: Any) -> np.ndarray:
    found = np.asarray(values)
    if found.ndim != 2 or not found.size or found.dtype.kind not in "biu" or np.any((found != 0) & (found != 1)):
        raise ValueError(f"bitmap: found {found.dtype} of shape {found.shape}; expected True or False, two axes")
    kept = found.astype(bool)
    kept.flags.writeable = False
    return kept
