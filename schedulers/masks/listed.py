"""Any list of disjoint bands."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cqsa_stream.schedulers.masks.arrays import LEAST, MOST
from cqsa_stream.schedulers.masks.bands import Mask, refuse_too_many
from cqsa_stream.schedulers.masks.rule import Rule, array_of

__all__ = ["Bands"]


@dataclass(frozen=True, eq=False)
class Bands(Rule):
    """``r0 <= i < r1``, ``c0 <= j < c1`` and ``lo <= j - i <= hi`` of one of the bands (r0, r1, c0, c1, lo, hi).

    None, in an array the least and the largest of 64 bits, is an unbounded diagonal.
    """

    bands: np.ndarray
    kind: ClassVar[str] = "bands"

    def __post_init__(self) -> None:
        found = array_of("bands", _numbers(self.bands), 2)
        if found.shape[1] != 6:
            raise ValueError(f"bands: found {found.shape[1]} numbers each; expected six: r0, r1, c0, c1, lo, hi")
        object.__setattr__(self, "bands", found)
        object.__setattr__(self, "_mask", Mask(found.T.copy(), str(self)))

    def over(self, rows: range, keys: int) -> Mask:
        whole: Mask = self._mask  # type: ignore[attr-defined]
        return whole.restricted(rows, range(keys))

    def __str__(self) -> str:
        return f"{len(self.bands):,} band{'s' * (len(self.bands) != 1)}"


def _numbers(bands: Any) -> Any:
    """Return bands as numbers: None becomes what an array has for it."""
    if isinstance(bands, np.ndarray):
        return bands
    try:
        listed = [list(band) for band in bands]
    except TypeError as error:
        raise ValueError(f"bands: {error}; expected lists of six numbers: r0, r1, c0, c1, lo, hi") from None
    refuse_too_many(len(listed))
    for band in listed:
        for place, none in zip((4, 5), (LEAST, MOST), strict=True):
            if len(band) == 6 and band[place] is None:
                band[place] = none
    return listed or np.empty((0, 6), np.int64)
