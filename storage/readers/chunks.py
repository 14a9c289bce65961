"""Arrays that others read for us, stored chunk by stored chunk: which of them a read meets, and what that fetches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

__all__ = ["Chunks", "split"]


@dataclass(frozen=True)
class Chunks:
    """The stored chunks of an array ``[batch, head, token, feature]``. ``origin``: where those of a view begin."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    itemsize: int
    origin: tuple[int, ...] = (0, 0, 0, 0)

    @property
    def stored_chunk(self) -> tuple[int, ...]:
        """Return the chunk, no longer than the array."""
        return tuple(max(1, min(n, size)) for n, size in zip(self.chunk, self.shape, strict=True))

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.itemsize

    def pieces(self, heads: range, tokens: range, buffer: np.ndarray) -> Iterator[tuple[range, range, np.ndarray]]:
        """Cut a read where chunks begin; yield (heads, tokens, their place in the buffer)."""
        _, head_chunk, token_chunk, _ = self.stored_chunk
        for some, span in product(split(heads, head_chunk, self.origin[1]), split(tokens, token_chunk, self.origin[2])):
            place = buffer[some.start - heads.start : some.stop - heads.start]
            yield some, span, place[:, span.start - tokens.start : span.stop - tokens.start]

    def fetched_bytes(self, heads: range, tokens: range) -> int:
        """Return the size of the stored chunks that a read meets, decoded, cut at the end of the token axis."""
        batch_chunk, head_chunk, token_chunk, _ = self.stored_chunk
        origin = self.origin[2]
        first = (tokens.start - origin) // token_chunk * token_chunk + origin
        stop = min(-(-(tokens.stop - origin) // token_chunk) * token_chunk + origin, self.shape[2])
        fetched = len(split(heads, head_chunk, self.origin[1])) * head_chunk
        return batch_chunk * fetched * (stop - first) * self.shape[3] * self.itemsize


def split(span: range, length: int, origin: int = 0) -> list[range]:
    """Cut a range at the multiples of a length from the origin on."""
    cuts = range(((span.start - origin) // length + 1) * length + origin, span.stop, length)
    return [range(a, b) for a, b in pairwise([span.start, *cuts, span.stop])]
