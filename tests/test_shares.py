"""Shares: all tasks, each once, about equally dealt out, whatever the schedule, the mask and the numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqsa_stream.schedulers.cqs import Cqs
from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.masks.rule import Rule
from cqsa_stream.schedulers.masks.window import CAUSAL, FULL, last_keys
from cqsa_stream.schedulers.rectangular import Rectangular
from cqsa_stream.schedulers.shares import Share, deal
from cqsa_stream.schedulers.tasks import Schedule

RULES = {"full": FULL, "causal": CAUSAL, "window": last_keys(900)}


def schedule_of(kind: str, rule: Rule, rows: int, columns: int, per_task: int) -> Schedule:
    tokens = 256 * rows
    same = rows == columns
    axes = Axis(tokens, 256, rows), Axis(tokens, -(-tokens // columns), columns)
    grid = Grid(*axes, rule.over(range(tokens), tokens), same)
    return Cqs(grid) if kind == "cqs" else Rectangular(grid, per_task)


schedules = st.one_of(
    st.builds(schedule_of, st.just("cqs"), st.sampled_from([FULL, CAUSAL]), st.just(13), st.just(13), st.just(1)),
    st.builds(
        schedule_of, st.just("rectangular"), st.sampled_from(list(RULES.values())), st.integers(1, 40),
        st.integers(1, 40), st.integers(1, 9),
    ),
)  # fmt: skip


@given(schedule=schedules, lanes=st.integers(1, 3), count=st.integers(1, 70))
def test_all_pairs_once_and_in_order(schedule: Schedule, lanes: int, count: int) -> None:
    whole = [
        (lane, pair) for lane in range(lanes) for t in range(len(schedule)) for pair in schedule.task(t, lane).pairs
    ]
    dealt = [
        (lane, pair)
        for number in range(count)
        for lane in range(lanes)
        for task in Share(number, count).tasks(schedule, lane, lanes)
        for pair in task.pairs
    ]
    assert sorted(dealt) == sorted(whole)
    if lanes == 1:
        assert dealt == whole


@given(schedule=schedules, lanes=st.integers(1, 3), count=st.integers(1, 70))
def test_no_share_is_idle_where_there_are_tasks(schedule: Schedule, lanes: int, count: int) -> None:
    tasks = [
        sum(1 for lane in range(lanes) for _ in Share(number, count).tasks(schedule, lane, lanes))
        for number in range(count)
    ]
    if lanes * len(schedule) >= count:
        assert min(tasks) >= 1
        assert sum(tasks) == lanes * len(schedule), "a task lies in one share"


@given(schedule=schedules, lanes=st.integers(1, 3), count=st.integers(1, 40), workers=st.integers(1, 9))
def test_every_worker_takes_all_shares_its_own_first(schedule: Schedule, lanes: int, count: int, workers: int) -> None:
    orders = [deal(schedule, lanes, count, worker, workers) for worker in range(workers)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    owned = [order[: len(range(worker, count, workers))] for worker, order in enumerate(orders)]
    assert sorted(number for own in owned for number in own) == list(range(count))


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("rule", RULES)
def test_shares_of_many_tasks_have_equal_work(rule: str, count: int) -> None:
    schedule = schedule_of("rectangular", RULES[rule], 200, 200, 1)
    pairs = [
        sum(len(list(task.pairs)) for task in Share(number, count).tasks(schedule, 0, 1)) for number in range(count)
    ]
    assert np.ptp(pairs) <= 2 * 200, "no more than two rows of it"


@pytest.mark.parametrize("count", [4, 16])
def test_few_rows_are_cut_by_columns(count: int) -> None:
    schedule = schedule_of("rectangular", FULL, 2, 32, 2)
    assert len(schedule) == 1
    parts = [[task.columns for task in Share(number, count).tasks(schedule, 0, 1)] for number in range(count)]
    assert parts == [[tuple(range(n * 32 // count, (n + 1) * 32 // count))] for n in range(count)]
