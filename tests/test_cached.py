"""What is in the page cache is read from there, and stays; what is not is read past it, and does not come there."""

import os
from pathlib import Path

import numpy as np
import pytest

from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.readers.files import all_cached, through_cache

SIZE = 12 << 20  # an array that is not read through the cache in any case


@pytest.fixture(autouse=True)
def cold_files() -> None:
    """Here the page cache counts."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.npy"
    values = np.random.default_rng(0).standard_normal((1, 1, SIZE // 256, 64), dtype=np.float32)
    np.save(path, values)
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        if not all_cached(opened.fileno(), 0, SIZE):
            pytest.skip("this system does not tell what is in the page cache")
    return path


def cached(path: Path) -> tuple[bool, bool]:
    """Return whether all of the file is in the page cache, and whether its first half is."""
    with path.open("rb") as opened:
        return all_cached(opened.fileno(), 0, SIZE), all_cached(opened.fileno(), 0, SIZE // 2)


def forget(path: Path, start: int) -> None:
    with path.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), start, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("forgotten_from", [None, SIZE // 2, 0])
def test_reading_leaves_the_cache_as_it_was(file: Path, forgotten_from: int | None) -> None:
    expected = np.load(file)[0]
    if forgotten_from is not None:
        forget(file, forgotten_from)
    before = cached(file)
    if before != {None: (True, True), SIZE // 2: (False, True), 0: (False, False)}[forgotten_from]:
        pytest.skip("this file system keeps what it is told to forget")
    array, found = open_array(file), np.zeros_like(expected)
    array.begin(3)
    array.read_into(0, range(1), range(expected.shape[1]), found)
    np.testing.assert_array_equal(found, expected)
    assert cached(file) == before


def test_no_file_no_answer() -> None:
    assert not all_cached(-1, 0, 4096)


def test_a_file_opened_past_the_cache_can_be_read_through_it(file: Path) -> None:
    number = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        through_cache(number)
        assert os.pread(number, 100, 128) == file.read_bytes()[128:228]
    finally:
        os.close(number)
