"""The contract of operations: what the engine asks of whatever is computed of the pairs of chunks.

An operation adds the pairs of a block of rows and a block of columns to its sums. Each sum has a cover of its own:
after a crash between the commits of two sums, a pair may be in one of them alone, and only the other adds it again. A
sum that holds the pair already is given as None.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cqsa_stream.schedulers.operands import Stream, Sum

__all__ = ["Fields", "Operation", "Side"]

Fields = tuple[Tensor, ...]
"""The fields of one sum of a chunk, on the device."""


class Side(NamedTuple):
    """One side of a block of pairs: its tokens, counted from the axis' first; what is read of them, in the order of the
    operation's streams of this axis, each ``[heads, tokens, features]``; and the sums of this axis, or None.
    """

    tokens: range
    streams: Sequence[Tensor]
    sums: Sequence[Fields | None]


class Operation(Protocol):
    """What is computed.

    ``compute_dtype``: in which its streams must stand on the device; ``row_factor``: what row streams are multiplied by
    as they come there; ``readers``: the device's streams on which it reads them, none where there are none.
    """

    compute_dtype: torch.dtype
    row_factor: float
    readers: tuple[Any, ...]

    @property
    def streams(self) -> tuple[Stream, ...]:
        """What is read: today ``operands.STREAMS``, which is all that the engine brings."""

    @property
    def sums(self) -> tuple[Sum, ...]:
        """What is summed up. The first counts as the run's progress."""

    def add(self, lane: int, rows: Side, columns: Side) -> None:
        """Add all visible pairs of the rows and columns to the sums that are given. Sums hold whole blocks."""

    def leave(self, number: int, lane: int, fields: Fields) -> None:
        """Make of a complete chunk of sum ``number``, in place, what leaves; no partial is ever stored after it."""

    def merge(self, number: int, into: Fields, other: Fields) -> None:
        """Add another partial of sum ``number``, over other pairs, to the first, in place."""
