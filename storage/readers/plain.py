"""Arrays whose numbers lie in files as they are: Zarr without compression, .npy, safetensors, plain files.

Such an array is a grid of *units*: C-ordered blocks of numbers, each in one run of bytes. A unit is a file behind its
header (``WholeFiles``) or an inner chunk of a shard (``zarr_plain.Shards``). Any range of a unit can be read straight
into the caller's buffer. A unit that carries a CRC-32C is read whole, and checked, the first time that it is met in a
session; from then on its ranges are read as they are.
"""

import math
import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from cqsa_stream.storage.dtypes import numpy_dtype
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.readers.chunks import split
from cqsa_stream.storage.readers.files import StoredFile, all_cached, opened
from cqsa_stream.storage.readers.ranges import BESIDES_BYTES, PAGE, PART_BYTES, Unit, Wanted, read_units

__all__ = ["CACHED_BYTES", "CURES", "RawArray", "UnitFiles", "WholeFiles", "lazy_product"]

_LOOKS = 32  # at rows, to tell what of an array is in the page cache
CACHED_BYTES = 8 << 20  # arrays up to this size are read through the page cache: they cannot fill it
CURES = (
    "writers may leave out chunks that hold only the fill value: write them with write_empty_chunks=True "
    "(zarr-python), or read them as the fill value with fill_missing=True"
)


class UnitFiles(Protocol):
    """Where units are: of a shape ``unit``, the number of axes that of the array."""

    @property
    def unit(self) -> tuple[int, ...]: ...

    def kept_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the memory of what is remembered of an array's files."""

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

    def kept_bytes(self, shape: tuple[int, ...]) -> int:
        return 0

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


@dataclass
class RawArray:
    """A grid of units of whole rows. ``checked``: a CRC-32C stands behind each."""

    source: str
    shape: tuple[int, ...]
    dtype: str
    files: UnitFiles
    checked: bool = False
    in_flight: int = 4
    bytes_read: int = 0
    _good: np.ndarray = field(default_factory=lambda: np.zeros(0, bool), init=False)  # units found good in this session
    _checking: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def staging_bytes(self) -> int:
        return PART_BYTES[self.checked] + BESIDES_BYTES

    @property
    def kept_bytes(self) -> int:
        """Return the memory of a flag for each unit that is checked, and of what is remembered of files."""
        return (math.prod(self._cells) if self.checked else 0) + self.files.kept_bytes(self.shape)

    @property
    def stored_chunk(self) -> tuple[int, ...]:
        return self.files.unit if self.checked else (1, 1, 1, self.shape[-1] if self.shape else 1)

    @property
    def encoding(self) -> Literal["raw", "checked"]:
        return "checked" if self.checked else "raw"

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        """Return how far into a page a buffer should begin, so that its numbers can be read straight into it."""
        unit = self.files.unit
        cell = (batch // unit[0], heads.start // unit[1], tokens.start // unit[2], 0)
        position = self.files.locate(cell)[1] + self._position(batch, heads.start, tokens.start)
        over = position % PAGE
        return over if over % 64 == 0 else 0  # results may depend on how numbers are aligned: keep what kernels like

    def begin(self, in_flight: int) -> None:
        self.in_flight = in_flight
        self._good = np.zeros(0, bool)

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        with self._checking if self.checked else nullcontext():  # two reads of one unit must not both be the first
            new, units = [], []
            for cell, wanted in self._wanted(batch, heads, tokens, buffer):
                checked = self.checked and not self._is_good(cell)
                new += [cell] * checked
                units.append(Unit(*self.files.locate(cell), self._unit_bytes, wanted, checked))
            read_units(units, self.in_flight, PART_BYTES[self.checked])
            for cell in new:
                self._good[cell] = True
        fetched = sum(unit.fetched_bytes for unit in units)
        self.bytes_read += fetched  # nothing is called in between: no figure is lost

    def _is_good(self, cell: tuple[int, ...]) -> bool:
        if not self._good.size:  # not before: metadata may claim more units than memory holds flags
            self._good = np.zeros(self._cells, bool)
        return bool(self._good[cell])

    def cached_share(self) -> float:
        found, (batches, heads, tokens, _) = 0, self.shape
        for part in range(_LOOKS if tokens * heads * batches else 0):
            row = (2 * part + 1) * batches * heads * tokens // (2 * _LOOKS)
            batch, head, token = row // tokens // heads, row // tokens % heads, row % tokens
            unit = self.files.unit
            with suppress(ArrayError):
                file, start = self.files.locate((batch // unit[0], head // unit[1], token // unit[2], 0))
                with opened(file, direct=False) as (number, _):
                    found += all_cached(number, start + self._position(batch, head, token), self._row_bytes)
        return found / _LOOKS

    def check(self) -> None:
        self.files.check(lazy_product([range(n) for n in self._cells]))

    @property
    def _cells(self) -> tuple[int, ...]:
        return tuple(-(-n // m) for n, m in zip(self.shape, self.files.unit, strict=True))

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

    def _wanted(
        self, batch: int, heads: range, tokens: range, buffer: np.ndarray
    ) -> Iterator[tuple[tuple[int, ...], list[Wanted]]]:
        """Yield (cell in the grid of units, what is wanted of it in ascending order) for each unit that is met."""
        unit = self.files.unit
        for some, span in product(split(heads, unit[1]), split(tokens, unit[2])):
            wanted = []
            for head in some:
                rows = buffer[head - heads.start, span.start - tokens.start : span.stop - tokens.start]
                wanted.append(Wanted(self._position(batch, head, span.start), rows.reshape(-1).view(np.uint8)))
            yield (batch // unit[0], some.start // unit[1], span.start // unit[2], 0), wanted


def lazy_product(axes: list[range]) -> Iterator[tuple[int, ...]]:
    """Yield the places of a grid in order, listing none: metadata may claim more of them than memory holds."""
    if not axes:
        yield ()
        return
    for first in axes[0]:
        for rest in lazy_product(axes[1:]):
            yield first, *rest
