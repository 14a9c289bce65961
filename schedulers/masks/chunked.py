"""Chunks of equal length: a query sees the keys of its own (Llama 4's local layers, together with the causal mask)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cqsa_stream.schedulers.masks.arrays import LEAST, MOST, cut
from cqsa_stream.schedulers.masks.band import Band
from cqsa_stream.schedulers.masks.bands import Mask, refuse_too_many
from cqsa_stream.schedulers.masks.rule import Rule, number_of

__all__ = ["Chunked"]


@dataclass(frozen=True, eq=False)
class Chunked(Rule):
    """``i // size == j // size``."""

    size: int
    kind: ClassVar[str] = "chunked"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", number_of("chunk size", self.size))

    def over(self, rows: range, keys: int) -> Mask:
        if self.size == 1:
            found = Band(rows.start, rows.stop, 0, keys, 0, 0).cut(rows, range(keys))
            return Mask.of_few([found] if found else [], str(self))
        first, last = max(0, rows.start // self.size), min((rows.stop - 1) // self.size, (keys - 1) // self.size)
        refuse_too_many(last - first + 1)
        starts = np.arange(first, last + 1, dtype=np.int64) * self.size
        stops = np.minimum(starts, 2**62 - self.size) + self.size
        unbounded = np.full_like(starts, LEAST), np.full_like(starts, MOST)
        bands = np.stack([starts, stops, starts, stops, *unbounded])
        return Mask.of_disjoint(cut(bands, rows.start, rows.stop, 0, keys), str(self))

    def __str__(self) -> str:
        return f"chunks of {self.size:,}"
