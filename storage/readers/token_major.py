"""Single files whose axes are [batch, token, head, feature], as attention kernels keep them, seen in our order.

The same bytes are an array [batch, 1, token, head x feature]. A range of tokens of all heads is one run of bytes, which
is read as such, and the heads that were asked for are copied from it.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np

from cqsa_stream.storage.dtypes import numpy_dtype
from cqsa_stream.storage.readers.memory import copy_rows
from cqsa_stream.storage.readers.plain import RawArray, WholeFiles
from cqsa_stream.storage.readers.ranges import PAGE, lent

__all__ = ["TokenMajorArray", "token_major"]

_SLAB_BYTES = 2 << 20  # for each piece of a read in flight

_spare: list[np.ndarray] = []  # memory for slabs


def token_major(array: RawArray) -> "RawArray | TokenMajorArray":
    """Present a file's axes [batch, token, head, feature] as [batch, head, token, feature]."""
    if len(array.shape) != 4:
        return array  # which is refused for its shape
    batch, tokens, heads, features = array.shape
    shape = (batch, 1, tokens, heads * features)
    assert isinstance(array.files, WholeFiles)
    rows = replace(array, shape=shape, files=replace(array.files, unit=shape))
    return rows if heads == 1 else TokenMajorArray(rows, heads)


class TokenMajorArray:
    """The rows of all heads of a token lie side by side: they are fetched together."""

    kept_bytes = 0
    encoding: ClassVar[Literal["raw"]] = "raw"

    def __init__(self, rows: RawArray, heads: int) -> None:
        batch, _, tokens, width = rows.shape
        self._rows = rows
        self._row_bytes = width * numpy_dtype(rows.dtype).itemsize
        self._slab_tokens = max(1, _SLAB_BYTES // max(1, self._row_bytes))
        self.source = rows.source
        self.dtype = rows.dtype
        self.shape = (batch, heads, tokens, width // heads if heads else 0)
        self.stored_chunk = (1, heads, 1, self.shape[3])

    @property
    def staging_bytes(self) -> int:
        return self._rows.staging_bytes + self._slab_tokens * self._row_bytes + 2 * PAGE

    @property
    def bytes_read(self) -> int:
        return self._rows.bytes_read

    def begin(self, in_flight: int) -> None:
        self._rows.begin(in_flight)
        _spare.clear()  # they may be larger than what is planned now

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        return 0

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        count = max(1, min(len(tokens), self._slab_tokens * self._rows.in_flight))
        with lent(_spare, count * self._row_bytes + PAGE) as memory:
            for start in range(tokens.start, tokens.stop, count):
                span = range(start, min(start + count, tokens.stop))
                rows = self._read(batch, span, memory)
                place = buffer[:, start - tokens.start : span.stop - tokens.start]
                copy_rows(place, rows[:, heads.start : heads.stop].swapaxes(0, 1))

    def cached_share(self) -> float:
        return self._rows.cached_share()

    def check(self) -> None:
        self._rows.check()

    def _read(self, batch: int, tokens: range, memory: np.ndarray) -> np.ndarray:
        """Return the rows [token, head, feature] of all heads, read into memory."""
        lead = self._rows.lead(batch, range(1), tokens)
        flat = memory[lead : lead + len(tokens) * self._row_bytes].view(numpy_dtype(self.dtype))
        self._rows.read_into(batch, range(1), tokens, flat.reshape(1, len(tokens), -1))
        return flat.reshape(len(tokens), self.shape[1], self.shape[3])
