"""The durable store of partials: one self-describing file each, replaced by rename.

    <lane>-<row>.partial:  4 KiB header | cover bitmap | lse float64 | out float32 or float64     (little-endian)

The header holds the run's hash, lane, row, generation, the lengths, and CRC-32C checksums of itself, of the cover and
of the numbers. A finished row's file is the header alone: it says that the output holds the row. Cover and numbers are
replaced together, so they can never disagree; a file that fails a check is set aside as ``.damaged``, and its pairs
count as not done.
"""

import errno
import io
import logging
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from crc32c import crc32c

from cqsa_stream.storage.atomic import make_directory, open_regular, replace_file, sweep, sync_directory
from cqsa_stream.storage.errors import DamagedError
from cqsa_stream.storage.retrying import retrying

__all__ = ["Header", "PartialStore"]

_MAGIC = b"CQSAPART"
_VERSION = 1
_LAYOUT = struct.Struct("<8sIB3x32s7QII")  # ... cover, numbers checksums; the header's own follows
_HEADER_BYTES = 4096
_CHECKSUM = struct.Struct("<I")
_NAME = re.compile(r"(\d{6,18})-(\d{6,18})\.partial")
_MAY_NOT = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOENT)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Header:
    """What a partial's file says of itself. ``checksum`` is of lse and out, or of the finished row's output and lse."""

    run: bytes
    lane: int
    row: int
    generation: int
    finished: bool
    cover_bytes: int
    lse_bytes: int
    out_bytes: int
    columns: int
    cover_checksum: int
    checksum: int

    def pack(self) -> bytes:
        fields = (self.lane, self.row, self.generation, self.cover_bytes, self.lse_bytes, self.out_bytes, self.columns)
        head = _LAYOUT.pack(
            _MAGIC, _VERSION, self.finished, self.run, *fields, self.cover_checksum, self.checksum
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
        magic, version, finished, run, lane, row, generation, cover, lse, out, columns, cover_sum, sum_ = (
            _LAYOUT.unpack_from(head)
        )
        if magic != _MAGIC or version != _VERSION:
            raise DamagedError(f"magic {magic!r}, version {version}; expected {_MAGIC!r}, {_VERSION}")
        return cls(run, lane, row, generation, bool(finished), cover, lse, out, columns, cover_sum, sum_)


class PartialStore:
    """The partials of one run, in one directory.

    ``elements(row)`` gives the elements of a row's lse and out, the latter of ``out_itemsize`` bytes each: what a file
    claims is checked against them, and its cover against ``complete(row)``, the cover of a complete row. Of ``shape``
    (lanes, rows, columns); files of other lanes or rows are not looked at.
    """

    def __init__(
        self,
        directory: Path,
        run: bytes,
        shape: tuple[int, int, int],
        elements: Callable[[int], tuple[int, int]],
        complete: Callable[[int], int],
        out_itemsize: int = 4,
    ) -> None:
        self.directory = directory
        self.run = run
        self.lanes, self.rows, self.columns = shape
        self.elements, self.complete = elements, complete
        self.out_itemsize = out_itemsize
        self.bytes_written = 0
        self.bytes_read = 0
        self._generations: dict[tuple[int, int], int] = {}
        self._counting = threading.Lock()  # rows are finished in one thread and committed in another
        self._ours = False  # whether damaged files may be set aside

    def prepare(self) -> None:
        """Create the directory; sweep what a killed process left. Only the holder of the run's lock may call this."""
        self._ours = True
        make_directory(self.directory)
        sweep(self.directory)

    def commit(self, lane: int, row: int, cover: int, lse: np.ndarray, out: np.ndarray) -> None:
        """Store a partial durably: after return it survives a crash, before it the previous one does."""
        bitmap = cover.to_bytes(-(-self.columns // 8), "little")
        lse_bytes, out_bytes = _bytes_of(lse), _bytes_of(out)
        checksum = crc32c(out_bytes, crc32c(lse_bytes))
        self._replace(lane, row, False, (bitmap, lse_bytes, out_bytes), crc32c(bitmap), checksum)

    def finish(self, lane: int, row: int, checksum: int) -> None:
        """Replace the partial of a row, whose output is durable, by the word that it is finished."""
        self._replace(lane, row, True, (b"", b"", b""), 0, checksum)
        self._generations.pop((lane, row), None)

    def covers(self) -> list[dict[int, int | None]]:
        """Return, for each lane, the covers of the stored partials by row; None stands for a finished row."""
        found: list[dict[int, int | None]] = [{} for _ in range(self.lanes)]
        for header, cover in self.headers():
            found[header.lane][header.row] = None if header.finished else cover
        return found

    def headers(self) -> Iterator[tuple[Header, int]]:
        """Yield header and cover of each stored partial, by lane and row; what is damaged is set aside."""
        for lane, row in self._stored():
            try:
                yield self._read(lane, row)
            except FileNotFoundError:  # set aside meanwhile by the process that works in the run
                continue
            except DamagedError as error:
                self._set_aside(lane, row, error)

    def load_into(self, lane: int, row: int, lse: np.ndarray, out: np.ndarray) -> int:
        """Fill lse and out with the stored partial and return its cover; 0, where there is none or it is damaged."""
        if not self._path(lane, row).exists():  # an error would keep what its traceback refers to
            return 0
        try:
            header, cover = self._read(lane, row, (_bytes_of(lse), _bytes_of(out)))
        except FileNotFoundError:
            return 0
        except DamagedError as error:
            self._set_aside(lane, row, error)
            return 0
        if header.finished:
            return 0
        self.bytes_read += _HEADER_BYTES + header.cover_bytes + header.lse_bytes + header.out_bytes
        return cover

    def unfinish(self, lane: int, row: int) -> None:
        """Take back the word that a row is finished, its output being gone or damaged."""
        self._path(lane, row).unlink(missing_ok=True)
        self._generations.pop((lane, row), None)

    def make_durable(self) -> None:
        """Make what ``covers`` returned survive a power cut, as far as this process may: its writer is about to."""
        try:
            sync_directory(self.directory)
        except OSError as error:
            if error.errno not in _MAY_NOT:
                raise

    def _stored(self) -> list[tuple[int, int]]:
        try:
            names = [path.name for path in self.directory.iterdir()]
        except FileNotFoundError:
            return []
        places = [tuple(map(int, match.groups())) for name in names if (match := _NAME.fullmatch(name))]
        return sorted((lane, row) for lane, row in places if lane < self.lanes and row < self.rows)

    @retrying
    def _read(self, lane: int, row: int, numbers: Sequence[memoryview] = ()) -> tuple[Header, int]:
        """Return header and cover of a stored partial, all checked; fill ``numbers`` with its lse and out, checked."""
        path = self._path(lane, row)
        try:
            with open_regular(path) as file:
                head = bytearray(_HEADER_BYTES)
                _read_exactly(file, memoryview(head))
                header = Header.unpack(bytes(head))
                self._refuse_misfit(header, lane, row, os.fstat(file.fileno()).st_size)
                bitmap = bytearray(header.cover_bytes)
                _read_exactly(file, memoryview(bitmap))
                if not header.finished and crc32c(bitmap) != header.cover_checksum:
                    raise DamagedError("the cover fails its checksum")
                if int.from_bytes(bitmap, "little") & ~self.complete(row):
                    raise DamagedError("a cover of columns that the row does not need")
                if numbers and not header.finished:
                    checksum = 0
                    for view in numbers:
                        _read_exactly(file, view)
                        checksum = crc32c(view, checksum)
                    if checksum != header.checksum:
                        raise DamagedError("the numbers fail their checksum")
        except OSError as error:
            raise OSError(error.errno, f"reading failed: {error.strerror}", str(path)) from error
        self._generations[lane, row] = header.generation
        return header, int.from_bytes(bitmap, "little")

    def _refuse_misfit(self, header: Header, lane: int, row: int, size: int) -> None:
        """Raise DamagedError where a header does not say what it must."""
        lse, out = self.elements(row)
        sizes = (0, 0, 0) if header.finished else (-(-self.columns // 8), 8 * lse, self.out_itemsize * out)
        found = (header.run, header.lane, header.row, header.columns)
        lengths = (header.cover_bytes, header.lse_bytes, header.out_bytes)
        if found != (self.run, lane, row, self.columns) or lengths != sizes:
            raise DamagedError("a header of another run, row or size")
        if size != _HEADER_BYTES + sum(sizes):
            raise DamagedError(f"{size} bytes; expected {_HEADER_BYTES + sum(sizes)}")

    def _replace(
        self,
        lane: int,
        row: int,
        finished: bool,
        parts: tuple[bytes, bytes | memoryview, bytes | memoryview],
        cover_checksum: int,
        checksum: int,
    ) -> None:
        generation = self._generations.get((lane, row), 0) + 1
        cover, lse, out = (len(part) for part in parts)
        header = Header(
            self.run, lane, row, generation, finished, cover, lse, out, self.columns, cover_checksum, checksum
        )
        replace_file(self._path(lane, row), [header.pack(), *(part for part in parts if len(part))])
        self._generations[lane, row] = generation
        with self._counting:
            self.bytes_written += _HEADER_BYTES + cover + lse + out

    def _path(self, lane: int, row: int) -> Path:
        return self.directory / f"{lane:06d}-{row:06d}.partial"

    def _set_aside(self, lane: int, row: int, error: DamagedError) -> None:
        if self._ours:
            path = self._path(lane, row)
            path.replace(path.with_suffix(".damaged"))
            _log.warning("%s: damaged (%s); it is set aside and its pairs are computed again", path, error)


def _bytes_of(values: np.ndarray) -> memoryview:
    assert values.flags.c_contiguous
    return values.reshape(-1).view(np.uint8).data


def _read_exactly(file: io.FileIO, view: memoryview) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise DamagedError(f"the file ends {len(view)} bytes early")
        view = view[count:]
