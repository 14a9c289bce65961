"""The grid of a run: queries cut into row chunks, keys into column chunks, and which pairs of them are needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.runs import NONE, Runs

__all__ = ["Axis", "Grid"]

_MOST_KNOWN = 4_096  # row chunks whose needs are remembered


@dataclass(frozen=True)
class Axis:
    """Tokens ``[0, tokens)`` cut into ``chunks`` chunks of ``chunk_tokens``; the last may be short, others empty."""

    tokens: int
    chunk_tokens: int
    chunks: int

    @classmethod
    def cut(cls, tokens: int, chunks: int, turn: int = 1) -> "Axis":
        """Cut into equal chunks, rounded up: to multiples of ``turn`` where that adds at most 1/8, else by at most 1/16
        to multiples of a power of two, so that they divide well.
        """
        even = -(-tokens // chunks)
        unit = 1 << max(0, (even // 16).bit_length() - 1)
        if turn > 1 and 8 * (-even % turn) <= even:
            unit = turn
        return cls(tokens, -(-even // unit) * unit, chunks)

    @property
    def filled(self) -> int:
        """The chunks that hold tokens at all."""
        return -(-self.tokens // self.chunk_tokens)

    @property
    def all(self) -> range:
        """All tokens."""
        return range(self.tokens)

    def span(self, chunk: int) -> range:
        """Return the tokens of a chunk; empty past the end."""
        start = min(chunk * self.chunk_tokens, self.tokens)
        return range(start, min(start + self.chunk_tokens, self.tokens))

    def chunks_meeting(self, tokens: Runs) -> Runs:
        """Return the chunks that hold any of the tokens."""
        size = self.chunk_tokens
        return Runs(range(part.start // size, (part.stop - 1) // size + 1) for part in tokens.ranges)


@dataclass(frozen=True)
class Grid:
    """Row chunks by column chunks. ``mask`` is over (query rows, keys), both counted from 0.

    ``same_positions``: row chunk i and column chunk i are the same tokens of one sequence.
    """

    rows: Axis
    columns: Axis
    mask: Mask
    same_positions: bool

    def needed(self, row: int) -> Runs:
        """Return the column chunks that a row chunk must attend to: those of which one of its queries sees a key."""
        found = self._known.get(row)
        if found is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            found = self._known[row] = self.columns.chunks_meeting(self.seen(row))
        return found

    def seen(self, row: int) -> Runs:
        """Return the keys that a query of a row chunk sees."""
        span = self.rows.span(row)
        return self.mask.keys(span) if span else NONE

    def blocks(self, column: int, rows: Sequence[int], tokens: int) -> Iterator[range]:
        """Yield the blocks, of so many tokens, of a column chunk of which a query of these row chunks sees a key."""
        span = self.columns.span(column)
        starts = range(span.start, span.stop, tokens)
        seen: list[Runs] = []
        for row in reversed(rows):  # under a causal mask the last one sees the most
            seen.append(self.mask.keys(self.rows.span(row), span))
            if seen[-1].covers(span):
                seen = [seen[-1]]
                break
        for start in starts:
            block = range(start, min(start + tokens, span.stop))
            if any(keys.meets(block) for keys in seen):
                yield block

    def needing(self, column: int) -> Runs:
        """Return the row chunks that must attend to a column chunk."""
        span = self.columns.span(column)
        return self.rows.chunks_meeting(self.mask.transposed.keys(span)) if span else NONE

    @cached_property
    def _known(self) -> dict[int, Runs]:
        return {}

    @cached_property
    def pairs(self) -> int:
        """The needed pairs of one lane."""
        return sum(len(self.needed(row)) for row in range(self.rows.filled))

    def complete_cover(self, row: int) -> int:
        """Return the cover, a bit for each column chunk, that a finished row has."""
        return self.needed(row).bits
