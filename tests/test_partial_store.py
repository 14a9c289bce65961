"""The durable store: what is committed is read back, what is damaged is never believed."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cqsa_stream.storage.partials import PartialStore
from tests.conftest import left_over

RUN = bytes(range(32))
ROWS = [(10, 40), (10, 40), (4, 16)]


def store(path: Path, run: bytes = RUN, columns: int = 11) -> PartialStore:
    found = PartialStore(path / "partials", run, (2, len(ROWS), columns), lambda row: ROWS[row], lambda row: 2**11 - 1)
    found.prepare()
    return found


def numbers(row: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal(ROWS[row][0]), generator.standard_normal(ROWS[row][1]).astype(np.float32)


def load(found: PartialStore, row: int) -> tuple[int, np.ndarray, np.ndarray]:
    lse, out = np.empty(ROWS[row][0]), np.empty(ROWS[row][1], np.float32)
    return found.load_into(0, row, lse, out), lse, out


def test_the_last_commit_is_read_back(tmp_path: Path) -> None:
    first = store(tmp_path)
    for seed, cover in ((1, 0b1), (2, 0b10000000001)):
        first.commit(0, 1, cover, *numbers(1, seed))
    cover, lse, out = load(store(tmp_path), 1)
    assert cover == 0b10000000001
    np.testing.assert_array_equal(lse, numbers(1, 2)[0])
    np.testing.assert_array_equal(out, numbers(1, 2)[1])
    assert first.covers() == [{1: cover}, {}]


def test_nothing_stored_is_the_empty_cover(tmp_path: Path) -> None:
    assert load(store(tmp_path), 0)[0] == 0


def test_a_finished_row_is_a_header_alone(tmp_path: Path) -> None:
    found = store(tmp_path)
    found.commit(0, 2, 3, *numbers(2))
    found.finish(0, 2, 1234)
    assert found.covers() == [{2: None}, {}]
    [(header, _)] = found.headers()
    assert header.checksum == 1234
    [file] = (tmp_path / "partials").iterdir()
    assert file.stat().st_size == 4096
    assert found.bytes_written == 4096 + 2 + 8 * 4 + 4 * 16 + 4096
    found.unfinish(0, 2)
    assert found.covers() == [{}, {}]


def test_space_does_not_grow_with_commits(tmp_path: Path) -> None:
    found = store(tmp_path)
    for seed in range(10):
        found.commit(0, 0, 1, *numbers(0, seed))
    assert [p.stat().st_size for p in (tmp_path / "partials").iterdir()] == [4096 + 2 + 80 + 160]


def test_leftovers_are_swept(tmp_path: Path) -> None:
    found = store(tmp_path)
    found.commit(0, 0, 1, *numbers(0))
    left_over(tmp_path / "partials" / "000000-000001.partial").write_bytes(b"half")
    assert store(tmp_path).covers() == [{0: 1}, {}]
    assert len(list((tmp_path / "partials").iterdir())) == 1


@pytest.mark.parametrize("other", [{"run": bytes(32)}, {"columns": 12}])
def test_another_runs_partial_is_set_aside(other: dict[str, object], tmp_path: Path) -> None:
    store(tmp_path).commit(0, 0, 1, *numbers(0))
    foreign = store(tmp_path, **other)  # type: ignore[arg-type]
    assert load(foreign, 0)[0] == 0
    assert [p.suffix for p in (tmp_path / "partials").iterdir()] == [".damaged"]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), finished=st.booleans())
def test_no_flipped_bit_goes_unnoticed(place: float, bit: int, finished: bool, tmp_path: Path) -> None:
    found = store(tmp_path)
    found.commit(0, 0, 0b101, *numbers(0))
    if finished:
        found.finish(0, 0, 99)
    file = tmp_path / "partials" / "000000-000000.partial"
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    file.write_bytes(data)
    assert load(found, 0)[0] == 0
    assert not file.exists()
    assert file.with_suffix(".damaged").exists()


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=5000))
def test_any_bytes_are_survived(data: bytes, tmp_path: Path) -> None:
    found = store(tmp_path)
    file = tmp_path / "partials" / "000000-000000.partial"
    file.write_bytes(data)
    assert found.covers() == [{}, {}]
    assert load(found, 0)[0] == 0


@pytest.mark.parametrize("keep", [0, 100, 4096, 4097, 4150, 5000])
def test_a_file_of_another_length_is_set_aside(keep: int, tmp_path: Path) -> None:
    found = store(tmp_path)
    found.commit(0, 0, 1, *numbers(0))
    file = tmp_path / "partials" / "000000-000000.partial"
    file.write_bytes(file.read_bytes().ljust(keep, b"0")[:keep])
    assert load(found, 0)[0] == 0
    assert not file.exists()
