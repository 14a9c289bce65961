"""zarr-python arrays whose chunks are in no local folder: in memory, in an archive, behind fsspec. Read as they are."""

import json
import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.readers.chunks import Chunks
from cqsa_stream.storage.readers.locations import redacted
from cqsa_stream.storage.readers.memory import copy_rows
from cqsa_stream.storage.readers.plain import CURES

__all__ = ["ZarrArray", "folder_of"]


def folder_of(array: Any) -> Path | None:
    """Return the local folder by whose name the same array is opened; None where there is none.

    Raises ArrayError where another array is there by now than the one that was opened.
    """
    store = array.store
    local = type(store) is zarr.storage.LocalStore
    place = f"zarr.Array {redacted(str(array.store_path))}"
    try:
        there = sync(zarr.AsyncArray.open(array.store_path, zarr_format=array.metadata.zarr_format)).metadata
    except Exception as error:  # of the store, of what is no metadata
        if not local:
            return None  # reading will tell
        raise ArrayError(f"{place}: cannot be opened again ({error}); open it again where it is by now") from error
    if _described(there) != _described(array.metadata):
        raise ArrayError(f"{place}: another array is there by now, or it was resized: open it again")
    folder = (store.root / array.path).absolute() if local else None
    both = folder is not None and (folder / "zarr.json").is_file() and (folder / ".zarray").is_file()
    return None if both else folder


def _described(metadata: Any) -> dict[str, Any]:
    """Return what decides how an array is read: its metadata as stored, without attributes."""
    stored = metadata.to_buffer_dict(default_buffer_prototype())
    found = stored.get("zarr.json", stored.get(".zarray"))
    text = json.loads(found.to_bytes(), parse_constant=str)  # NaN is not equal to itself
    return {key: value for key, value in text.items() if key != "attributes"}


class ZarrArray:
    """A ``zarr.Array`` as a token array: zarr-python fetches and decodes the chunks.

    ``token_major``: its axes are [batch, token, head, feature].
    """

    source = "memory"  # it cannot be opened again by its name
    kept_bytes = 0
    encoding: ClassVar[Literal["compressed"]] = "compressed"

    def __init__(self, array: Any, *, fill_missing: bool, token_major: bool = False) -> None:
        self._array = array
        self._fill_missing = fill_missing
        self._token_major = token_major and len(array.shape) == 4
        order = (0, 2, 1, 3) if self._token_major else range(len(array.shape))
        self.shape = tuple(array.shape[axis] for axis in order)
        self.dtype = np.dtype(array.dtype).name
        chunk = tuple(array.chunks[axis] for axis in order)
        self._chunks = Chunks(self.shape, chunk, np.dtype(array.dtype).itemsize)
        self.stored_chunk = self._chunks.stored_chunk
        self.staging_bytes = 3 * self._chunks.chunk_bytes  # stored, decoded, cut
        self.bytes_read = 0

    def begin(self, in_flight: int) -> None:
        """There is one way to read."""

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        return 0

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        for some, span, place in self._chunks.pieces(heads, tokens, buffer):
            copy_rows(place, self._read(batch, some, span))
        self.bytes_read += self._chunks.fetched_bytes(heads, tokens)

    def _read(self, batch: int, heads: range, tokens: range) -> np.ndarray:
        place = (batch, slice(heads.start, heads.stop), slice(tokens.start, tokens.stop))
        try:
            if self._token_major:
                return np.swapaxes(np.asarray(self._array[place[0], place[2], place[1]]), 0, 1)
            return np.asarray(self._array[place])
        except Exception as error:  # of the store, or of any codec
            text = redacted(str(error))
            where = f"[{batch}, {heads.start}:{heads.stop}, {tokens.start}:{tokens.stop}]"
            raise ArrayError(f"zarr.Array {self._array.name}: {where}: {text}; write this chunk again") from (
                error if text == str(error) else None
            )

    def cached_share(self) -> float:
        return 0.0

    def check(self) -> None:
        if self._fill_missing:
            return
        stored = self._array.shards or self._array.chunks
        inner = math.prod(n // m for n, m in zip(stored, self._array.chunks, strict=True))
        expected = math.prod(-(-n // m) for n, m in zip(self._array.shape, stored, strict=True))
        try:
            missing = expected - self._array.nchunks_initialized // inner  # zarr counts the inner chunks of shards
        except Exception:  # a store that cannot list what it has
            return
        if missing > 0:
            raise ArrayError(f"zarr.Array {self._array.name}: {missing} stored chunks are missing; {CURES}")
