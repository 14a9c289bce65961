"""The durable store of partials: one self-describing file each, replaced by rename.

    <share>-<sum>-<lane>-<chunk>.partial:  4 KiB header | cover bitmap | the fields of the sum     (little-endian)
    <sum>-<lane>-<chunk>.finished:         4 KiB header

The header holds the run's hash, the place (share, sum, lane, chunk), the lengths, and CRC-32C checksums of itself, of
the cover and of the fields in their order. The word that a chunk is finished is a header alone: the output holds the
chunk, and whatever partials of it come late count for nothing. Cover and numbers are replaced together, so they can
never disagree; a file that fails a check is set aside as ``.damaged``, and its pairs count as not done.

A store writes the partials of one share. Several stores, each of another share, may work in one directory at a time.
"""

import errno
import io
import logging
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from crc32c import crc32c

from cqsa_stream.storage.atomic import make_directory, open_regular, replace_file, sweep, sync_directory
from cqsa_stream.storage.errors import DamagedError
from cqsa_stream.storage.retrying import retrying

__all__ = ["Header", "PartialStore", "SumFiles"]

_MAGIC = b"CQSAPART"
_VERSION = 3
_LAYOUT = struct.Struct("<8sIB3x32s7QII")  # ... cover, fields checksums; the header's own follows
_HEADER_BYTES = 4096
_CHECKSUM = struct.Struct("<I")
_NAME = re.compile(r"(?:(\d{3,18})-)?(\d{2,18})-(\d{6,18})-(\d{6,18})\.(?:partial|finished)", re.ASCII)
_WORD = 1 << 62  # instead of a share: all together have finished the chunk
_MAY_NOT = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOENT)
_log = logging.getLogger(__name__)


class _Place(NamedTuple):
    """Whose partial a file holds; of no share, but ``_WORD``: it says that the chunk is finished."""

    share: int
    sum: int
    lane: int
    chunk: int

    @classmethod
    def of(cls, name: str) -> "_Place | None":
        """Return what the file of this name holds; None where it is none of ours."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        share = _WORD if match[1] is None else int(match[1])
        found = cls(share, *map(int, match.groups()[1:]))
        return found if found.name == name else None

    @property
    def name(self) -> str:
        chunk = f"{self.sum:02d}-{self.lane:06d}-{self.chunk:06d}"
        return f"{chunk}.finished" if self.share == _WORD else f"{self.share:03d}-{chunk}.partial"


@dataclass(frozen=True)
class SumFiles:
    """What the files of one sum hold: ``chunks`` of its axis, covers of ``covered`` bits.

    ``field_bytes(chunk)``: the bytes of each of its fields, in order; ``complete(chunk)``: the cover of a complete one.
    """

    chunks: int
    covered: int
    field_bytes: Callable[[int], tuple[int, ...]]
    complete: Callable[[int], int]

    @property
    def cover_bytes(self) -> int:
        return -(-self.covered // 8)


@dataclass(frozen=True)
class Header:
    """What a partial's file says of itself.

    ``covered``: the bits of its cover. ``checksum`` is of the fields, or of what the output holds of a finished chunk.
    """

    run: bytes
    share: int
    sum: int
    lane: int
    chunk: int
    finished: bool
    cover_bytes: int
    field_bytes: int
    covered: int
    cover_checksum: int
    checksum: int

    def pack(self) -> bytes:
        numbers = (self.share, self.sum, self.lane, self.chunk, self.cover_bytes, self.field_bytes, self.covered)
        head = _LAYOUT.pack(
            _MAGIC, _VERSION, self.finished, self.run, *numbers, self.cover_checksum, self.checksum
        ).ljust(_HEADER_BYTES - _CHECKSUM.size, b"\0")
        return head + _CHECKSUM.pack(crc32c(head))

    @classmethod
    def unpack(cls, data: bytes) -> "Header":
        """Raises DamagedError where the bytes are no header."""
        if len(data) != _HEADER_BYTES:
            raise DamagedError(f"{len(data)} bytes of header; expected {_HEADER_BYTES}")
        head, checksum = data[: -_CHECKSUM.size], _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0]
        if crc32c(head) != checksum:
            raise DamagedError("the header fails its checksum")
        magic, version, finished, run, share, sum_, lane, chunk, *rest = _LAYOUT.unpack_from(head)
        if magic != _MAGIC or version != _VERSION:
            raise DamagedError(f"magic {magic!r}, version {version}; expected {_MAGIC!r}, {_VERSION}")
        return cls(run, share, sum_, lane, chunk, bool(finished), *rest)


@dataclass
class _Moved:
    """The bytes that the stores of a session have moved."""

    read: int = 0
    written: int = 0


class PartialStore:
    """The partials of one share of a run, in the run's directory of partials.

    What a file claims is checked against the ``SumFiles`` of its sum. Files of other lanes, sums or chunks are not
    looked at. Files of other shares are read, and changed in one case only: their chunk is finished.
    ``guard`` is called before anything that is stored is seen, and raises where it must not be.
    """

    keeps = True

    def __init__(self, directory: Path, run: bytes, lanes: int, sums: Sequence[SumFiles], share: int = 0) -> None:
        self.directory = directory
        self.run = run
        self.lanes, self.sums, self.share = lanes, sums, share
        self.guard: Callable[[], object] = lambda: None
        self._moved = _Moved()
        self._seen = {share}  # the shares that have, or had, files here
        self._counting = threading.Lock()  # chunks are finished in one thread and committed in another
        self._ours = False  # whether damaged files may be set aside

    @property
    def bytes_written(self) -> int:
        return self._moved.written

    @property
    def bytes_read(self) -> int:
        return self._moved.read

    def of(self, share: int) -> "PartialStore":
        """Return the store of another share of the same run; what it moves counts as this one's."""
        found = PartialStore(self.directory, self.run, self.lanes, self.sums, share)
        found.guard, found._moved, found._counting = self.guard, self._moved, self._counting
        found._ours = self._ours
        return found

    def prepare(self) -> None:
        """Create the directory; sweep what a killed process left. Only the holder of the share may call this."""
        self._ours = True
        make_directory(self.directory)
        sweep(self.directory)
        for place in self._stored():
            if place.share == _WORD and self._checked(place) is not None:
                self._discard_merged(place)

    def commit(self, sum_: int, lane: int, chunk: int, cover: int, fields: Sequence[np.ndarray]) -> None:
        """Store a partial durably: after return it survives a crash, before it the previous one does."""
        bitmap = cover.to_bytes(self.sums[sum_].cover_bytes, "little")
        self._replace(_Place(self.share, sum_, lane, chunk), bitmap, _bytes_of(fields))

    def finish(self, sum_: int, lane: int, chunk: int, checksum: int) -> None:
        """Note, durably, that the output of a chunk is durable.

        Afterwards its partials are removed, of all shares at whose files this store has looked (``prepare``,
        ``covers``, ``headers``): the output has merged them.
        """
        place = _Place(_WORD, sum_, lane, chunk)
        self._replace(place, b"", (), checksum)
        self._discard_merged(place)

    def covers(self, sum_: int = 0) -> list[dict[int, int | None]]:
        """Return, for each lane, the union of all shares' covers by chunk; None stands for a finished chunk."""
        found: list[dict[int, int | None]] = [{} for _ in range(self.lanes)]
        for header, cover in self.headers():
            if header.sum == sum_:
                before = found[header.lane].get(header.chunk, 0)
                found[header.lane][header.chunk] = None if header.finished or before is None else before | cover
        return found

    def headers(self) -> Iterator[tuple[Header, int]]:
        """Yield header and cover of each stored partial of all shares, by lane and chunk."""
        for place in self._stored():
            if (found := self._checked(place)) is not None:
                yield found

    def shares(self, sum_: int, lane: int, chunk: int) -> list[int]:
        """Return the shares that hold a partial of a chunk, in ascending order; none where it is finished.

        Of those at whose files this store has looked (``prepare``, ``covers``, ``headers``).
        """
        places = [_Place(share, sum_, lane, chunk) for share in sorted(self._seen | {_WORD})]
        found = [header for header, _ in filter(None, map(self._checked, places))]
        return [] if any(header.finished for header in found) else [header.share for header in found]

    def load_into(self, sum_: int, lane: int, chunk: int, fields: Sequence[np.ndarray]) -> int:
        """Fill the fields with this share's partial and return its cover; 0, where there is none or it is damaged."""
        place = _Place(self.share, sum_, lane, chunk)
        if not self._path(place).exists():  # an error would keep what its traceback refers to
            return 0
        found = self._checked(place, _bytes_of(fields))
        if found is None:
            return 0
        with self._counting:
            self._moved.read += _HEADER_BYTES + found[0].cover_bytes + found[0].field_bytes
        return found[1]

    def unfinish(self, sum_: int, lane: int, chunk: int) -> None:
        """Take back the word that a chunk is finished: its output is gone or damaged."""
        self._path(_Place(_WORD, sum_, lane, chunk)).unlink(missing_ok=True)

    def make_durable(self) -> None:
        """Make what ``covers`` returned survive a power cut, as far as this process may: its writer is about to."""
        try:
            sync_directory(self.directory)
        except OSError as error:
            if error.errno not in _MAY_NOT:
                raise

    def _stored(self) -> list[_Place]:
        """Return the places of the files that are there, those of one chunk side by side."""
        try:
            names = os.listdir(self.directory)  # noqa: PTH208 - names are all that is needed
        except FileNotFoundError:
            return []
        ours = [
            place
            for place in map(_Place.of, names)
            if place is not None
            and place.lane < self.lanes
            and place.sum < len(self.sums)
            and place.chunk < self.sums[place.sum].chunks
        ]
        self._seen.update(place.share for place in ours if place.share != _WORD)
        return sorted(ours, key=lambda place: (place.lane, place.chunk, place.sum, place.share))

    def _discard_merged(self, word: _Place) -> None:
        """Remove the partials of a finished chunk."""
        for share in self._seen:
            self._path(word._replace(share=share)).unlink(missing_ok=True)

    def _checked(self, place: _Place, fields: Sequence[memoryview] = ()) -> tuple[Header, int] | None:
        """Return what ``_read`` does; None where there is no file, or it is damaged: one of this share is set aside."""
        try:
            return self._read(place, fields)
        except FileNotFoundError:  # removed or set aside meanwhile by the process that works in the run
            return None
        except DamagedError as error:
            if self._ours and place.share in (self.share, _WORD):
                self.guard()  # where the run was begun anew, it is another run's, and whole
                path = self._path(place)
                with suppress(FileNotFoundError):
                    path.replace(path.with_suffix(".damaged"))
                _log.warning("%s: damaged (%s); it is set aside and its pairs are computed again", path, error)
            return None

    @retrying
    def _read(self, place: _Place, fields: Sequence[memoryview]) -> tuple[Header, int]:
        """Return header and cover of a stored partial, all checked; fill ``fields`` with its own, checked."""
        path = self._path(place)
        try:
            with open_regular(path) as file:
                head = bytearray(_HEADER_BYTES)
                _read_exactly(file, memoryview(head))
                header = Header.unpack(bytes(head))
                self._refuse_misfit(header, place, os.fstat(file.fileno()).st_size)
                bitmap = bytearray(header.cover_bytes)
                _read_exactly(file, memoryview(bitmap))
                if not header.finished and crc32c(bitmap) != header.cover_checksum:
                    raise DamagedError("the cover fails its checksum")
                if bitmap and int.from_bytes(bitmap, "little") & ~self.sums[place.sum].complete(place.chunk):
                    raise DamagedError("a cover of pairs that are not needed")
                if fields and not header.finished:
                    checksum = 0
                    for view in fields:
                        _read_exactly(file, view)
                        checksum = crc32c(view, checksum)
                    if checksum != header.checksum:
                        raise DamagedError("the numbers fail their checksum")
        except OSError as error:
            raise OSError(error.errno, f"reading failed: {error.strerror}", str(path)) from error
        return header, int.from_bytes(bitmap, "little")

    def _refuse_misfit(self, header: Header, place: _Place, size: int) -> None:
        """Raise DamagedError where a header does not say what it must."""
        files = self.sums[place.sum]
        if header.finished != (place.share == _WORD):
            raise DamagedError(f"finished {header.finished}, in a file that cannot be")
        lengths = (0, 0) if header.finished else (files.cover_bytes, sum(files.field_bytes(place.chunk)))
        found = (header.run, header.share, header.sum, header.lane, header.chunk, header.covered)
        if found != (self.run, *place, files.covered) or (header.cover_bytes, header.field_bytes) != lengths:
            raise DamagedError("a header of another run, place or size")
        if size != _HEADER_BYTES + sum(lengths):
            raise DamagedError(f"{size} bytes; expected {_HEADER_BYTES + sum(lengths)}")

    def _replace(self, place: _Place, bitmap: bytes, fields: Sequence[memoryview], output: int | None = None) -> None:
        """Write cover and fields; or, where the checksum of the output is given, that the chunk is finished."""
        checksum = output or 0
        for view in fields:
            checksum = crc32c(view, checksum)
        files, size = self.sums[place.sum], sum(map(len, fields))
        assert output is not None or [*map(len, fields)] == [*files.field_bytes(place.chunk)]
        lengths = (len(bitmap), size, files.covered)
        header = Header(self.run, *place, output is not None, *lengths, crc32c(bitmap), checksum)
        parts = [header.pack(), *(part for part in (bitmap, *fields) if len(part))]
        replace_file(self._path(place), parts, self.guard)
        with self._counting:
            self._moved.written += _HEADER_BYTES + len(bitmap) + size

    def _path(self, place: _Place) -> Path:
        return self.directory / place.name


def _bytes_of(fields: Sequence[np.ndarray]) -> list[memoryview]:
    assert all(values.flags.c_contiguous for values in fields)
    return [values.reshape(-1).view(np.uint8).data for values in fields]


def _read_exactly(file: io.FileIO, view: memoryview) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise DamagedError(f"the file ends {len(view)} bytes early")
        view = view[count:]
