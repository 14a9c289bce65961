"""Kernel calls cover every visible score exactly once, and nothing else."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cqsa_stream.schedulers.masks.bands import Causal, Full, Mask
from cqsa_stream.schedulers.model.memory import Tile

spans = st.tuples(st.integers(0, 50), st.integers(1, 50)).map(lambda t: range(t[0], t[0] + t[1]))
tiles = st.builds(Tile, st.integers(1, 20), st.integers(1, 20), st.integers(1, 9))


def check(mask: Mask, rows: range, columns: range, tile: Tile) -> None:
    visible = {(i, j) for i in rows for j in columns if j in mask.seen_by(i)}
    computed: Counter[tuple[int, int]] = Counter()
    for call in mask.calls(rows, columns, tile):
        assert 0 < len(call.rows) <= tile.rows
        assert 0 < len(call.columns) <= (tile.columns if call.mask == "full" else tile.rows)
        assert call.mask == "full" or len(call.rows) == len(call.columns) <= call.tiles * tile.leaf
        height, width = len(call.rows) // call.tiles, len(call.columns) // call.tiles
        assert (height * call.tiles, width * call.tiles) == (len(call.rows), len(call.columns))
        for t in range(call.tiles):
            for x, i in enumerate(call.rows[t * height : (t + 1) * height]):
                keys = call.columns[t * width : (t + 1) * width]
                computed.update((i, j) for y, j in enumerate(keys) if call.mask == "full" or y <= x)
    assert computed == dict.fromkeys(visible, 1)
    assert mask.scores(rows, columns) == len(visible)


@given(spans, spans, st.integers(-60, 60), tiles)
def test_causal(rows: range, columns: range, q_start: int, tile: Tile) -> None:
    check(Causal(120, q_start), rows, columns, tile)


@given(spans, spans, tiles)
def test_full(rows: range, columns: range, tile: Tile) -> None:
    check(Full(120), rows, columns, tile)


@given(spans, st.integers(-60, 60))
def test_keys_seen_is_the_union_over_the_rows(rows: range, q_start: int) -> None:
    mask = Causal(40, q_start)
    seen = {key for row in rows for key in mask.seen_by(row)}
    assert set(mask.keys_seen(rows)) == seen
