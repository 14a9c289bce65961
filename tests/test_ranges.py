"""Ranges of files: any of them, at any address, past the page cache and through it; checksums of parts of units."""

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.output import create_array, write
from cqsa_stream.storage.readers import ranges
from cqsa_stream.storage.readers.checksum import appended
from cqsa_stream.storage.readers.ranges import PAGE, Piece, StoredFile, cut, read_pieces

SIZE = 5 * ranges.BOUNCE_BYTES // 2 + 777


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("ranges") / "file"
    data = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()
    path.write_bytes(data)
    return path, data


def place_at(offset: int, length: int) -> np.ndarray:
    """Return an array that begins so many bytes behind a page's start."""
    return np.frombuffer(mmap.mmap(-1, offset + length + PAGE), np.uint8)[offset : offset + length]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    st.integers(0, SIZE), st.integers(1, SIZE), st.sampled_from([0, 1, 4, 64, 512, 4095, 4096]), st.booleans(),
    st.sampled_from([0, 4]), st.booleans(), st.integers(1, 4), st.sampled_from([4096, 1 << 20, 4 << 20]),
)  # fmt: skip
def test_any_range_at_any_address(
    file: tuple[Path, bytes],
    start: int,
    length: int,
    over: int,
    like: bool,
    trailer: int,
    cached: bool,
    n: int,
    most: int,
) -> None:
    path, data = file
    length = min(length, SIZE - start - trailer)
    if length < 1:
        return
    place = place_at(over + start % PAGE if like else over, length)
    behind = np.empty(trailer, np.uint8)
    pieces = list(cut(StoredFile(str(path), SIZE, cached=cached), start, length, place, most, range(start, SIZE, 1000)))
    last = pieces[-1]
    pieces[-1] = Piece(last.file, last.start, last.length, last.place, last.checked, behind if trailer else None)
    found = read_pieces(pieces, n)
    assert place.tobytes() == data[start : start + length]
    assert behind.tobytes() == data[start + length : start + length + trailer]
    assert sum(count for parts in found for count, _ in parts) == length
    position, whole = start, 0
    for parts in found:
        for count, checksum in parts:
            assert checksum == crc32c(data[position : position + count])
            whole = appended(whole, checksum, count)
            position += count
    assert whole == crc32c(data[start : start + length])


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_checksums_of_parts_give_that_of_the_whole(parts: list[bytes]) -> None:
    whole = 0
    for part in parts:
        whole = appended(whole, crc32c(part), len(part))
    assert whole == crc32c(b"".join(parts))


@pytest.mark.parametrize("refused", ["open", "preadv"])
def test_without_direct_access_it_is_read_otherwise(
    refused: str, file: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = file
    honest, direct = getattr(os, refused), set()

    def refusing(first: Any, second: Any, *rest: Any) -> Any:
        if refused == "open" and second & os.O_DIRECT:
            direct.add("asked")
            raise OSError(errno.EINVAL, "Invalid argument")
        if refused == "preadv" and Path(f"/proc/self/fd/{first}").readlink() == path and is_direct(first):
            direct.add("asked")
            raise OSError(errno.EINVAL, "Invalid argument")
        return honest(first, second, *rest)

    monkeypatch.setattr(f"cqsa_stream.storage.readers.ranges.os.{refused}", refusing)
    place = np.empty(SIZE, np.uint8)
    read_pieces(list(cut(StoredFile(str(path), SIZE), 0, SIZE, place, 1 << 20)), 2)
    assert place.tobytes() == data
    assert direct == {"asked"}


def is_direct(number: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{number}").read_text().partition("flags:")[2].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


def test_a_failing_disk_names_the_file_and_leaves_no_reader_behind(
    file: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("cqsa_stream.storage.readers.ranges.os.preadv", failing)
    pieces = list(cut(StoredFile(str(file[0]), SIZE), 0, SIZE, np.empty(SIZE, np.uint8), 4096))
    with pytest.raises(ArrayError, match=f"{file[0]}.*Input/output error"):
        read_pieces(pieces, 4)


def in_page_cache(path: Path) -> int:
    """Return the bytes of the files below a folder that are in the page cache."""
    import ctypes

    libc, found = ctypes.CDLL(None), 0
    for file in (p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            pages = np.zeros(-(-len(mapped) // PAGE), np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            address, size = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped))
            assert libc.mincore(address, size, pages.ctypes.data_as(ctypes.c_void_p)) == 0
            found += int((pages & 1).sum()) * PAGE
            del view
    return found


def drop_from_page_cache(path: Path) -> None:
    for file in (p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize(
    ("codec", "inner"), [("none", None), ("crc32c", None), ("none", (1, 1, 1024, 64)), ("crc32c", (1, 1, 1024, 64))]
)
def test_reading_leaves_nothing_in_the_page_cache(codec: str, inner: Any, tmp_path: Path) -> None:
    shape = (1, 2, 40_000, 64)
    path = tmp_path / "a.zarr"
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    write(create_array(path, shape, "float32", (1, 1, 8192, 64), codec, inner), values)
    drop_from_page_cache(path)
    if in_page_cache(path):
        pytest.skip("this file system keeps its files in memory")
    array, buffer = open_array(path), np.empty((2, 5000, 64), np.float32)
    array.check()
    for start in range(0, 40_000, 5000):
        array.read_into(0, range(2), range(start, start + 5000), buffer)
        assert buffer.tobytes() == values[0, :, start : start + 5000].tobytes()
    assert in_page_cache(path) <= 1 << 20, "of 20 MiB, at most the indices of shards"


def test_after_the_first_read_only_leaves_are_read_and_still_checked(tmp_path: Path) -> None:
    shape, leaf = (1, 1, 16_384, 64), 512 << 10
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    write(create_array(tmp_path / "a.zarr", shape, "float32", (1, 1, 8192, 64)), values)
    array, buffer = open_array(tmp_path / "a.zarr"), np.empty((1, 100, 64), np.float32)
    unit = 8192 * 256
    assert array.leaf_bytes == leaf
    read_bytes = []
    for start in (0, 50, 2000, 8150, 8150):
        before = array.bytes_read
        array.read_into(0, range(1), range(start, start + 100), buffer)
        assert buffer.tobytes() == values[0, :, start : start + 100].tobytes()
        read_bytes.append(array.bytes_read - before)
    assert read_bytes == [unit, leaf, 2 * leaf, leaf + unit, 2 * leaf]
    chunk = tmp_path / "a.zarr/c/0/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[2050 * 256] ^= 1
    chunk.write_bytes(data)
    array.read_into(0, range(1), range(5000, 5100), buffer)  # another leaf
    with pytest.raises(ArrayError, match="not what it was when it was checked first"):
        array.read_into(0, range(1), range(2000, 2100), buffer)
    array.begin(in_flight=1)
    with pytest.raises(ArrayError, match="fails its crc32c"):
        array.read_into(0, range(1), range(5000, 5100), buffer)
