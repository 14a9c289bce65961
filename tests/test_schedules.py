"""Both schedules compute every needed pair exactly once, whatever the grid and the mask."""

from collections import Counter
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.masks.bands import mask_of
from cqsa_stream.schedulers.quorums import quorum_size, singer_numbers
from cqsa_stream.schedulers.schedules import NEVER, Cqs, Rectangular, Schedule, gaps, strides

SINGER = list(takewhile(lambda c: c <= 307, singer_numbers()))


def square(tokens: int, chunks: int, causal: bool) -> Grid:
    axis = Axis.cut(tokens, chunks)
    return Grid.of(axis, axis, mask_of(causal, tokens, 0).keys_seen, True)


def pairs(schedule: Schedule) -> Counter[tuple[int, int]]:
    tasks = list(schedule.tasks(3))
    assert len(tasks) == len(schedule)
    for task in tasks:
        assert task.lane == 3
        assert len(task.rows) <= schedule.rows_per_task
        assert set(task.rows) == {row for row, _ in task.pairs}
    return Counter(pair for task in tasks for pair in task.pairs)


def needed(grid: Grid) -> Counter[tuple[int, int]]:
    return Counter((a, b) for a, columns in enumerate(grid.needed) for b in columns)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunks", SINGER)
def test_cqs_covers_every_needed_pair_once(chunks: int, causal: bool) -> None:
    for tokens in (chunks * 4, chunks * 3 - 1, max(1, chunks // 2), 1):
        grid = square(tokens, chunks, causal)
        assert pairs(Cqs(grid)) == needed(grid)


@given(
    st.integers(1, 200), st.integers(1, 400), st.integers(1, 400), st.integers(-50, 400), st.booleans(),
    st.integers(1, 40), st.integers(1, 30),
)  # fmt: skip
def test_rectangular_covers_every_needed_pair_once(
    chunks: int, queries: int, keys: int, q_start: int, causal: bool, block: int, columns: int
) -> None:
    """Query slices and Nq != Nk are the same thing to a schedule: rows that stand somewhere along the keys."""
    mask = mask_of(causal, keys, q_start)
    grid = Grid.of(Axis.cut(queries, chunks), Axis.cut(keys, columns), mask.keys_seen, False)
    assert pairs(Rectangular(grid, block)) == needed(grid)


@pytest.mark.parametrize("causal", [False, True])
def test_rectangular_for_every_number_of_chunks(causal: bool) -> None:
    for chunks in range(1, 201):
        grid = square(613, chunks, causal)
        assert pairs(Rectangular(grid, 3)) == needed(grid)


def test_needed_pairs_are_those_with_a_visible_score() -> None:
    grid = square(100, 7, True)
    assert [len(columns) for columns in grid.needed] == [1, 2, 3, 4, 5, 6, 7]
    assert grid.pairs == 1 + 2 + 3 + 4 + 5 + 6 + 7
    assert square(100, 7, False).pairs == 49


def test_causal_cqs_tasks_are_equally_long() -> None:
    lengths = {sum(1 for _ in task.pairs) for task in Cqs(square(57 * 8, 57, True)).tasks(0)}
    assert lengths == {8 * 7 // 2 + 1}


def test_cqs_refuses_other_positions() -> None:
    grid = Grid.of(Axis.cut(10, 7), Axis.cut(20, 7), mask_of(False, 20, 0).keys_seen, False)
    with pytest.raises(ValueError, match="same positions"):
        Cqs(grid)


@given(st.sampled_from([7, 13, 21]), st.booleans(), st.data())
def test_what_is_covered_is_left_out(chunks: int, causal: bool, data: st.DataObject) -> None:
    grid = square(chunks * 2, chunks, causal)
    covers = {a: data.draw(st.integers(0, (1 << chunks) - 1)) & grid.complete_cover(a) for a in range(chunks)}
    left = Counter(pair for task in Cqs(grid).tasks(0) for pair in task.without(covers).pairs)
    assert left == Counter({(a, b): 1 for a, b in needed(grid) if not covers[a] >> b & 1})


@given(st.sampled_from(SINGER[:6]), st.integers(1, 5), st.booleans(), st.data())
def test_next_use_is_the_next_task_with_the_chunk(chunks: int, block: int, causal: bool, data: st.DataObject) -> None:
    grid = square(chunks, chunks, causal)
    stride = data.draw(st.sampled_from(strides(chunks)))
    for schedule in (Cqs(grid, stride), Rectangular(grid, block)):
        tasks = list(schedule.tasks(0))
        for chunk in range(0, chunks, 3):
            for after in range(0, len(schedule), 4):
                rows = [i for i, task in enumerate(tasks) if chunk in task.rows and i > after]
                columns = [i for i, task in enumerate(tasks) if chunk in task.columns and i > after]
                assert schedule.next_row(chunk, after) <= min(rows, default=NEVER)
                if chunk in tasks[after].columns:
                    assert schedule.next_column(chunk, after) <= min(columns, default=NEVER)
                if not causal:
                    assert schedule.next_row(chunk, after) == min(rows, default=NEVER)
                    assert schedule.next_column(chunk, after) == min(columns, default=NEVER)


@pytest.mark.parametrize("chunks", SINGER[:8])
def test_every_stride_is_an_order_of_the_same_quorums(chunks: int) -> None:
    grid = square(chunks, chunks, True)
    for stride in strides(chunks):
        assert pairs(Cqs(grid, stride)) == needed(grid)
        between = gaps(chunks, stride)
        assert sum(between) == chunks
        assert len(set(between)) == len(between) == quorum_size(chunks), "no two gaps of a difference set are equal"
    assert strides(chunks)[0] == 1


@pytest.mark.parametrize("causal", [False, True])
def test_loads_count_the_tasks_that_hold_a_chunk(causal: bool) -> None:
    grid = square(57 * 4 - 30, 57, causal)
    for schedule in (Cqs(grid), Rectangular(grid, 5)):
        rows = Counter(row for task in schedule.tasks(0) for row in task.rows)
        columns = Counter(column for task in schedule.tasks(0) for column in task.columns)
        found = schedule.loads()
        if schedule.name == "rectangular":
            assert found == ([rows[i] for i in range(57)], [columns[i] for i in range(57)])
        assert sum(found[0]) == pytest.approx(rows.total(), rel=0.05)
        assert sum(found[1]) == pytest.approx(columns.total(), rel=0.05)


@given(st.integers(1, 10**9), st.integers(1, 2000))
def test_chunks_tile_the_axis(tokens: int, chunks: int) -> None:
    axis = Axis.cut(tokens, chunks)
    assert axis.chunks * axis.chunk_tokens >= tokens
    assert axis.chunk_tokens <= -(-tokens // chunks) * 17 // 16 + 1
    spans = [axis.span(i) for i in (0, 1, chunks // 2, chunks - 1)]
    assert all(0 <= span.start <= span.stop <= tokens for span in spans)
    assert axis.span(0).start == 0
    assert max(axis.span(i).stop for i in range(chunks)) == tokens
