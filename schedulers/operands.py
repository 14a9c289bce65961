"""What an operation reads and what it sums up: names, axes and sizes, nothing of how.

An operation reads streams of tokens, by row chunks or by column chunks, and adds to sums along one of the two axes.
Each sum of a chunk has a cover of its own: which chunks of the other axis are in it.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["STREAMS", "Field", "Stream", "Sum"]

AxisName = Literal["rows", "columns"]


@dataclass(frozen=True)
class Stream:
    """An array of which a task holds its rows, or past which it streams its columns."""

    name: str
    axis: AxisName


STREAMS = Stream("query", "rows"), Stream("key", "columns"), Stream("value", "columns")
"""What the engine can bring: one stream by rows, two by columns."""


@dataclass(frozen=True)
class Field:
    """Numbers of a sum: ``[heads, tokens, width]``, or ``[heads, tokens]`` where the width is 0.

    ``dtype`` and ``itemsize`` are those of the accumulator, ``left_dtype`` and ``left_itemsize`` those in the output;
    ``identity`` is what the numbers are before anything is added.
    """

    name: str
    heads: int
    width: int
    dtype: str
    itemsize: int
    left_dtype: str
    left_itemsize: int
    identity: float

    @property
    def numbers(self) -> int:
        """Numbers of one token."""
        return self.heads * max(1, self.width)

    def shape(self, tokens: int) -> tuple[int, ...]:
        """Return the shape of so many tokens."""
        return (self.heads, tokens, self.width) if self.width else (self.heads, tokens)


@dataclass(frozen=True)
class Sum:
    """What is summed up along an axis, field by field."""

    axis: AxisName
    fields: tuple[Field, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of an accumulator."""
        return sum(field.numbers * field.itemsize for field in self.fields)

    @property
    def left_bytes(self) -> int:
        """Bytes of one token in the output."""
        return sum(field.numbers * field.left_itemsize for field in self.fields)
