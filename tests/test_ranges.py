"""Ranges of files: any of them, at any address, past the page cache and through it; checksums of parts of units."""

import errno
import mmap
import os
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cqsa_stream.planning import _stored
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.output import create_array, write
from cqsa_stream.storage.readers.files import StoredFile
from cqsa_stream.storage.readers.ranges import PAGE, PART_BYTES, Unit, Wanted, cut, in_parallel, read

SIZE = 5 * PART_BYTES[True] // 2 + 777


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
    st.booleans(), st.integers(1, 4), st.sampled_from([4096, 1 << 20, 4 << 20]),
    st.sampled_from(list(PART_BYTES.values())),
)  # fmt: skip
def test_any_range_at_any_address(
    file: tuple[Path, bytes], start: int, length: int, over: int, like: bool, cached: bool, n: int, most: int, part: int
) -> None:
    path, data = file
    length = min(length, SIZE - start)
    if length < 1:
        return
    place = place_at(over + start % PAGE if like else over, length)
    pieces = list(cut(StoredFile(str(path), SIZE, cached=cached), start, place, most, part))
    assert pieces[0].start == start
    assert sum(piece.length for piece in pieces) == length
    in_parallel(read, pieces, n)
    assert place.tobytes() == data[start : start + length]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.data(), start=st.integers(0, PAGE), length=st.integers(1, SIZE), cached=st.booleans())
def test_any_unit_with_a_checksum(data: st.DataObject, start: int, length: int, cached: bool, tmp_path: Path) -> None:
    """All is checked, in whatever order and size of parts it comes; only what is wanted is copied."""
    unit = np.random.default_rng(length).integers(0, 256, length, np.uint8)
    stored = bytearray(bytes(start) + unit.tobytes() + crc32c(unit.data).to_bytes(4, "little") + b"more")
    (tmp_path / "unit").write_bytes(stored)
    file = StoredFile(str(tmp_path / "unit"), len(stored), cached=cached)
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6)))
    wanted = [Wanted(a, np.zeros(b - a, np.uint8)) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    read(Unit(file, start, length, wanted, checked=True))
    for first, place in wanted:
        assert place.tobytes() == unit[first : first + len(place)].tobytes()
    halves = [Wanted(0, unit[: length // 2]), Wanted(length // 2, unit[length // 2 :])]
    Unit(file, start, length, halves, True, np.frombuffer(stored[-8:-4], np.uint8)).check()
    stored[data.draw(st.integers(start, start + length + 3))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "unit").write_bytes(stored)
    with pytest.raises(ArrayError, match="fails its crc32c"):
        read(Unit(file, start, length, wanted, checked=True))
    found = np.frombuffer(stored[start:-4], np.uint8)
    with pytest.raises(ArrayError, match="fails its crc32c"):
        Unit(file, start, length, [Wanted(0, found[:length])], True, found[length:]).check()


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
    in_parallel(read, list(cut(StoredFile(str(path), SIZE), 0, place, 1 << 20, 1 << 18)), 2)
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
    pieces = list(cut(StoredFile(str(file[0]), SIZE), 0, np.empty(SIZE, np.uint8), 4096, 4096))
    with pytest.raises(ArrayError, match=f"{file[0]}.*Input/output error"):
        in_parallel(read, pieces, 4)


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


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("past_cache", [False, True])
def test_a_chunk_is_checked_whole_once_in_a_session(
    past_cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if past_cache:
        monkeypatch.setattr("cqsa_stream.storage.readers.zarr_plain.CACHED_BYTES", -1)
    shape, row = (1, 1, 16_384, 64), 256
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    write(create_array(tmp_path / "a.zarr", shape, "float32", (1, 1, 8192, 64)), values)
    array, buffer = open_array(tmp_path / "a.zarr"), np.empty((1, 100, 64), np.float32)
    unit = 8192 * row
    assert array.kept_bytes == 2, "a flag for each chunk"
    read_bytes = []
    for start in (0, 50, 2000, 8150, 8150):
        before = array.bytes_read
        array.read_into(0, range(1), range(start, start + 100), buffer)
        assert buffer.tobytes() == values[0, :, start : start + 100].tobytes()
        read_bytes.append(array.bytes_read - before)
    assert read_bytes == [unit, 100 * row, 100 * row, 42 * row + unit, 100 * row]
    flip(tmp_path / "a.zarr/c/0/0/0/0", 2050 * row)
    array.read_into(0, range(1), range(2000, 2100), buffer)  # given up: ../docs/decisions/0013
    array.begin(in_flight=1)
    with pytest.raises(ArrayError, match="fails its crc32c"):
        array.read_into(0, range(1), range(5000, 5100), buffer)


@pytest.mark.parametrize("damaged", [0, 4095, 3 * 8192 * 256 - 1, 3 * 8192 * 256 + 2])
def test_a_chunk_that_is_wanted_whole_is_read_in_pieces_and_checked(damaged: int, tmp_path: Path) -> None:
    shape = (1, 3, 8192, 64)
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    write(create_array(tmp_path / "a.zarr", shape, "float32", shape), values)
    array, buffer = open_array(tmp_path / "a.zarr"), np.empty(shape[1:], np.float32)
    array.read_into(0, range(3), range(8192), buffer)
    assert buffer.tobytes() == values.tobytes()
    assert array.bytes_read == values.nbytes
    flip(tmp_path / "a.zarr/c/0/0/0/0", damaged)
    array.begin(in_flight=2)
    for _ in range(2):
        with pytest.raises(ArrayError, match="fails its crc32c"):
            array.read_into(0, range(3), range(8192), buffer)


def test_damage_found_in_one_chunk_leaves_others_to_be_checked(tmp_path: Path) -> None:
    shape = (1, 1, 200, 64)
    write(create_array(tmp_path / "a.zarr", shape, "float32", (1, 1, 50, 64)), np.ones(shape, np.float32))
    for chunk in (1, 2):
        flip(tmp_path / f"a.zarr/c/0/0/{chunk}/0", 77)
    array, buffer = open_array(tmp_path / "a.zarr"), np.empty((1, 200, 64), np.float32)
    for tokens in (range(200), range(50, 60), range(140, 160)):
        with pytest.raises(ArrayError, match="fails its crc32c"):
            array.read_into(0, range(1), tokens, buffer[:, : len(tokens)])
    array.read_into(0, range(1), range(150, 200), buffer[:, :50])


@pytest.mark.parametrize(
    ("chunk", "heads"),
    [((1, 1, 30, 8), 2), ((1, 2, 30, 8), 2), ((1, 4, 30, 8), 2), ((1, 3, 30, 8), 2), ((1, 6, 30, 8), 1)],
)
def test_what_is_fetched_of_chunks_with_a_checksum_is_what_a_plan_counts(
    chunk: tuple[int, ...], heads: int, tmp_path: Path
) -> None:
    shape, parts = (2, 6, 100, 8), [range(0, 20), range(20, 70), range(70, 100), range(40, 70)]
    write(create_array(tmp_path / "a", shape, "float32", chunk), np.ones(shape, np.float32))
    array, buffer = open_array(tmp_path / "a"), np.empty((heads, 50, 8), np.float32)
    array.begin(1)
    for batch, lane, tokens in product(range(2), range(6 // heads), parts):
        some = range(lane * heads, (lane + 1) * heads)
        array.read_into(batch, some, tokens, buffer[:, : len(tokens)])
    stored, counted = _stored(array, heads), 0
    met: set[int] = set()
    for tokens in parts:
        new = set(stored.chunks(tokens)) - met
        counted += stored.fetched_bytes(tokens) + sum(stored.rest_bytes(tokens, number) for number in new)
        met |= new
    assert array.bytes_read == 2 * counted
