"""The grid of a run: queries cut into row chunks, keys into column chunks, and which pairs of them are needed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Axis", "Grid"]


@dataclass(frozen=True)
class Axis:
    """Tokens ``[0, tokens)`` cut into ``chunks`` chunks of ``chunk_tokens``; the last may be short, others empty."""

    tokens: int
    chunk_tokens: int
    chunks: int

    @classmethod
    def cut(cls, tokens: int, chunks: int) -> "Axis":
        """Cut into equal chunks, rounded up by at most 1/16 to multiples of a power of two: they divide well."""
        even = -(-tokens // chunks)
        unit = 1 << max(0, (even // 16).bit_length() - 1)
        return cls(tokens, -(-even // unit) * unit, chunks)

    @property
    def filled(self) -> int:
        """The chunks that hold tokens at all."""
        return -(-self.tokens // self.chunk_tokens)

    def span(self, chunk: int) -> range:
        """Return the tokens of a chunk; empty past the end."""
        start = min(chunk * self.chunk_tokens, self.tokens)
        return range(start, min(start + self.chunk_tokens, self.tokens))

    def chunks_meeting(self, tokens: range) -> range:
        """Return the chunks that hold any of the tokens."""
        if not tokens:
            return range(0)
        return range(tokens.start // self.chunk_tokens, (tokens.stop - 1) // self.chunk_tokens + 1)


@dataclass(frozen=True)
class Grid:
    """``needed[a]`` holds the column chunks that row chunk a must attend to.

    ``same_positions``: row chunk i and column chunk i are the same tokens of one sequence.
    """

    rows: Axis
    columns: Axis
    needed: tuple[range, ...]
    same_positions: bool

    @classmethod
    def of(cls, rows: Axis, columns: Axis, keys_seen: Callable[[range], range], same_positions: bool) -> "Grid":
        """Build the grid; ``keys_seen(rows)`` gives the keys that any of the query rows sees."""
        needed = tuple(
            columns.chunks_meeting(keys_seen(span)) if (span := rows.span(a)) else range(0) for a in range(rows.chunks)
        )
        return cls(rows, columns, needed, same_positions)

    @cached_property
    def pairs(self) -> int:
        """The needed pairs of one lane."""
        return sum(map(len, self.needed))

    def complete_cover(self, row: int) -> int:
        """Return the cover, a bit for each column chunk, that a finished row has."""
        needed = self.needed[row]
        return ((1 << len(needed)) - 1) << needed.start
