"""zarr-python arrays whose chunks are in no local folder: in memory, in an archive, behind fsspec. Read as they are."""

import math
from itertools import product
from typing import Any, ClassVar, Literal

import numpy as np

from cqsa_stream.storage.dtypes import numpy_dtype
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.raw import CURES, split

__all__ = ["ZarrArray"]


class ZarrArray:
    """A ``zarr.Array`` as a token array: zarr-python fetches and decodes the chunks."""

    source = "memory"  # it cannot be opened again by its name
    leaf_bytes = kept_bytes = 0
    encoding: ClassVar[Literal["compressed"]] = "compressed"

    def __init__(self, array: Any, fill_missing: bool) -> None:
        self._array = array
        self._fill_missing = fill_missing
        self.shape = tuple(array.shape)
        self.dtype = np.dtype(array.dtype).name
        self.stored_chunk = tuple(max(1, min(n, m)) for n, m in zip(array.chunks, self.shape, strict=True))
        self.staging_bytes = 3 * math.prod(array.chunks) * numpy_dtype(self.dtype).itemsize  # stored, decoded, cut
        self.bytes_read = 0

    def begin(self, in_flight: int) -> None:
        """There is one way to read."""

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        return 0

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        fetched = 0
        for head, token in product(split(heads, self.stored_chunk[1]), split(tokens, self.stored_chunk[2])):
            try:
                found = self._array[batch, head.start : head.stop, token.start : token.stop]
            except Exception as error:  # of the store, or of any codec
                where = f"[{batch}, {head.start}:{head.stop}, {token.start}:{token.stop}]"
                raise ArrayError(f"zarr.Array {self._array.name}: {where}: {error}; write this chunk again") from error
            place = buffer[:, token.start - tokens.start : token.stop - tokens.start]
            np.copyto(place[head.start - heads.start : head.stop - heads.start], found)
            fetched += self._fetched(token)
        self.bytes_read += fetched

    def _fetched(self, tokens: range) -> int:
        """Return the size of the stored chunks that hold tokens, decoded, cut at the end of the token axis."""
        batch_chunk, heads_chunk, length, _ = self.stored_chunk
        count = min(-(-tokens.stop // length) * length, self.shape[2]) - tokens.start // length * length
        return int(batch_chunk * heads_chunk * count * self.shape[3] * numpy_dtype(self.dtype).itemsize)

    def check(self) -> None:
        if self._fill_missing:
            return
        stored = self._array.shards or self._array.chunks
        inner = math.prod(n // m for n, m in zip(stored, self._array.chunks, strict=True))
        expected = math.prod(-(-n // m) for n, m in zip(self.shape, stored, strict=True))
        missing = expected - self._array.nchunks_initialized // inner  # zarr counts the inner chunks of shards
        if missing > 0:
            raise ArrayError(f"zarr.Array {self._array.name}: {missing} stored chunks are missing; {CURES}")
