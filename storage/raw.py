"""Arrays stored as plain files of numbers: .npy, and Zarr v2 and v3 without compression.

Any range of tokens is read straight into the caller's buffer, with ``preadv``: no other copy, nothing mapped (a mapped
file that shrinks kills the process, and its pages count as resident memory).
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np

from cqsa_stream.storage.errors import ArrayError

__all__ = ["CURES", "RawArray", "numpy_dtype"]

_ZARR_DTYPES = {"<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16"}
CURES = (
    "writers may leave out chunks that hold only the fill value: write them with write_empty_chunks=True "
    "(zarr-python), or read them as the fill value with --fill-missing"
)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of a name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@dataclass
class RawArray:
    """A grid of C-ordered files of ``file_shape``; ``pattern`` names them.

    Each has ``offset`` bytes of header and ``trailer`` bytes of checksum around its numbers.
    """

    source: str
    shape: tuple[int, ...]
    dtype: str
    file_shape: tuple[int, ...]
    pattern: str
    offset: int = 0
    trailer: int = 0
    bytes_read: int = field(default=0, compare=False)
    staging_bytes = 0
    encoding: ClassVar[Literal["raw"]] = "raw"

    @property
    def stored_chunk(self) -> tuple[int, ...]:
        return (1, 1, 1, self.shape[-1] if self.shape else 1)

    @classmethod
    def of_npy(cls, path: Path) -> "RawArray":
        """Open a .npy file. Raises ArrayError where it is none, is short, or is in Fortran order."""
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
                offset = file.tell()
        except (ValueError, OSError) as error:
            raise ArrayError(f"{path}: not a readable .npy file ({error})") from error
        if fortran or not dtype.isnative:
            raise ArrayError(f"{path}: Fortran order or foreign byte order; expected C order, little-endian")
        if dtype.kind == "V":
            raise ArrayError(f"{path}: dtype {dtype.str}; .npy has no name for bfloat16: store it as Zarr v3")
        return cls(str(path), shape, dtype.name, shape, str(path).replace("{", "{{").replace("}", "}}"), offset)

    @classmethod
    def of_zarr(cls, path: Path, metadata: dict[str, Any]) -> "RawArray | None":
        """Return the array where its chunks are plain files, perhaps with a crc32c, of whole rows; else None."""
        try:
            described = _describe_v3(metadata) if metadata.get("zarr_format") == 3 else _describe_v2(metadata)
            dtype, chunks, encoding, separator, trailer = described or ("", [], "", "", 0)
            shape = tuple(metadata["shape"])
        except (KeyError, TypeError, AttributeError, ValueError):
            return None  # TensorStore will say what is wrong with it
        if dtype not in _ZARR_DTYPES or len(chunks) != 4 or len(shape) != 4 or chunks[3] != shape[3]:
            return None
        if separator not in ("/", ".") or not all(type(n) is int and n > 0 for n in chunks):
            return None
        escaped = str(path).replace("{", "{{").replace("}", "}}")
        pattern = f"{escaped}/" + separator.join(([encoding] if encoding else []) + ["{}"] * 4)
        return cls(str(path), shape, _ZARR_DTYPES[dtype], tuple(chunks), pattern, 0, trailer)

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        for index, head in enumerate(heads):
            for span in _split(tokens, self.file_shape[2]):
                place = buffer[index, span.start - tokens.start : span.stop - tokens.start]
                self._read(batch, head, span, place)

    def _read(self, batch: int, head: int, tokens: range, place: np.ndarray) -> None:
        cell, inner = zip(*(divmod(i, n) for i, n in zip((batch, head, tokens.start), self.file_shape, strict=False)),
                          strict=True)  # fmt: skip
        row = (inner[0] * self.file_shape[1] + inner[1]) * self.file_shape[2] + inner[2]
        path = self.pattern.format(*cell, 0)
        view = place.reshape(-1).view(np.uint8).data
        position = self.offset + row * self.shape[3] * place.itemsize
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ArrayError(f"{path}: {_reason(error)}") from error
        try:
            while view:
                count = os.preadv(file, [view], position)
                if count == 0:
                    raise ArrayError(
                        f"{path}: ends {len(view)} bytes early, at byte {position}; write this chunk again"
                    )
                self.bytes_read += count
                view, position = view[count:], position + count
        except OSError as error:
            raise ArrayError(f"{path}: {error}") from error
        finally:
            os.close(file)

    def check(self) -> None:
        itemsize = numpy_dtype(self.dtype).itemsize
        expected = self.offset + math.prod(self.file_shape) * itemsize + self.trailer
        for path in self._files():
            try:
                found = os.stat(path).st_size  # noqa: PTH116 - a Path for each of a million chunks would take seconds
            except OSError as error:
                raise ArrayError(f"{path}: {_reason(error)}") from error
            if found < expected:
                raise ArrayError(f"{path}: {found} bytes; expected {expected}: truncated, write this chunk again")

    def _files(self) -> Iterator[str]:
        cells = product(*(range(-(-n // m)) for n, m in zip(self.shape, self.file_shape, strict=True)))
        return (self.pattern.format(*cell) for cell in cells)


def _split(tokens: range, length: int) -> Iterator[range]:
    start = tokens.start
    while start < tokens.stop:
        stop = min(tokens.stop, (start // length + 1) * length)
        yield range(start, stop)
        start = stop


def _reason(error: OSError) -> str:
    return f"a stored chunk is missing; {CURES}" if isinstance(error, FileNotFoundError) else str(error)


def _describe_v3(metadata: dict[str, Any]) -> tuple[str, list[int], str, str, int] | None:
    """Return (dtype, chunk shape, key prefix, key separator, bytes of checksum), or None where chunks are encoded."""
    first, *checksum = metadata["codecs"]
    if first["name"] != "bytes" or first.get("configuration", {}).get("endian", "little") != "little":
        return None
    if [codec["name"] for codec in checksum] not in ([], ["crc32c"]):
        return None
    if metadata["chunk_grid"]["name"] != "regular" or metadata.get("storage_transformers"):
        return None
    names = {"float32": "<f4", "float16": "<f2", "bfloat16": "bfloat16"}
    encoding = metadata["chunk_key_encoding"]
    default = encoding["name"] == "default"
    separator = encoding.get("configuration", {}).get("separator", "/" if default else ".")
    chunks = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    return names[metadata["data_type"]], chunks, "c" if default else "", separator, 4 if checksum else 0


def _describe_v2(metadata: dict[str, Any]) -> tuple[str, list[int], str, str, int] | None:
    if metadata["compressor"] or metadata.get("filters") or metadata["order"] != "C":
        return None
    return metadata["dtype"], metadata["chunks"], "", metadata.get("dimension_separator", "."), 0
