"""The durable store: what is committed is read back, what is damaged is never believed."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cqsa_stream.storage.atomic import temporary_name
from cqsa_stream.storage.partials import PartialStore, SumFiles
from tests.conftest import left_over

RUN = bytes(range(32))
ROWS = [(10, 40), (10, 40), (4, 16)]
COLUMNS = [6, 5]
FILE, WORD = "000-00-000000-000000.partial", "00-000000-000000.finished"


def store(path: Path, run: bytes = RUN, columns: int = 11, share: int = 0) -> PartialStore:
    """Two lanes of two sums: one of 3 row chunks with (lse, out), one of 2 column chunks with one field."""
    rows = SumFiles(len(ROWS), columns, lambda row: (8 * ROWS[row][0], 4 * ROWS[row][1]), lambda _: 2**11 - 1)
    other = SumFiles(len(COLUMNS), 3, lambda column: (4 * COLUMNS[column],), lambda _: 2**3 - 1)
    found = PartialStore(path / "partials", run, 2, [rows, other], share)
    found.prepare()
    return found


def numbers(row: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(ROWS[row][0]), generator.standard_normal(ROWS[row][1]).astype(np.float32)]


def load(found: PartialStore, row: int) -> tuple[int, np.ndarray, np.ndarray]:
    lse, out = np.empty(ROWS[row][0]), np.empty(ROWS[row][1], np.float32)
    return found.load_into(0, 0, row, [lse, out]), lse, out


def names(path: Path) -> list[str]:
    return sorted(p.name for p in (path / "partials").iterdir())


def test_the_last_commit_is_read_back(tmp_path: Path) -> None:
    first = store(tmp_path)
    for seed, cover in ((1, 0b1), (2, 0b10000000001)):
        first.commit(0, 0, 1, cover, numbers(1, seed))
    cover, lse, out = load(store(tmp_path), 1)
    assert cover == 0b10000000001
    np.testing.assert_array_equal(lse, numbers(1, 2)[0])
    np.testing.assert_array_equal(out, numbers(1, 2)[1])
    assert first.covers() == [{1: cover}, {}]


def test_nothing_stored_is_the_empty_cover(tmp_path: Path) -> None:
    assert load(store(tmp_path), 0)[0] == 0


def test_a_finished_row_is_a_header_alone(tmp_path: Path) -> None:
    found = store(tmp_path)
    found.commit(0, 0, 2, 3, numbers(2))
    found.finish(0, 0, 2, 1234)
    assert found.covers() == [{2: None}, {}]
    [(header, _)] = found.headers()
    assert header.checksum == 1234
    [file] = (tmp_path / "partials").iterdir()
    assert file.stat().st_size == 4096
    assert found.bytes_written == 4096 + 2 + 8 * 4 + 4 * 16 + 4096
    found.unfinish(0, 0, 2)
    assert found.covers() == [{}, {}]


def test_space_does_not_grow_with_commits(tmp_path: Path) -> None:
    found = store(tmp_path)
    for seed in range(10):
        found.commit(0, 0, 0, 1, numbers(0, seed))
    assert [p.stat().st_size for p in (tmp_path / "partials").iterdir()] == [4096 + 2 + 80 + 160]


def test_leftovers_are_swept(tmp_path: Path) -> None:
    found = store(tmp_path)
    found.commit(0, 0, 0, 1, numbers(0))
    left_over(tmp_path / "partials" / "000-00-000000-000001.partial").write_bytes(b"half")
    assert store(tmp_path).covers() == [{0: 1}, {}]
    assert len(list((tmp_path / "partials").iterdir())) == 1


@pytest.mark.parametrize("other", [{"run": bytes(32)}, {"columns": 12}])
def test_another_runs_partial_is_set_aside(other: dict[str, object], tmp_path: Path) -> None:
    store(tmp_path).commit(0, 0, 0, 1, numbers(0))
    foreign = store(tmp_path, **other)  # type: ignore[arg-type]
    assert load(foreign, 0)[0] == 0
    assert [p.suffix for p in (tmp_path / "partials").iterdir()] == [".damaged"]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), finished=st.booleans())
def test_no_flipped_bit_goes_unnoticed(place: float, bit: int, finished: bool, tmp_path: Path) -> None:
    found = store(tmp_path)
    found.commit(0, 0, 0, 0b101, numbers(0))
    if finished:
        found.finish(0, 0, 0, 99)
    file = tmp_path / "partials" / (WORD if finished else FILE)
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    file.write_bytes(data)
    assert load(found, 0)[0] == 0
    assert found.covers() == [{}, {}]
    assert not file.exists()
    assert file.with_suffix(".damaged").exists()


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=5000))
def test_any_bytes_are_survived(data: bytes, tmp_path: Path) -> None:
    found = store(tmp_path)
    file = tmp_path / "partials" / FILE
    file.write_bytes(data)
    assert found.covers() == [{}, {}]
    assert load(found, 0)[0] == 0


@pytest.mark.parametrize("keep", [0, 100, 4096, 4097, 4150, 5000])
def test_a_file_of_another_length_is_set_aside(keep: int, tmp_path: Path) -> None:
    found = store(tmp_path)
    found.commit(0, 0, 0, 1, numbers(0))
    file = tmp_path / "partials" / FILE
    file.write_bytes(file.read_bytes().ljust(keep, b"0")[:keep])
    assert load(found, 0)[0] == 0
    assert not file.exists()


def test_each_sum_has_its_own_covers(tmp_path: Path) -> None:
    found = store(tmp_path)
    sums = np.arange(COLUMNS[1], dtype=np.float32)
    found.commit(0, 0, 1, 0b11, numbers(1))
    found.commit(1, 0, 1, 0b100, [sums])
    found.commit(1, 1, 0, 0b111, [np.zeros(COLUMNS[0], np.float32)])
    found.finish(1, 1, 0, 5)
    assert found.covers() == found.covers(0) == [{1: 0b11}, {}]
    assert found.covers(1) == [{1: 0b100}, {0: None}]
    place = np.empty_like(sums)
    assert found.load_into(1, 0, 1, [place]) == 0b100
    np.testing.assert_array_equal(place, sums)
    assert [(header.sum, header.lane, header.chunk) for header, _ in found.headers()] == [
        (0, 0, 1),
        (1, 0, 1),
        (1, 1, 0),
    ]
    found.unfinish(1, 1, 0)
    assert found.covers(1) == [{1: 0b100}, {}]


def test_shares_add_up_in_one_directory(tmp_path: Path) -> None:
    first, second = store(tmp_path), store(tmp_path, share=2)
    first.commit(0, 0, 1, 0b001, numbers(1, 1))
    second.commit(0, 0, 1, 0b110, numbers(1, 2))
    second.commit(0, 0, 0, 0b100, numbers(0))
    for each, cover, seed in ((first, 0b001, 1), (second, 0b110, 2)):
        assert each.covers() == [{0: 0b100, 1: 0b111}, {}]
        assert each.shares(0, 0, 1) == [0, 2]
        found, lse, out = load(each, 1)
        assert found == cover
        np.testing.assert_array_equal(lse, numbers(1, seed)[0])
        np.testing.assert_array_equal(out, numbers(1, seed)[1])
    assert load(first, 0)[0] == 0
    assert first.shares(0, 0, 0) == [2]


@pytest.mark.parametrize("share", [0, 2])
def test_finishing_removes_what_other_shares_hold(share: int, tmp_path: Path) -> None:
    shares = {number: store(tmp_path, share=number) for number in (0, 1, 2)}
    for number, each in shares.items():
        each.commit(0, 0, 1, 1 << number, numbers(1))
        each.commit(0, 0, 0, 1 << number, numbers(0))
    assert shares[share].covers() == [{0: 0b111, 1: 0b111}, {}]
    assert shares[share].shares(0, 0, 1) == [0, 1, 2]
    shares[share].finish(0, 0, 1, 7)
    assert shares[share].shares(0, 0, 1) == []
    assert all(each.covers() == [{0: 0b111, 1: None}, {}] for each in shares.values())
    kept = [f"00{n}-00-000000-000000.partial" for n in range(3)]
    assert names(tmp_path) == ["00-000000-000001.finished", *kept]
    shares[1].unfinish(0, 0, 1)
    assert shares[0].covers() == [{0: 0b111}, {}]


def test_a_partial_of_a_finished_chunk_is_dead(tmp_path: Path) -> None:
    """A stale worker commits after another share finished the chunk; or the finisher died before it removed it."""
    first, second = store(tmp_path), store(tmp_path, share=1)
    first.finish(0, 0, 1, 7)
    for each in (second, store(tmp_path, share=2), store(tmp_path, share=3)):
        each.commit(0, 0, 1, 0b10, numbers(1))
    assert second.covers() == [{1: None}, {}]
    assert len(names(tmp_path)) == 4
    store(tmp_path, share=3)
    assert names(tmp_path) == ["00-000000-000001.finished"]


def test_the_share_that_finished_a_chunk_cannot_take_it_back_by_mistake(tmp_path: Path) -> None:
    """A worker that was stopped, and whose share another has taken over and finished, commits what it had."""
    stale, other = store(tmp_path), store(tmp_path)
    stale.commit(0, 0, 1, 0b1, numbers(1))
    other.finish(0, 0, 1, 7)
    stale.commit(0, 0, 1, 0b11, numbers(1))
    assert other.covers() == [{1: None}, {}]


def test_a_guard_is_asked_before_anything_is_seen(tmp_path: Path) -> None:
    found = store(tmp_path)
    found.commit(0, 0, 1, 0b1, numbers(1))

    def guard() -> None:
        assert any(name.endswith(".tmp") for name in names(tmp_path)), "all is written by then"
        raise ValueError("not ours any more")

    found.guard = guard
    for store_ in (found, found.of(1)):
        with pytest.raises(ValueError, match="not ours"):
            store_.commit(0, 0, 1, 0b11, numbers(1))
        with pytest.raises(ValueError, match="not ours"):
            store_.finish(0, 0, 1, 7)
    assert found.covers() == [{1: 0b1}, {}]
    assert names(tmp_path) == ["000-00-000000-000001.partial"]


def test_another_shares_files_are_left_alone(tmp_path: Path) -> None:
    first, second = store(tmp_path), store(tmp_path, share=1)
    first.commit(0, 0, 0, 1, numbers(0))
    (tmp_path / "partials" / FILE).write_bytes(b"damaged")
    writing = temporary_name(tmp_path / "partials" / FILE)
    writing.write_bytes(b"half")
    assert second.covers() == store(tmp_path, share=2).covers() == [{}, {}]
    assert names(tmp_path) == [FILE, writing.name]
    assert first.covers() == [{}, {}]
    assert names(tmp_path) == [FILE.replace(".partial", ".damaged"), writing.name]
