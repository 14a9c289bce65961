"""Bands against a dense mask, at any offset; and kernel calls: every visible score exactly once, and nothing else."""

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cqsa_stream.schedulers.masks.band import Band
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.masks.calls import Packed, Tile, calls
from cqsa_stream.schedulers.masks.window import CAUSAL, FULL, last_keys
from cqsa_stream.schedulers.runs import Runs

SIDE = 14
diagonals = st.none() | st.integers(-SIDE, SIDE)
bands = st.builds(
    lambda r, c, lo, hi: Band(r[0], r[0] + r[1], c[0], c[0] + c[1], lo, hi),
    st.tuples(st.integers(0, SIDE), st.integers(0, SIDE)),
    st.tuples(st.integers(0, SIDE), st.integers(0, SIDE)),
    diagonals,
    diagonals,
)
spans = st.tuples(st.integers(0, 2 * SIDE), st.integers(1, SIDE)).map(lambda t: range(t[0], t[0] + t[1]))
long_spans = st.tuples(st.integers(0, 50), st.integers(1, 50)).map(lambda t: range(t[0], t[0] + t[1]))
tiles = st.builds(
    Tile, st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans(),
    st.integers(0, 12), st.integers(1, 20),
)  # fmt: skip
offsets = st.integers(-(2**45), 2**45)
Seen = set[tuple[int, int]]


def dense(band: Band) -> Seen:
    """The pairs that a band lets through, from its definition."""
    return {
        (q, k)
        for q in range(band.r0, band.r1)
        for k in range(band.c0, band.c1)
        if (band.lo is None or k - q >= band.lo) and (band.hi is None or k - q <= band.hi)
    }


def disjoint(candidates: Iterable[Band]) -> tuple[list[Band], Seen]:
    """Take bands as long as none shows a query a key that it sees already."""
    kept: list[Band] = []
    seen: Seen = set()
    for band in candidates:
        if not dense(band) & seen:
            kept.append(band)
            seen |= dense(band)
    return kept, seen


lists = st.lists(bands, max_size=6).map(disjoint)


@given(lists, spans, spans, offsets, offsets, st.booleans())
def test_a_list_of_bands_is_its_dense_mask(
    found: tuple[list[Band], Seen], rows: range, keys: range, r: int, c: int, searched: bool
) -> None:
    """Short lists are walked and long ones searched: both do the same."""
    kept, seen = found
    moved_rows, moved_keys = range(rows.start + r, rows.stop + r), range(keys.start + c, keys.stop + c)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cqsa_stream.schedulers.masks.bands._FEW", -1 if searched else 16)
        mask = Mask(kept, "any").shifted(r, c)
        whole = mask.restricted(moved_rows, moved_keys)
    here = {(q, k) for q, k in seen if q in rows and k in keys}
    cut = list(whole)
    found_here = Counter((q - r, k - c) for band in cut for q, k in dense(band))
    assert found_here == dict.fromkeys(here, 1)
    assert mask.scores(moved_rows, moved_keys) == len(here)
    for band in cut:
        inside = dense(band)
        assert {q for q, _ in inside} == set(band.rows), "tight: each row sees a key"
        assert {k for _, k in inside} == set(band.columns), "tight: each key is seen"
        assert band.full == (len(inside) == len(band.rows) * len(band.columns))
        by_all = {k for k in band.columns if all((q, k) in inside for q in band.rows)}
        assert set(band.seen_by_all) == by_all
    by_all = {k for k in range(0, 4 * SIDE) if rows and all((q, k) in seen for q in rows)}
    assert {k - c for part in mask.seen_by_all(moved_rows) for k in part} <= by_all
    assert whole.scores(moved_rows, moved_keys) == len(here)
    assert set(mask.keys(moved_rows)) == {k + c for q, k in seen if q in rows}
    assert set(mask.transposed.keys(moved_keys)) == {q + r for q, k in seen if k in keys}
    assert Mask(mask, "any") == mask


@given(bands, bands, offsets, offsets)
def test_overlaps_are_refused(a: Band, b: Band, rows: int, keys: int) -> None:
    if dense(a) & dense(b):
        with pytest.raises(ValueError, match="overlap"):
            Mask([a.shifted(rows, keys), b.shifted(rows, keys)], "any")
    else:
        assert len(Mask([a.shifted(rows, keys), b.shifted(rows, keys)], "any")) <= 2


def test_counts_at_any_size_are_exact() -> None:
    """Sums of arithmetic progressions, spelled out."""
    n = 2**45
    everything = range(-(2**46), 2**47)
    assert CAUSAL.over(range(n), n).scores(everything, everything) == n * (n + 1) // 2
    assert FULL.over(range(n), n).scores(everything, everything) == n * n
    assert last_keys(4096).over(range(n), n).scores(everything, everything) == n * 4096 - 4096 * 4095 // 2
    assert last_keys(2048).over(range(n - 1, n), n).keys(range(n - 1, n)) == Runs([range(n - 2048, n)])


def test_a_window_of_2048_shows_1_2_and_so_on_keys() -> None:
    mask = last_keys(2048).over(range(5000), 5000)
    seen = [mask.scores(range(row, row + 1), range(5000)) for row in range(5000)]
    assert seen == [min(row + 1, 2048) for row in range(5000)]


@pytest.mark.parametrize("width", [0, -1])
def test_a_window_without_keys_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        last_keys(width).over(range(10), 10)


def check(mask: Mask, rows: range, columns: range, tile: Tile) -> None:
    visible = {pair for band in mask for pair in dense(band) if pair[0] in rows and pair[1] in columns}
    computed: Counter[tuple[int, int]] = Counter()
    for call in calls(mask, rows, columns, tile):
        if isinstance(call, Packed):
            last = 0
            for band in Mask.of_disjoint(call.here, "packed"):
                assert last <= band.r0, "bands of a call share no row"
                assert 0 <= band.c0 < band.c1 <= len(call.reach)
                last = band.r1
                computed.update((q + call.rows.start, k + call.reach.start) for q, k in dense(band))
            continue
        assert 0 < len(call.rows) <= tile.rows
        assert call.height * call.tiles == len(call.rows)
        both = None not in (call.left, call.right)
        if call.left is call.right is None:
            assert 0 < len(call.columns) <= tile.columns
        elif tile.skips and tile.bands and call.left is not None:
            assert 0 < len(call.columns) <= 2 * max(tile.columns, call.height)
        elif both:
            assert tile.bands
            assert call.height <= tile.edge
        else:
            assert (call.left, call.right) in ((None, 0), (0, None))
            assert len(call.columns) == call.height <= (tile.leaf if call.left is None else tile.edge)
        left, right = (10**9 if bound is None else bound for bound in (call.left, call.right))
        for t in range(call.tiles):
            for i, j in ((i, j) for i in range(call.height) for j in range(len(call.columns))):
                if -left <= j - i <= right:
                    computed[call.rows.start + t * call.height + i, call.columns.start + t * call.height + j] += 1
    assert computed == dict.fromkeys(visible, 1)
    assert mask.scores(rows, columns) == len(visible)


@given(long_spans, long_spans, st.integers(-60, 60), tiles)
def test_calls_of_a_causal_mask(rows: range, columns: range, q_start: int, tile: Tile) -> None:
    check(CAUSAL.over(range(q_start, q_start + 120), 120).shifted(-q_start, 0), rows, columns, tile)


@given(long_spans, long_spans, st.integers(-60, 60), st.integers(1, 130), tiles)
@example(range(4), range(6), 2, 3, Tile(4, 1, 1, 2))
def test_calls_of_a_window(rows: range, columns: range, q_start: int, width: int, tile: Tile) -> None:
    check(last_keys(width).over(range(q_start, q_start + 120), 120).shifted(-q_start, 0), rows, columns, tile)


@given(long_spans, long_spans, tiles)
def test_calls_of_a_full_mask(rows: range, columns: range, tile: Tile) -> None:
    check(FULL.over(range(120), 120), rows, columns, tile)


@given(lists, spans, spans, tiles)
def test_calls_of_any_list_of_bands(found: tuple[list[Band], Seen], rows: range, columns: range, tile: Tile) -> None:
    assume(found[0])
    check(Mask(found[0], "any"), rows, columns, tile)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)).map(lambda t: range(t[0], t[0] + t[1])), max_size=6))
def test_runs_are_a_set(parts: list[range]) -> None:
    runs = Runs(sorted(parts, key=lambda part: part.start))
    members = {n for part in parts for n in part}
    assert list(runs) == sorted(members)
    assert len(runs) == len(members)
    assert [n in runs for n in range(-1, 40)] == [n in members for n in range(-1, 40)]
    assert runs.bits == sum(1 << n for n in members)
    for n in range(-1, 40):
        assert runs.first_from(n) == min((m for m in members if m >= n), default=None)
    assert all(a.stop < b.start for a, b in zip(runs.ranges, runs.ranges[1:], strict=False))
