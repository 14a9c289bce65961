"""Reading ranges of files straight into memory, past the system's page cache, several at a time.

With O_DIRECT the device writes into the caller's memory, where file position and address agree: both are cut at pages,
and what hangs over at either end goes through a page beside it. Where they do not agree, pieces go through a bounce
buffer; so do units of which every byte is checked and only some are wanted. Files that are small, those that are in the
page cache already, and file systems that know no O_DIRECT, are read through the page cache; of large files, what was
read is dropped from it again.
"""

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
from crc32c import crc32c

from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.readers.files import CURE, StoredFile, all_cached, opened, through_cache
from cqsa_stream.storage.retrying import retrying

__all__ = ["BESIDES_BYTES", "PAGE", "PART_BYTES", "Unit", "Wanted", "in_parallel", "lent", "read_units"]

PAGE = 4096
_PIECE_BYTES = 4 << 20  # of one read straight into place: the longer, the fewer calls; a unit this long needs no second
_LEAST_PIECE_BYTES = 1 << 20
PART_BYTES = {True: 1 << 20, False: 256 << 10}  # of one read through a bounce buffer; without checksums they are rare
_SLACK_BYTES = 64 << 10  # by which a last piece may be longer: a short one would cost as much as a long one
BESIDES_BYTES = _SLACK_BYTES + 6 * PAGE  # what a thread holds besides a part and the places it fills
_MOST_IN_FLIGHT = 16
_SECTOR = 512  # addresses must be multiples of it for O_DIRECT
_CHECKSUM_BYTES = 4
_RESIDUE = 0x48674BC7  # the CRC-32C of anything with its own CRC-32C behind it


class Wanted(NamedTuple):
    """Some bytes of a unit, from ``start`` on, and where they go: a uint8 array."""

    start: int
    place: np.ndarray


class Piece(NamedTuple):
    """A range of a file that goes into a place; in parts of some length, where it goes through a bounce buffer."""

    file: StoredFile
    start: int
    place: np.ndarray
    part_bytes: int

    @property
    def length(self) -> int:
        return len(self.place)

    def fill(self, number: int, direct: bool) -> None:
        """Read it from an open file, which goes past the page cache where ``direct``."""
        if not direct:
            _fill(self, number, [self.place], self.start, at_least=self.length)
        elif (_address(self.place) - self.start) % _SECTOR:
            for done, part in _parts(self, number, self.part_bytes):
                self.place[done : done + len(part)] = part
        else:
            _fill_directly(self, number)


@dataclass(frozen=True)
class Unit:
    """A run of bytes in a file, and what is wanted of it, in ascending order.

    ``checked``: all of it is read, and checked against the CRC-32C behind it.
    """

    file: StoredFile
    start: int
    unit_bytes: int
    wanted: list[Wanted]
    checked: bool
    trailer: np.ndarray = field(default_factory=lambda: np.empty(_CHECKSUM_BYTES, np.uint8))

    @property
    def fetched_bytes(self) -> int:
        """Return the bytes to read, without the checksum."""
        return self.unit_bytes if self.checked else self._wanted_bytes

    @property
    def _wanted_bytes(self) -> int:
        return sum(len(part.place) for part in self.wanted)

    @property
    def length(self) -> int:
        """Return the bytes to read of what is checked, its checksum among them."""
        return self.unit_bytes + _CHECKSUM_BYTES

    @property
    def goes_whole(self) -> bool:
        """Whether all of it is checked and wanted, and is so long that several threads should read it."""
        return self.checked and self._wanted_bytes == self.unit_bytes > _PIECE_BYTES

    def jobs(self, most: int, part_bytes: int) -> "Iterator[Piece | Unit]":
        """Yield what to read, several at a time: pieces of about ``most`` bytes, or all of it in order."""
        if self.checked and not self.goes_whole:
            yield self
            return
        trailer = [Wanted(self.unit_bytes, self.trailer)] if self.checked else []
        for start, place in [*self.wanted, *trailer]:
            yield from cut(self.file, self.start + start, place, most, part_bytes)

    def fill(self, number: int, direct: bool) -> None:
        """Read and check all of it; copy what is wanted.

        Each part is checked before it is copied: what has just been read is still near the processor.
        """
        found = 0
        for done, part in _parts(self, number, PART_BYTES[True]):
            found = crc32c(part.data, found)
            for start, place in self.wanted:
                first, last = max(done, start), min(done + len(part), start + len(place))
                if first < last:
                    place[first - start : last - start] = part[first - done : last - done]
        self._refuse(found)

    def check(self) -> None:
        """Check what has been read whole, where it lies."""
        found = 0
        for place in [*(part.place for part in self.wanted), self.trailer]:
            found = crc32c(place.data, found)
        self._refuse(found)

    def _refuse(self, found: int) -> None:
        if found != _RESIDUE:
            raise ArrayError(f"{self.file.path}: a stored chunk fails its crc32c: damaged, {CURE}")


def cut(file: StoredFile, start: int, place: np.ndarray, most: int, part_bytes: int) -> Iterator[Piece]:
    """Cut what fills a place into pieces of about ``most`` bytes that begin at multiples of it in the file."""
    done = 0
    while done < len(place):
        count = most - (start + done) % most
        if len(place) - done - count < _SLACK_BYTES:
            count = len(place) - done
        yield Piece(file, start + done, place[done : done + count], part_bytes)
        done += count


def _private(size: int) -> np.ndarray:
    """Return whole pages that a forked child does not share."""
    pages = mmap.mmap(-1, -(-size // PAGE) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8)


class _Scratch(threading.local):
    """A thread's pages for what hangs over."""

    def __init__(self) -> None:
        self.pages = _private(2 * PAGE)


_scratch = _Scratch()
_bounces: list[np.ndarray] = []


@contextmanager
def lent(spare: list[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Lend pages, at least so many bytes, that nobody uses: there are never more in all than were needed at a time."""
    try:
        found = spare.pop()
    except IndexError:
        found = _private(size)
    if len(found) < size:
        found = _private(size)
    try:
        yield found
    finally:
        spare.append(found)


_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def read_units(units: Sequence[Unit], in_flight: int, part_bytes: int) -> None:
    """Read what is wanted of units, ``in_flight`` pieces at a time, and check those that are to be. Raises ArrayError.

    Each piece takes up to ``part_bytes`` and ``BESIDES_BYTES`` besides its place, one of ``PART_BYTES``.
    """
    wanted = sum(len(part.place) for unit in units for part in unit.wanted)
    each = -(-wanted // (in_flight * PAGE)) * PAGE  # pieces are long, but so many that all readers have work
    most = min(_PIECE_BYTES, max(_LEAST_PIECE_BYTES, each))
    in_parallel(read, [job for unit in units for job in unit.jobs(most, part_bytes)], in_flight)
    in_parallel(Unit.check, [unit for unit in units if unit.goes_whole], in_flight)


_Item = TypeVar("_Item")


def in_parallel(work: Callable[[_Item], None], items: Sequence[_Item], most: int) -> None:
    """Do the work for each item, for ``most`` of them at a time. After a failure no other is begun; it is raised.

    Whatever happens, nothing is done after the call.
    """
    turns = iter(items)  # taking the next of it is atomic
    failed = threading.Event()

    def take_turns() -> None:
        try:
            for item in turns:
                if failed.is_set():
                    return
                work(item)
        except BaseException:
            failed.set()
            raise

    helpers = min(most, _MOST_IN_FLIGHT, len(items)) - 1
    futures = [_executor().submit(take_turns) for _ in range(helpers)]
    try:
        take_turns()
    finally:
        begun = [future for future in futures if not future.cancel()]  # all have something else to do
        wait(begun)
    for future in begun:
        future.result()


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(_MOST_IN_FLIGHT - 1, "cqsa-read")
    return _pool


@retrying
def read(wanted: Piece | Unit, *, direct: bool = True) -> None:
    """Read what is wanted, past the page cache where that is possible. Raises ArrayError."""
    try:
        with opened(wanted.file, direct=direct) as (number, past_cache):
            keep = wanted.file.cached
            if past_cache and all_cached(number, wanted.start, wanted.length):
                through_cache(number)
                past_cache, keep = False, True
            wanted.fill(number, past_cache)
            if not past_cache and not keep:
                with suppress(OSError):
                    os.posix_fadvise(number, wanted.start, wanted.length, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        if direct and error.errno == errno.EINVAL:  # opened with O_DIRECT, but read only in larger units
            return read(wanted, direct=False)
        raise ArrayError(f"{wanted.file.path}: reading failed at byte {wanted.start}: {error.strerror}") from error


def _fill_directly(piece: Piece, number: int) -> None:
    """Read into place what fills whole pages there, and what hangs over into pages beside it: one call."""
    over = piece.start % PAGE
    head = min(piece.length, PAGE - over) if over else 0
    whole = (piece.length - head) // PAGE * PAGE
    before = PAGE if over else 0
    after = max(0, -(-(over + piece.length - before - whole) // PAGE) * PAGE)
    views = [_scratch.pages[:before], piece.place[head : head + whole], _scratch.pages[PAGE : PAGE + after]]
    _fill(piece, number, [view for view in views if len(view)], piece.start - over, at_least=over + piece.length)
    piece.place[:head] = views[0][over : over + head]
    rest = piece.length - head - whole
    piece.place[head + whole :] = views[2][:rest]


def _parts(wanted: Piece | Unit, number: int, most: int) -> Iterator[tuple[int, np.ndarray]]:
    """Read a range in order through a bounce buffer, in whole pages; yield (position in the range, bytes).

    Of a large buffer, only what is used is there.
    """
    done = 0
    with lent(_bounces, PART_BYTES[True] + _SLACK_BYTES + 3 * PAGE) as bounce:
        while done < wanted.length:
            left = wanted.length - done
            count = left if left <= most + _SLACK_BYTES else most
            over = (wanted.start + done) % PAGE
            views = [bounce[: -(-(over + count) // PAGE) * PAGE]]
            _fill(wanted, number, views, wanted.start + done - over, at_least=over + count)
            yield done, bounce[over : over + count]
            done += count


def _fill(wanted: Piece | Unit, number: int, views: list[np.ndarray], start: int, at_least: int) -> None:
    """Fill the views from a position on; at the file's end, at least so many bytes."""
    done = 0
    while done < at_least:
        count = os.preadv(number, list(_left(views, done)), start + done)
        if count == 0:
            raise ArrayError(
                f"{wanted.file.path}: ends {at_least - done} bytes early, at byte {start + done}: it shrank, {CURE}"
            )
        done += count


def _left(views: list[np.ndarray], done: int) -> Iterator[memoryview]:
    for view in views:
        if done < len(view):
            yield view[done:].data
        done = max(0, done - len(view))


def _address(values: np.ndarray) -> int:
    address: int = values.__array_interface__["data"][0]
    return address
