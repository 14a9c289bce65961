"""Documents packed one after another: a query sees the keys of its own."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cqsa_stream.schedulers.masks.arrays import LEAST, MOST, cut
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.masks.rule import Rule, array_of

__all__ = ["Documents"]


@dataclass(frozen=True, eq=False)
class Documents(Rule):
    """i and j lie in the same ``[cu_seqlens[n], cu_seqlens[n + 1])``; positions outside all of them see nothing."""

    cu_seqlens: np.ndarray
    kind: ClassVar[str] = "documents"

    def __post_init__(self) -> None:
        found = array_of("cu_seqlens", self.cu_seqlens, 1)
        object.__setattr__(self, "cu_seqlens", found)
        if len(found) < 2 or found[0] < 0 or np.any(found[1:] < found[:-1]):
            raise ValueError(
                "cu_seqlens: expected the positions at which documents begin, and the last one's end: at least two "
                "whole numbers, none negative, ascending, as 0, 4, 10 for documents of 4 and 6 tokens"
            )

    def over(self, rows: range, keys: int) -> Mask:
        first = max(0, int(np.searchsorted(self.cu_seqlens, rows.start, "right")) - 1)
        stop = int(np.searchsorted(self.cu_seqlens, min(rows.stop, keys), "left")) + 1
        edges = self.cu_seqlens[first:stop]
        starts, stops = edges[:-1], edges[1:]
        unbounded = np.full_like(starts, LEAST), np.full_like(starts, MOST)
        bands = np.stack([starts, stops, starts, stops, *unbounded])
        return Mask.of_disjoint(cut(bands, rows.start, rows.stop, 0, keys), str(self))

    def __str__(self) -> str:
        count = int(np.count_nonzero(np.diff(self.cu_seqlens)))
        return f"{count:,} document{'s' * (count != 1)}"
