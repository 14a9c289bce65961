"""Arrays whose numbers lie in files as they are: .npy, safetensors, plain files, and Zarr without compression.

Such an array is a grid of *units*: C-ordered blocks of numbers, each in one run of bytes. A unit is a file behind its
header (``WholeFiles``) or an inner chunk of a shard (``zarr_files.Shards``). Any range of a unit can be read straight
into the caller's buffer; a unit that carries a checksum is read and checked whole, the rest of it going nowhere.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from cqsa_stream.storage.checksum import appended
from cqsa_stream.storage.dtypes import FLOATS, numpy_dtype
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.ranges import (
    BOUNCE_BYTES,
    PAGE,
    PIECE_BYTES,
    STAGING_BYTES,
    Piece,
    StoredFile,
    cut,
    read_pieces,
)

__all__ = ["CACHED_BYTES", "CURES", "RawArray", "UnitFiles", "WholeFiles"]

CACHED_BYTES = 8 << 20  # arrays up to this size are read through the page cache: they cannot fill it
_CHECKSUM_BYTES = 4
_LEAST_PIECE_BYTES = 1 << 20
_MOST_HEADER_BYTES = 100 << 20
_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}  # fmt: skip
CURES = (
    "writers may leave out chunks that hold only the fill value: write them with write_empty_chunks=True "
    "(zarr-python), or read them as the fill value with --fill-missing"
)


class UnitFiles(Protocol):
    """Where units are: of a shape ``unit``, the number of axes that of the array."""

    unit: tuple[int, ...]

    def locate(self, cell: tuple[int, ...]) -> tuple[StoredFile, int]:
        """Return the file of the unit at a place in the grid of units, and the position of its first byte there."""

    def check(self, cells: Iterator[tuple[int, ...]]) -> None:
        """Raise ArrayError where one of these units is missing or short."""


@dataclass(frozen=True)
class WholeFiles:
    """A file for each unit, named by ``pattern``, its numbers behind ``offset`` bytes of header."""

    unit: tuple[int, ...]
    pattern: str
    size: int
    offset: int = 0
    open_ended: bool = False
    cached: bool = False

    @classmethod
    def one(cls, path: Path, shape: tuple[int, ...], dtype: str, offset: int) -> "WholeFiles":
        """One file with the whole array, and perhaps others, in it."""
        length = math.prod(shape) * numpy_dtype(dtype).itemsize
        pattern = str(path).replace("{", "{{").replace("}", "}}")
        return cls(shape, pattern, offset + length, offset, open_ended=True, cached=length <= CACHED_BYTES)

    def locate(self, cell: tuple[int, ...]) -> tuple[StoredFile, int]:
        return StoredFile(self.pattern.format(*cell), self.size, self.open_ended, self.cached), self.offset

    def check(self, cells: Iterator[tuple[int, ...]]) -> None:
        for path in (self.pattern.format(*cell) for cell in cells):
            try:
                found = os.stat(path).st_size  # noqa: PTH116 - a Path for each of a million chunks would take seconds
            except FileNotFoundError as error:
                raise ArrayError(f"{path}: a stored chunk is missing; {CURES}") from error
            except OSError as error:
                raise ArrayError(f"{path}: {error.strerror}") from error
            StoredFile(path, self.size, self.open_ended).refuse_size(found)


class _Wanted(NamedTuple):
    """Some bytes of a unit and where they go."""

    start: int
    place: np.ndarray


@dataclass
class RawArray:
    """A grid of units of whole rows. ``checked``: a CRC-32C stands behind each."""

    source: str
    shape: tuple[int, ...]
    dtype: str
    files: UnitFiles
    checked: bool = False
    in_flight: int = 4
    bytes_read: int = field(default=0, compare=False)
    staging_bytes: ClassVar[int] = STAGING_BYTES

    @property
    def stored_chunk(self) -> tuple[int, ...]:
        return self.files.unit if self.checked else (1, 1, 1, self.shape[-1] if self.shape else 1)

    @property
    def encoding(self) -> Literal["raw", "checked"]:
        return "checked" if self.checked else "raw"

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
        if dtype.name not in FLOATS:
            raise ArrayError(f"{path}: dtype {dtype.name}; expected one of {', '.join(FLOATS)}")
        return cls(str(path), shape, dtype.name, WholeFiles.one(path, shape, dtype.name, offset))

    @classmethod
    def of_safetensors(cls, path: Path, key: str) -> "RawArray":
        """Open one tensor of a .safetensors file. Raises ArrayError, naming the tensors that there are."""
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > min(_MOST_HEADER_BYTES, path.stat().st_size - 8):
                    raise ValueError(f"a header of {length} bytes, longer than the file or than it may be")
                header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            if key not in tensors:
                found = ", ".join(sorted(tensors)[:8])
                raise ArrayError(f"{path}#{key}: no tensor of this name; name one of its {len(tensors)}: {found}")
            entry = tensors[key]
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            dtype = _SAFETENSORS.get(entry["dtype"])
            if dtype is None:
                raise ArrayError(f"{path}#{key}: dtype {entry['dtype']}; expected one of {', '.join(_SAFETENSORS)}")
            lengths = (*shape, start, stop)
            if not all(type(n) is int and n >= 0 for n in lengths) or any(n > 2**62 for n in lengths):
                raise ValueError(f"shape {shape}, data_offsets {start}, {stop}")
            if stop - start != math.prod(shape) * numpy_dtype(dtype).itemsize:
                raise ValueError(f"{stop - start} bytes for shape {shape} of {dtype}")
        except (KeyError, TypeError, AttributeError, ValueError, OSError, RecursionError) as error:
            if isinstance(error, ArrayError):
                raise
            raise ArrayError(f"{path}: not a readable .safetensors file ({error})") from error
        return cls(f"{path}#{key}", shape, dtype, WholeFiles.one(path, shape, dtype, 8 + length + start))

    @classmethod
    def of_file(cls, path: Path, description: str) -> "RawArray":
        """Open a plain file of numbers, described as ``dtype:1,8,4096,64``. Raises ArrayError."""
        dtype, colon, lengths = description.partition(":")
        parts = lengths.split(",")
        if dtype not in FLOATS or not colon or not all(n.isdecimal() and len(n) < 19 for n in parts):
            raise ArrayError(
                f"{path}#{description}: a plain file needs a dtype and a shape, as {path.name}#bfloat16:1,8,4096,64"
            )
        shape = tuple(map(int, parts))
        return cls(f"{path}#{description}", shape, dtype, WholeFiles.one(path, shape, dtype, 0))

    @classmethod
    def of_memmap(cls, values: np.memmap) -> "RawArray | None":
        """Return the file behind a memory map, or a part of one, that is C-ordered and cannot differ from it."""
        base = values
        while isinstance(base.base, np.memmap):
            base = base.base
        plain = values.flags.c_contiguous and values.dtype.isnative and values.dtype.name in FLOATS
        if values.filename is None or values.mode == "c" or not plain:
            return None
        path, offset = Path(str(values.filename)), base.offset + values.ctypes.data - base.ctypes.data
        if path.suffix == ".npy":
            whole = cls.of_npy(path)
            same = (whole.shape, whole.dtype, whole.files.locate(())[1]) == (values.shape, values.dtype.name, offset)
            return whole if same else None
        if offset:
            return None  # it has no name by which a resumed run could open it
        return cls.of_file(path, f"{values.dtype.name}:{','.join(map(str, values.shape))}")

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        """Return how far into a page a buffer should begin, so that its numbers can be read straight into it."""
        unit = self.files.unit
        cell = (batch // unit[0], heads.start // unit[1], tokens.start // unit[2], 0)
        position = self.files.locate(cell)[1] + self._position(batch, heads.start, tokens.start)
        over = position % PAGE
        return over if over % 64 == 0 else 0  # results may depend on how numbers are aligned: keep what kernels like

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        pieces: list[Piece] = []
        length = _piece_bytes(buffer.nbytes, self.in_flight)
        units: list[tuple[int, int, np.ndarray]] = []  # (first piece, last piece + 1, stored checksum)
        for file, start, wanted in self._units(batch, heads, tokens, buffer):
            first = len(pieces)
            if self.checked:
                trailer = np.empty(_CHECKSUM_BYTES, np.uint8)
                pieces += _checked_pieces(file, start, self._unit_bytes, wanted, trailer, length)
                units.append((first, len(pieces), trailer))
            else:
                for part in wanted:
                    pieces += cut(file, start + part.start, len(part.place), part.place, length)
        checksums = read_pieces(pieces, self.in_flight)
        self.bytes_read += sum(piece.length for piece in pieces)
        for first, stop, trailer in units:
            found = 0
            for piece, checksum in zip(pieces[first:stop], checksums[first:stop], strict=True):
                found = appended(found, checksum, piece.length)
            if found != int.from_bytes(trailer.tobytes(), "little"):
                raise ArrayError(
                    f"{pieces[first].file.path}: a stored chunk fails its crc32c: damaged, write this chunk again"
                )

    def check(self) -> None:
        cells = product(*(range(-(-n // m)) for n, m in zip(self.shape, self.files.unit, strict=True)))
        self.files.check(cells)

    @property
    def _row_bytes(self) -> int:
        return self.shape[3] * numpy_dtype(self.dtype).itemsize

    @property
    def _unit_bytes(self) -> int:
        return math.prod(self.files.unit) * numpy_dtype(self.dtype).itemsize

    def _position(self, batch: int, head: int, token: int) -> int:
        """Return the place of a row in its unit, in bytes."""
        unit = self.files.unit
        return (((batch % unit[0]) * unit[1] + head % unit[1]) * unit[2] + token % unit[2]) * self._row_bytes

    def _units(
        self, batch: int, heads: range, tokens: range, buffer: np.ndarray
    ) -> Iterator[tuple[StoredFile, int, list[_Wanted]]]:
        """Yield (file, position of the unit, what is wanted of it in ascending order) for each unit that is met."""
        unit = self.files.unit
        for some, span in product(_split(heads, unit[1]), _split(tokens, unit[2])):
            wanted = []
            for head in some:
                rows = buffer[head - heads.start, span.start - tokens.start : span.stop - tokens.start]
                wanted.append(_Wanted(self._position(batch, head, span.start), rows.reshape(-1).view(np.uint8)))
            file, start = self.files.locate((batch // unit[0], some.start // unit[1], span.start // unit[2], 0))
            yield file, start, wanted


def _piece_bytes(total: int, in_flight: int) -> int:
    """Return the length of pieces: long, but so many that all readers have work."""
    each = -(-total // (in_flight * PAGE)) * PAGE
    return min(PIECE_BYTES, max(_LEAST_PIECE_BYTES, each))


def _checked_pieces(
    file: StoredFile, start: int, unit_bytes: int, wanted: list[_Wanted], trailer: np.ndarray, length: int
) -> list[Piece]:
    """Return the pieces of a whole unit, what is not wanted of it going nowhere; the last one takes the checksum."""
    pieces: list[Piece] = []
    done = 0
    for part in [*wanted, _Wanted(unit_bytes, np.empty(0, np.uint8))]:
        for begin, count, place in ((done, part.start - done, None), (part.start, len(part.place), part.place)):
            most = BOUNCE_BYTES if place is None else length
            pieces += cut(file, start + begin, count, place, most, checked=True)
        done = part.start + len(part.place)
    last = pieces[-1]
    return [*pieces[:-1], Piece(last.file, last.start, last.length, last.place, True, trailer)]


def _split(tokens: range, length: int) -> Iterator[range]:
    start = tokens.start
    while start < tokens.stop:
        stop = min(tokens.stop, (start // length + 1) * length)
        yield range(start, stop)
        start = stop
