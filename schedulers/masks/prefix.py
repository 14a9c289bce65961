"""A prefix that all queries see, and beyond it the causal mask: a prefix language model."""

from dataclasses import dataclass
from typing import ClassVar

from cqsa_stream.schedulers.masks.band import Band
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.masks.rule import Rule, number_of

__all__ = ["Prefix"]


@dataclass(frozen=True, eq=False)
class Prefix(Rule):
    """``j < length or j <= i``."""

    length: int
    kind: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", number_of("prefix", self.length, 0))

    def over(self, rows: range, keys: int) -> Mask:
        inside = Band(rows.start, min(rows.stop, self.length), 0, min(self.length, keys))
        beyond = Band(max(rows.start, self.length), rows.stop, 0, keys, None, 0)
        cut = (band.cut(rows, range(keys)) for band in (inside, beyond))
        return Mask.of_few([band for band in cut if band], str(self))

    def __str__(self) -> str:
        return f"prefix of {self.length:,}"
