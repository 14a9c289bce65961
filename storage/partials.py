"""The durable store of partials: one self-describing file each, replaced by rename.

    <lane>-<row>.partial:  4 KiB header | cover bitmap | lse float64 | out float32 or float64     (little-endian)

The header holds the run's hash, lane, row, generation, the lengths, and CRC-32C checksums of itself, of the cover and
of the numbers. A finished row's file is the header alone: it says that the output holds the row. Cover and numbers are
replaced together, so they can never disagree; a file that fails a check is set aside as ``.damaged``, and its pairs
count as not done.
"""

import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from crc32c import crc32c

from cqsa_stream.storage.atomic import TEMPORARY, make_directory, replace_file
from cqsa_stream.storage.errors import DamagedError

__all__ = ["Header", "PartialStore"]

_MAGIC = b"CQSAPART"
_VERSION = 1
_LAYOUT = struct.Struct("<8sIB3x32s7QII")  # ... cover, numbers checksums; the header's own follows
_HEADER_BYTES = 4096
_CHECKSUM = struct.Struct("<I")


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

    ``row_elements`` gives, for a row, the elements of its lse and out, the latter of ``out_itemsize`` bytes each: what
    a file claims is checked against them.
    """

    def __init__(
        self, directory: Path, run: bytes, row_elements: list[tuple[int, int]], columns: int, out_itemsize: int = 4
    ) -> None:
        self.directory = directory
        self.run = run
        self.row_elements = row_elements
        self.columns = columns
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
        for leftover in self.directory.glob("*" + TEMPORARY):
            leftover.unlink()

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

    def covers(self, lane: int) -> Iterator[tuple[int, int | None]]:
        """Yield (row, cover) of each stored partial of a lane; None stands for a finished row."""
        for row in range(len(self.row_elements)):
            try:
                header, cover = self._open(lane, row)
            except FileNotFoundError:
                continue
            except DamagedError:
                self._set_aside(lane, row)
                continue
            yield row, None if header.finished else cover

    def load_into(self, lane: int, row: int, lse: np.ndarray, out: np.ndarray) -> int:
        """Fill lse and out with the stored partial and return its cover; 0, where there is none or it is damaged."""
        try:
            header, cover = self._open(lane, row)
            if header.finished:
                return 0
            with self._path(lane, row).open("rb", buffering=0) as file:
                file.seek(_HEADER_BYTES + header.cover_bytes)
                views = (_bytes_of(lse), _bytes_of(out))
                for view in views:
                    _read_exactly(file, view)
            checksum = crc32c(views[1], crc32c(views[0]))
            if checksum != header.checksum:
                raise DamagedError("the numbers fail their checksum")
        except FileNotFoundError:
            return 0
        except DamagedError:
            self._set_aside(lane, row)
            return 0
        self.bytes_read += _HEADER_BYTES + header.cover_bytes + header.lse_bytes + header.out_bytes
        return cover

    def forget_finished(self, lanes: int) -> None:
        """Drop every word that a row is finished, the output being gone."""
        for lane in range(lanes):
            for row in [row for row, cover in self.covers(lane) if cover is None]:
                self._path(lane, row).unlink()

    def _open(self, lane: int, row: int) -> tuple[Header, int]:
        with self._path(lane, row).open("rb", buffering=0) as file:
            header = Header.unpack(file.read(_HEADER_BYTES))
            lse, out = self.row_elements[row]
            cover_bytes = -(-self.columns // 8)
            sizes = (0, 0, 0) if header.finished else (cover_bytes, 8 * lse, self.out_itemsize * out)
            found = (header.cover_bytes, header.lse_bytes, header.out_bytes)
            if (header.run, header.lane, header.row, header.columns, *found) != (
                self.run, lane, row, self.columns, *sizes,
            ):  # fmt: skip
                raise DamagedError("a header of another run, row or size")
            bitmap = bytearray(header.cover_bytes)
            _read_exactly(file, memoryview(bitmap))
            if not header.finished and crc32c(bitmap) != header.cover_checksum:
                raise DamagedError("the cover fails its checksum")
        self._generations[lane, row] = header.generation
        return header, int.from_bytes(bitmap, "little")

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

    def _set_aside(self, lane: int, row: int) -> None:
        if self._ours:
            path = self._path(lane, row)
            path.replace(path.with_suffix(".damaged"))


def _bytes_of(values: np.ndarray) -> memoryview:
    assert values.flags.c_contiguous
    return values.reshape(-1).view(np.uint8).data


def _read_exactly(file: object, view: memoryview) -> None:
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise DamagedError(f"the file ends {len(view)} bytes early")
        view = view[count:]
