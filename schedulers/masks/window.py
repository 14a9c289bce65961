"""A query sees the keys around its own position: all, those up to it, or a sliding window."""

from dataclasses import dataclass
from typing import ClassVar

from cqsa_stream.schedulers.masks.band import Band
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.masks.rule import Rule, number_of

__all__ = ["CAUSAL", "FULL", "Window", "last_keys"]


@dataclass(frozen=True, eq=False)
class Window(Rule):
    """``i - left <= j <= i + right``; None is unbounded."""

    left: int | None = None
    right: int | None = None
    kind: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, number_of(name, getattr(self, name), 0))

    @property
    def bounded(self) -> bool:
        return self.left is not None or self.right is not None

    def merged(self, other: Rule) -> "Window | None":
        if not isinstance(other, Window):
            return None
        sides = ((self.left, other.left), (self.right, other.right))
        return Window(*(min((n for n in side if n is not None), default=None) for side in sides))

    def over(self, rows: range, keys: int) -> Mask:
        band = Band(rows.start, rows.stop, 0, keys, None if self.left is None else -self.left, self.right)
        found = band.cut(rows, range(keys))
        return Mask.of_few([found] if found else [], str(self))

    def __str__(self) -> str:
        if self.left is None and self.right is None:
            return "full"
        if self.right == 0:
            return "causal" if self.left is None else f"window of {self.left + 1}"
        before, after = ("all" if n is None else f"{n:,}" for n in (self.left, self.right))
        return f"window of {before} before and {after} after"


FULL, CAUSAL = Window(), Window(None, 0)


def last_keys(width: int) -> Window:
    """Return the causal window in which the query at position i sees the keys i - width + 1 to i.

    Raises ValueError where the width is below 1.
    """
    if width < 1:
        raise ValueError(f"window {width}; expected at least 1: a key's own position is in it")
    return Window(min(width - 1, 2**62), 0)
