"""Both schedules compute every needed pair exactly once, whatever the grid and the mask."""

from collections import Counter
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqsa_stream.schedulers.cqs import Cqs, gaps, strides
from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.masks.window import CAUSAL, FULL, last_keys
from cqsa_stream.schedulers.quorums import quorum_size, singer_numbers
from cqsa_stream.schedulers.rectangular import Rectangular
from cqsa_stream.schedulers.tasks import NEVER, Schedule, Task

SINGER = list(takewhile(lambda c: c <= 307, singer_numbers()))


def mask_of(causal: bool, keys: int, q_start: int, queries: int) -> Mask:
    positions = range(q_start, q_start + queries)
    return (CAUSAL if causal else FULL).over(positions, keys).shifted(-q_start, 0)


def square(tokens: int, chunks: int, causal: bool) -> Grid:
    axis = Axis.cut(tokens, chunks)
    return Grid(axis, axis, mask_of(causal, tokens, 0, tokens), True)


def pairs(schedule: Schedule) -> Counter[tuple[int, int]]:
    tasks = [schedule.task(number, 3) for number in range(len(schedule))]
    assert len(tasks) == len(schedule)
    for task in tasks:
        assert task.lane == 3
        assert len(task.rows) <= schedule.rows_per_task
        assert set(task.rows) == {row for row, _ in task.pairs}
    return Counter(pair for task in tasks for pair in task.pairs)


def tasks_of(schedule: Schedule) -> list[Task]:
    return [schedule.task(number, 0) for number in range(len(schedule))]


def needed(grid: Grid) -> Counter[tuple[int, int]]:
    return Counter((a, b) for a in range(grid.rows.chunks) for b in grid.needed(a))


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
    mask = mask_of(causal, keys, q_start, queries)
    grid = Grid(Axis.cut(queries, chunks), Axis.cut(keys, columns), mask, False)
    assert pairs(Rectangular(grid, block)) == needed(grid)


@pytest.mark.parametrize("causal", [False, True])
def test_rectangular_for_every_number_of_chunks(causal: bool) -> None:
    for chunks in range(1, 201):
        grid = square(613, chunks, causal)
        assert pairs(Rectangular(grid, 3)) == needed(grid)


def test_needed_pairs_are_those_with_a_visible_score() -> None:
    grid = square(100, 7, True)
    assert [len(grid.needed(a)) for a in range(7)] == [1, 2, 3, 4, 5, 6, 7]
    assert grid.pairs == 1 + 2 + 3 + 4 + 5 + 6 + 7
    assert square(100, 7, False).pairs == 49


def test_causal_cqs_tasks_are_equally_long() -> None:
    lengths = {sum(1 for _ in task.pairs) for task in tasks_of(Cqs(square(57 * 8, 57, True)))}
    assert lengths == {8 * 7 // 2 + 1}


def test_cqs_refuses_other_positions() -> None:
    grid = Grid(Axis.cut(10, 7), Axis.cut(20, 7), mask_of(False, 20, 0, 10), False)
    with pytest.raises(ValueError, match="same positions"):
        Cqs(grid)


@given(st.sampled_from([7, 13, 21]), st.booleans(), st.data())
def test_what_is_covered_is_left_out(chunks: int, causal: bool, data: st.DataObject) -> None:
    grid = square(chunks * 2, chunks, causal)
    covers = {a: data.draw(st.integers(0, (1 << chunks) - 1)) & grid.complete_cover(a) for a in range(chunks)}
    left = Counter(
        pair for task in tasks_of(Cqs(grid)) for pair in task.only(lambda a, b: not covers[a] >> b & 1).pairs
    )
    assert left == Counter({(a, b): 1 for a, b in needed(grid) if not covers[a] >> b & 1})


@given(st.sampled_from(SINGER[:6]), st.integers(1, 5), st.booleans(), st.data())
def test_next_use_is_the_next_task_with_the_chunk(chunks: int, block: int, causal: bool, data: st.DataObject) -> None:
    grid = square(chunks, chunks, causal)
    stride = data.draw(st.sampled_from(strides(chunks)))
    for schedule in (Cqs(grid, stride), Rectangular(grid, block)):
        tasks = tasks_of(schedule)
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


@given(st.integers(1, 60), st.integers(1, 300), st.integers(1, 300), st.integers(1, 80), st.integers(1, 9), st.data())
def test_windows_are_covered_and_their_chunks_come_back_when_they_should(
    chunks: int, queries: int, keys: int, width: int, block: int, data: st.DataObject
) -> None:
    q_start = data.draw(st.integers(-20, keys))
    mask = last_keys(width).over(range(q_start, q_start + queries), keys).shifted(-q_start, 0)
    grid = Grid(Axis.cut(queries, chunks), Axis.cut(keys, 11), mask, False)
    schedule = Rectangular(grid, block)
    assert pairs(schedule) == needed(grid)
    tasks = tasks_of(schedule)
    for column in range(11):
        assert set(grid.needing(column)) == {a for a in range(chunks) if column in grid.needed(a)}
        for after in range(len(schedule)):
            later = [task.number for task in tasks if column in task.columns and task.number > after]
            assert schedule.next_column(column, after) == min(later, default=NEVER)


@pytest.mark.parametrize("chunks", SINGER[:6])
@pytest.mark.parametrize("width", [1, 2, 7, 50, 10_000])
def test_cqs_covers_windows(chunks: int, width: int) -> None:
    tokens = chunks * 5 - 3
    axis = Axis.cut(tokens, chunks)
    grid = Grid(axis, axis, last_keys(width).over(range(tokens), tokens), True)
    assert pairs(Cqs(grid)) == needed(grid)


@given(st.integers(1, 10**9), st.integers(1, 2000))
def test_chunks_tile_the_axis(tokens: int, chunks: int) -> None:
    axis = Axis.cut(tokens, chunks)
    assert axis.chunks * axis.chunk_tokens >= tokens
    assert axis.chunk_tokens <= -(-tokens // chunks) * 17 // 16 + 1
    spans = [axis.span(i) for i in (0, 1, chunks // 2, chunks - 1)]
    assert all(0 <= span.start <= span.stop <= tokens for span in spans)
    assert axis.span(0).start == 0
    assert max(axis.span(i).stop for i in range(chunks)) == tokens
