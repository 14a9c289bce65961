"""Reading parts of units that carry a CRC-32C, and still checking every byte.

A unit's checksum can only be checked by reading it whole. So the first read of a unit takes all of it, what was not
asked for going nowhere, and remembers the checksums of its *leaves*, pieces of 512 KiB. Later reads take just the
leaves that they need, and compare these. The memory of it is bounded: where the array is large, leaves are longer.
"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.readers.checksum import appended
from cqsa_stream.storage.readers.ranges import BOUNCE_BYTES, Piece, StoredFile, cut

__all__ = ["MOST_KEPT_BYTES", "Checks", "UnitRead", "Wanted"]

MOST_KEPT_BYTES = 1 << 20  # of an array's checksums
_LEAF_BYTES = 512 << 10
_CHECKSUM_BYTES = 4


class Wanted(NamedTuple):
    """Some bytes of a unit and where they go."""

    start: int
    place: np.ndarray


@dataclass(frozen=True)
class UnitRead:
    """The pieces that read of a unit, from ``start`` on; ``trailer``: its stored checksum, where it is read whole."""

    file: StoredFile
    cell: tuple[int, ...]
    start: int
    pieces: list[Piece]
    trailer: np.ndarray | None


class Checks:
    """What is known of the units of one array: which were found good, and the checksums of their leaves.

    ``leaf_bytes``: 0 where nothing is kept, and every read takes whole units: where a unit is no longer than a leaf or
    holds several heads, or there are too many units.
    """

    def __init__(self, cells: tuple[int, ...], unit_bytes: int, *, one_head: bool) -> None:
        self.lock = threading.Lock()  # two reads of one unit must not both be the first
        units, leaf = math.prod(cells), _LEAF_BYTES
        while leaf < unit_bytes and 4 * units * -(-unit_bytes // leaf) > MOST_KEPT_BYTES:
            leaf *= 2
        self.leaf_bytes = leaf if one_head and leaf < unit_bytes else 0
        self._unit_bytes = unit_bytes
        kept = cells if self.leaf_bytes else (0,)
        self._sums = np.zeros((*kept, -(-unit_bytes // leaf)), np.uint32)
        self._good = np.zeros(kept, bool)

    @property
    def kept_bytes(self) -> int:
        return self._sums.nbytes + self._good.nbytes

    def plan(self, file: StoredFile, start: int, cell: tuple[int, ...], wanted: list[Wanted], length: int) -> UnitRead:
        """Return what to read to fill what is wanted, in ascending order, of the unit at ``start`` in the file."""
        if self.leaf_bytes and self._good[cell]:
            [part] = wanted
            leaf = self.leaf_bytes
            first = part.start // leaf * leaf
            stop = min(-(-(part.start + len(part.place)) // leaf) * leaf, self._unit_bytes)
            return UnitRead(file, cell, first, self._pieces(file, start, first, stop, wanted, length), None)
        pieces = self._pieces(file, start, 0, self._unit_bytes, wanted, length)
        trailer = np.empty(_CHECKSUM_BYTES, np.uint8)
        return UnitRead(file, cell, 0, [*pieces[:-1], replace(pieces[-1], trailer=trailer)], trailer)

    def _pieces(
        self, file: StoredFile, origin: int, first: int, stop: int, wanted: list[Wanted], length: int
    ) -> list[Piece]:
        """Cut a range of the unit into pieces; what is not wanted of it goes nowhere."""
        pieces: list[Piece] = []
        done = first
        checked = range(origin, origin + self._unit_bytes, self.leaf_bytes or self._unit_bytes)
        for part in [*wanted, Wanted(stop, np.empty(0, np.uint8))]:
            pieces += cut(file, origin + done, part.start - done, None, BOUNCE_BYTES, checked)
            pieces += cut(file, origin + part.start, len(part.place), part.place, length, checked)
            done = part.start + len(part.place)
        return pieces

    def confirm(self, read: UnitRead, segments: list[list[tuple[int, int]]]) -> None:
        """Compare what was read, given as (length, checksum) of the parts of each piece. Raises ArrayError."""
        leaf = self.leaf_bytes or self._unit_bytes
        sums = list(_leaf_sums([segment for piece in segments for segment in piece], read.start, leaf))
        if read.trailer is None:
            first = read.start // leaf
            if self._sums[read.cell][first : first + len(sums)].tolist() != [checksum for _, checksum in sums]:
                raise ArrayError(
                    f"{read.file.path}: a stored chunk is not what it was when it was checked first: it was changed or "
                    "is damaged, write this chunk again"
                )
            return
        whole = 0
        for count, checksum in sums:
            whole = appended(whole, checksum, count)
        if whole != int.from_bytes(read.trailer.tobytes(), "little"):
            raise ArrayError(f"{read.file.path}: a stored chunk fails its crc32c: damaged, write this chunk again")
        if self.leaf_bytes:
            self._sums[read.cell] = [checksum for _, checksum in sums]
            self._good[read.cell] = True


def _leaf_sums(segments: list[tuple[int, int]], position: int, leaf: int) -> Iterator[tuple[int, int]]:
    """Yield (length, checksum) of each leaf, from those of segments that begin where a leaf does."""
    length = found = 0
    for count, checksum in segments:
        found = appended(found, checksum, count) if length else checksum
        length += count
        if (position + length) % leaf == 0:
            yield length, found
            position, length, found = position + length, 0, 0
    if length:
        yield length, found
