"""Reading ranges of files straight into memory, past the system's page cache, several at a time.

With O_DIRECT the device writes into the caller's memory, where file position and address agree: both are cut at pages,
and what hangs over at either end goes through a page beside it. Where they do not agree, pieces go through a bounce
buffer. Files that are small, and file systems that know no O_DIRECT, are read through the page cache; of large files,
what was read is dropped from it again.
"""

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
from crc32c import crc32c

from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.readers.cached import all_cached, through_cache
from cqsa_stream.storage.retrying import retrying

__all__ = [
    "BOUNCE_BYTES",
    "CHECKED_STAGING_BYTES",
    "MOST_IN_FLIGHT",
    "PAGE",
    "PIECE_BYTES",
    "STAGING_BYTES",
    "Piece",
    "StoredFile",
    "cut",
    "opened",
    "read_pieces",
]

PAGE = 4096
PIECE_BYTES = 4 << 20  # of one read straight into place: the longer, the fewer calls
BOUNCE_BYTES = 1 << 20  # of one read through a bounce buffer, of what has a checksum; the rest is rarely read so
_SMALL_BOUNCE_BYTES = 256 << 10
_SLACK_BYTES = 64 << 10  # by which a last piece may be longer: a short one would cost as much as a long one
MOST_IN_FLIGHT = 16
STAGING_BYTES = _SMALL_BOUNCE_BYTES + _SLACK_BYTES + 6 * PAGE  # what a thread holds besides the places it fills
CHECKED_STAGING_BYTES = BOUNCE_BYTES + _SLACK_BYTES + 6 * PAGE
_SECTOR = 512  # addresses must be multiples of it for O_DIRECT
_CURE = "write this chunk again"


@dataclass(frozen=True)
class StoredFile:
    """A file that should have ``size`` bytes, or at least so many where there may be more (``open_ended``).

    ``cached``: it is small, and may stay in the page cache.
    """

    path: str
    size: int
    open_ended: bool = False
    cached: bool = False

    def refuse_size(self, found: int) -> None:
        """Raise ArrayError where the file has another length than it should."""
        if found < self.size:
            raise ArrayError(f"{self.path}: {found} bytes; expected {self.size}: truncated, {_CURE}")
        if found > self.size and not self.open_ended:
            raise ArrayError(f"{self.path}: {found} bytes; expected {self.size}: not what was written, {_CURE}")


@dataclass(frozen=True)
class Piece:
    """A range of a file, ``[start, start + length)``, and where it goes: a uint8 array, or nowhere (only checked).

    ``trailer`` takes the bytes that follow. ``checked``: the positions in the file between which CRC-32Cs are wanted.
    """

    file: StoredFile
    start: int
    length: int
    place: np.ndarray | None
    checked: range | None = None
    trailer: np.ndarray | None = None


def cut(
    file: StoredFile, start: int, length: int, place: np.ndarray | None, most: int, checked: range | None = None
) -> Iterator[Piece]:
    """Cut a range into pieces of about ``most`` bytes that begin at multiples of it in the file."""
    done = 0
    while done < length:
        count = most - (start + done) % most
        if length - done - count < _SLACK_BYTES:
            count = length - done
        yield Piece(file, start + done, count, None if place is None else place[done : done + count], checked)
        done += count


def _private(size: int) -> np.ndarray:
    """Return whole pages that a forked child does not share."""
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


class _Scratch(threading.local):
    """A thread's pages for what hangs over."""

    def __init__(self) -> None:
        self.pages = _private(3 * PAGE)


_scratch = _Scratch()
_bounces: list[np.ndarray] = []  # bounce buffers that nobody uses: never more in all than were needed at a time


@contextmanager
def _bounce() -> Iterator[np.ndarray]:
    try:
        buffer = _bounces.pop()
    except IndexError:
        buffer = _private(BOUNCE_BYTES + _SLACK_BYTES + 3 * PAGE)
    try:
        yield buffer
    finally:
        _bounces.append(buffer)


_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def read_pieces(pieces: Sequence[Piece], in_flight: int) -> list[list[tuple[int, int]]]:
    """Read pieces, ``in_flight`` at a time; return (length, checksum) of each part of each whose checksum is wanted.

    Raises ArrayError; whatever happens, no place is written after the call.
    """
    found: list[list[tuple[int, int]]] = [[] for _ in pieces]
    turns = iter(range(len(pieces)))  # taking the next of it is atomic
    failed = threading.Event()

    def work() -> None:
        try:
            for index in turns:
                if failed.is_set():
                    return
                found[index] = _read(pieces[index])
        except BaseException:
            failed.set()
            raise

    helpers = min(in_flight, MOST_IN_FLIGHT, len(pieces)) - 1
    futures = [_executor().submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        wait(futures)
    for future in futures:
        future.result()
    return found


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(MOST_IN_FLIGHT - 1, "cqsa-read")
    return _pool


@contextmanager
def opened(file: StoredFile, *, direct: bool = True) -> Iterator[tuple[int, bool]]:
    """Open a file of the size it should have; yield (descriptor, whether it goes past the page cache)."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    direct = direct and not file.cached
    try:
        try:
            number = os.open(file.path, flags | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            number, direct = os.open(file.path, flags), False
    except OSError as error:
        raise ArrayError(f"{file.path}: {_reason(error)}") from error
    try:
        file.refuse_size(os.fstat(number).st_size)
        yield number, direct
    finally:
        os.close(number)


def _reason(error: OSError) -> str:
    return f"a stored chunk is missing, {_CURE}" if isinstance(error, FileNotFoundError) else str(error.strerror)


@retrying
def _read(piece: Piece, *, direct: bool = True) -> list[tuple[int, int]]:
    try:
        with opened(piece.file, direct=direct) as (number, past_cache):
            if past_cache and all_cached(number, piece.start, piece.length):
                through_cache(number)
                return _read_opened(piece, number, direct=False, keep=True)
            return _read_opened(piece, number, direct=past_cache)
    except OSError as error:
        if direct and error.errno == errno.EINVAL:  # opened with O_DIRECT, but read only in larger units
            return _read(piece, direct=False)
        raise ArrayError(f"{piece.file.path}: reading failed at byte {piece.start}: {error.strerror}") from error


def _read_opened(piece: Piece, number: int, *, direct: bool, keep: bool = False) -> list[tuple[int, int]]:
    place = piece.place
    if place is None or (direct and (_address(place) - piece.start) % _SECTOR):
        with _bounce() as bounce:
            if direct:
                return _fill_by_bounce(number, piece, bounce)
            return _read_opened(replace(piece, place=bounce[: piece.length]), number, direct=False, keep=keep)
    if direct:
        _fill_directly(number, piece, place)
    else:
        _fill(number, piece, [place, *_trailer(piece)], piece.start)
        if not piece.file.cached and not keep:
            with suppress(OSError):
                os.posix_fadvise(number, piece.start, piece.length, os.POSIX_FADV_DONTNEED)
    return _checksums(piece, piece.start, place)


def _checksums(piece: Piece, start: int, values: np.ndarray) -> list[tuple[int, int]]:
    """Return (length, checksum) of what lies between the positions named by the piece; values begin at ``start``."""
    if piece.checked is None:
        return []
    found, done, unit = [], 0, piece.checked.step
    while done < len(values):
        count = min(len(values) - done, unit - (start + done - piece.checked.start) % unit)
        found.append((count, crc32c(values[done : done + count].data)))
        done += count
    return found


def _fill_directly(number: int, piece: Piece, place: np.ndarray) -> None:
    """Read into place what fills whole pages there, and what hangs over into pages beside it: one call."""
    over = piece.start % PAGE
    head = min(piece.length, PAGE - over) if over else 0
    whole = (piece.length - head) // PAGE * PAGE
    wanted = over + piece.length + sum(map(len, _trailer(piece)))
    before = PAGE if over else 0
    after = max(0, -(-(wanted - before - whole) // PAGE) * PAGE)
    views = [_scratch.pages[:before], place[head : head + whole], _scratch.pages[PAGE : PAGE + after]]
    _fill(number, piece, [view for view in views if len(view)], piece.start - over, at_least=wanted)
    _copy_out(views, over, place[:head])
    _copy_out(views, over + head + whole, place[head + whole :])
    for trailer in _trailer(piece):
        _copy_out(views, over + piece.length, trailer)


def _fill_by_bounce(number: int, piece: Piece, bounce: np.ndarray) -> list[tuple[int, int]]:
    """Read whole pages into the bounce buffer, part by part, and copy; return the checksums that are wanted.

    Each part is checked before it is copied: what has just been read is still near the processor.
    """
    found, done = [], 0
    most = BOUNCE_BYTES if piece.checked else _SMALL_BOUNCE_BYTES  # of a large buffer, only what is used is there
    while done < piece.length:
        left = piece.length - done
        length = left if left <= most + _SLACK_BYTES else most
        trailer = _trailer(piece) if length == left else []
        over = (piece.start + done) % PAGE
        wanted = over + length + sum(map(len, trailer))
        views = [bounce[: -(-wanted // PAGE) * PAGE]]
        _fill(number, piece, views, piece.start + done - over, at_least=wanted)
        part = views[0][over : over + length]
        found += _checksums(piece, piece.start + done, part)
        if piece.place is not None:
            np.copyto(piece.place[done : done + length], part)
        for target in trailer:
            _copy_out(views, over + length, target)
        done += length
    return found


def _copy_out(views: list[np.ndarray], start: int, target: np.ndarray) -> None:
    """Copy from the views, taken as one after another, to the target."""
    done = 0
    for view in views:
        part = view[start : start + len(target) - done] if start < len(view) else view[:0]
        target[done : done + len(part)] = part
        done += len(part)
        start = max(0, start - len(view))


def _fill(number: int, piece: Piece, views: list[np.ndarray], start: int, at_least: int | None = None) -> None:
    """Fill the views from a position on; at the file's end, at least so many bytes."""
    wanted = sum(map(len, views)) if at_least is None else at_least
    done = 0
    while done < wanted:
        count = os.preadv(number, list(_left(views, done)), start + done)
        if count == 0:
            raise ArrayError(
                f"{piece.file.path}: ends {wanted - done} bytes early, at byte {start + done}: it shrank, {_CURE}"
            )
        done += count


def _left(views: list[np.ndarray], done: int) -> Iterator[memoryview]:
    for view in views:
        if done < len(view):
            yield view[done:].data
        done = max(0, done - len(view))


def _trailer(piece: Piece) -> list[np.ndarray]:
    return [] if piece.trailer is None else [piece.trailer]


def _address(values: np.ndarray) -> int:
    address: int = values.__array_interface__["data"][0]
    return address
