"""zarr-python arrays whose chunks are in no local folder: in memory, in an archive, behind fsspec. Read as they are."""

import math
from typing import Any, ClassVar, Literal

import numpy as np

from cqsa_stream.storage.dtypes import numpy_dtype
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.raw import CURES

__all__ = ["ZarrArray"]


class ZarrArray:
    """A ``zarr.Array`` as a token array: zarr-python fetches and decodes the chunks."""

    source = "memory"  # it cannot be opened again by its name
    leaf_bytes = 0
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
        _, heads_chunk, length, _ = self.stored_chunk
        try:
            start = tokens.start
            while start < tokens.stop:
                stop = min(tokens.stop, (start // length + 1) * length)
                found = self._array[batch, heads.start : heads.stop, start:stop]
                np.copyto(buffer[:, start - tokens.start : stop - tokens.start], found)
                start = stop
        except (ValueError, OSError, RuntimeError) as error:
            raise ArrayError(f"zarr.Array {self._array.name}: {error}; write this chunk again") from error
        chunks = (-(-tokens.stop // length) - tokens.start // length) * (
            -(-heads.stop // heads_chunk) - heads.start // heads_chunk
        )
        self.bytes_read += chunks * math.prod(self.stored_chunk) * numpy_dtype(self.dtype).itemsize

    def check(self) -> None:
        if not self._fill_missing and self._array.nchunks_initialized < self._array.nchunks:
            missing = self._array.nchunks - self._array.nchunks_initialized
            raise ArrayError(f"zarr.Array {self._array.name}: {missing} stored chunks are missing; {CURES}")
