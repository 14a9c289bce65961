"""The first keys and the last ones: attention sinks and a sliding window (StreamingLLM, arXiv 2309.17453)."""

from dataclasses import dataclass
from typing import ClassVar

from cqsa_stream.schedulers.masks.band import Band
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.masks.rule import Rule, number_of

__all__ = ["Strip"]


@dataclass(frozen=True, eq=False)
class Strip(Rule):
    """``j <= i and (j < strip or j > i - window)``."""

    strip: int
    window: int
    kind: ClassVar[str] = "strip"

    def __post_init__(self) -> None:
        object.__setattr__(self, "strip", number_of("strip", self.strip, 0))
        object.__setattr__(self, "window", number_of("window", self.window, 0))

    def over(self, rows: range, keys: int) -> Mask:
        first = Band(rows.start, rows.stop, 0, min(self.strip, keys), None, 0)
        last = Band(rows.start, rows.stop, self.strip, keys, 1 - self.window, 0)
        cut = (band.cut(rows, range(keys)) for band in (first, last))
        return Mask.of_few([band for band in cut if band], str(self))

    def __str__(self) -> str:
        return f"strip of {self.strip:,} and window of {self.window:,}"
