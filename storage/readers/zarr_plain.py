"""Zarr arrays in a local directory whose chunks are plain numbers: v2 and v3, sharded or not, with crc32c or not.

Metadata is read here only as far as it is fully understood; whatever else it says, TensorStore opens the array.
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/)
"""

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from crc32c import crc32c

from cqsa_stream.storage.dtypes import DTYPES, ML_DTYPES, dtype_bytes
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.readers.files import StoredFile, opened
from cqsa_stream.storage.readers.plain import CACHED_BYTES, CURES, RawArray, UnitFiles, WholeFiles
from cqsa_stream.storage.retrying import retrying

__all__ = ["Shards", "raw_zarr"]

_V2_DTYPES = {"<f8": "float64", "<f4": "float32", "<f2": "float16"} | {name: name for name in ML_DTYPES}
_V3_FIELDS = {
    "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value",
    "attributes", "dimension_names", "storage_transformers", "consolidated_metadata",
}  # fmt: skip
_MISSING = 2**64 - 1
_INDICES_BYTES = 1 << 20  # of the indices of shards that are remembered
_MOST_INDEX_BYTES = 1 << 22


class _Inner(NamedTuple):
    """How the inner chunks of shards lie."""

    shape: tuple[int, ...]
    at_start: bool
    index_checked: bool


class _Chunks(NamedTuple):
    """How chunks lie: ``inner`` where they are shards; ``checked`` where they, or the inner ones, have a checksum."""

    dtype: str
    shape: tuple[int, ...]
    checked: bool
    separator: str
    prefix: str = ""
    inner: _Inner | None = None


def raw_zarr(path: Path, metadata: dict[str, Any]) -> RawArray | None:
    """Return the array where its chunks, or the inner chunks of its shards, are plain numbers of whole rows."""
    try:
        shape = tuple(metadata["shape"])
        chunks = _described_v3(metadata) if metadata.get("zarr_format") == 3 else _described_v2(metadata)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError):
        return None  # TensorStore will say what is wrong with it
    if chunks is None or len(shape) != 4 or 0 in shape or chunks.separator not in ("/", "."):
        return None
    unit = chunks.inner.shape if chunks.inner else chunks.shape
    if not _whole_rows(chunks.shape, shape) or not _whole_rows(unit, shape):
        return None
    escaped = str(path).replace("{", "{{").replace("}", "}}")
    pattern = f"{escaped}/" + chunks.separator.join(([chunks.prefix] if chunks.prefix else []) + ["{}"] * 4)
    itemsize = dtype_bytes(chunks.dtype)
    stored_bytes = math.prod(unit) * itemsize + 4 * chunks.checked
    cached = math.prod(shape) * itemsize <= CACHED_BYTES
    files: UnitFiles = WholeFiles(unit, pattern, stored_bytes, cached=cached)
    if chunks.inner is not None:
        files = Shards(unit, pattern, chunks.shape, stored_bytes, chunks.inner, cached)
        if any(n % m for n, m in zip(chunks.shape, unit, strict=True)) or not files.index_fits:
            return None
    return RawArray(str(path), shape, chunks.dtype, files, chunks.checked)


def _whole_rows(chunk: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(chunk) == 4 and all(type(n) is int and 0 < n < 2**40 for n in chunk) and chunk[3] == shape[3]


def _described_v2(metadata: dict[str, Any]) -> _Chunks | None:
    if metadata["compressor"] or metadata.get("filters") or metadata["order"] != "C":
        return None
    dtype, separator = _V2_DTYPES[metadata["dtype"]], metadata.get("dimension_separator", ".")
    return _Chunks(dtype, tuple(metadata["chunks"]), False, separator)


def _described_v3(metadata: dict[str, Any]) -> _Chunks | None:
    if any(name not in _V3_FIELDS and not _ignorable(value) for name, value in metadata.items()):
        return None
    if metadata["chunk_grid"]["name"] != "regular" or metadata.get("storage_transformers"):
        return None
    shape = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    encoding = metadata["chunk_key_encoding"]
    default = encoding["name"] == "default"
    separator = encoding.get("configuration", {}).get("separator", "/" if default else ".")
    dtype, codecs = metadata["data_type"], metadata["codecs"]
    if dtype not in DTYPES or encoding["name"] not in ("default", "v2"):
        return None
    inner = None
    if [codec["name"] for codec in codecs] == ["sharding_indexed"]:
        settings = codecs[0]["configuration"]
        index_checked, location = _plain(settings["index_codecs"]), settings.get("index_location", "end")
        if index_checked is None or location not in ("start", "end"):
            return None
        codecs, inner = settings["codecs"], _Inner(tuple(settings["chunk_shape"]), location == "start", index_checked)
    checked = _plain(codecs)
    return None if checked is None else _Chunks(dtype, shape, checked, separator, "c" if default else "", inner)


def _ignorable(extension: Any) -> bool:
    return isinstance(extension, dict) and extension.get("must_understand") is False


def _plain(codecs: list[dict[str, Any]]) -> bool | None:
    """Return whether chunks of these codecs carry a checksum; None where they are no plain little-endian numbers."""
    first, *others = codecs
    if first["name"] != "bytes" or first.get("configuration", {}).get("endian", "little") != "little":
        return None
    return {(): False, ("crc32c",): True}.get(tuple(codec["name"] for codec in others))


@dataclass
class Shards:
    """Inner chunks of shards, found by the index that each shard carries; those used last are remembered."""

    unit: tuple[int, ...]
    pattern: str
    shard: tuple[int, ...]
    unit_bytes: int
    inner: _Inner
    cached: bool
    _lock: threading.Lock = field(default_factory=threading.Lock)  # two reads may look for their shards at a time
    _indices: "OrderedDict[str, tuple[tuple[int, int, int], np.ndarray]]" = field(default_factory=OrderedDict)

    @property
    def _grid(self) -> tuple[int, ...]:
        return tuple(n // m for n, m in zip(self.shard, self.unit, strict=True))

    @property
    def _index_bytes(self) -> int:
        return 16 * math.prod(self._grid) + 4 * self.inner.index_checked

    @property
    def index_fits(self) -> bool:
        """Whether an index is small enough to be held."""
        return self._index_bytes <= _MOST_INDEX_BYTES

    def kept_bytes(self, shape: tuple[int, ...]) -> int:
        shards = math.prod(-(-n // m) for n, m in zip(shape, self.shard, strict=True))
        return 2 * self._index_bytes + min(_INDICES_BYTES, shards * self._index_bytes)  # two being read

    def locate(self, cell: tuple[int, ...]) -> tuple[StoredFile, int]:
        """Return the shard of an inner chunk, and the position there. Raises ArrayError."""
        shard, inner = zip(*(divmod(i, n) for i, n in zip(cell, self._grid, strict=True)), strict=True)
        path = self.pattern.format(*shard)
        index, size = self._index(path)
        start, length = map(int, index[inner])
        where = f"{path}: the inner chunk {inner}"
        if start == length == _MISSING:
            raise ArrayError(f"{where} is missing; {CURES}")
        if length != self.unit_bytes or start + length > size:
            raise ArrayError(
                f"{where} has {length} bytes at {start} of {size}; expected {self.unit_bytes}, write this shard again"
            )
        return StoredFile(path, size, cached=self.cached), start

    def check(self, cells: Iterator[tuple[int, ...]]) -> None:
        for cell in cells:
            self.locate(cell)

    @retrying
    def _index(self, path: str) -> tuple[np.ndarray, int]:
        try:
            with opened(StoredFile(path, self._index_bytes, open_ended=True), direct=False) as (number, _):
                found = os.fstat(number)
                stamp = found.st_ino, found.st_size, found.st_mtime_ns
                with self._lock:
                    known = self._indices.get(path)
                    if known is not None and known[0] == stamp:
                        self._indices.move_to_end(path)
                        return known[1], found.st_size
                position = 0 if self.inner.at_start else found.st_size - self._index_bytes
                index = self._unpacked(path, os.pread(number, self._index_bytes, position))
        except OSError as error:
            raise ArrayError(f"{path}: its index cannot be read: {error.strerror}") from error
        with self._lock:
            self._indices[path] = stamp, index
            self._indices.move_to_end(path)
            while len(self._indices) > max(1, _INDICES_BYTES // self._index_bytes):
                self._indices.popitem(last=False)
        return index, found.st_size

    def _unpacked(self, path: str, data: bytes) -> np.ndarray:
        count = 16 * math.prod(self._grid)
        if len(data) != self._index_bytes or (
            self.inner.index_checked and crc32c(data[:count]) != int.from_bytes(data[count:], "little")
        ):
            raise ArrayError(f"{path}: the index of the shard fails its crc32c: damaged, write this shard again")
        return np.frombuffer(data[:count], "<u8").reshape(*self._grid, 2)
