"""The planner: sums spelled out, budgets kept, the smallest feasible budget found. No disk, no torch tensors."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqsa_stream.machine.habits import CUDA, HOST
from cqsa_stream.schedulers.cqs import Cqs
from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.masks.calls import Tile
from cqsa_stream.schedulers.masks.window import CAUSAL, FULL, last_keys
from cqsa_stream.schedulers.model import traffic as traffic_model
from cqsa_stream.schedulers.model.memory import (
    Layout,
    Workload,
    footprint,
    partial_bytes,
    partial_file_bytes,
    segments,
)
from cqsa_stream.schedulers.model.rates import Rates, Speeds, TileTimes
from cqsa_stream.schedulers.model.seconds import cost, kernel_s
from cqsa_stream.schedulers.model.traffic import Stored, Traffic
from cqsa_stream.schedulers.rectangular import Rectangular
from cqsa_stream.schedulers.request import Machine, Request
from cqsa_stream.schedulers.schedules import make_schedule
from cqsa_stream.schedulers.search import make_plan, plan_again
from cqsa_stream.schedulers.tasks import Schedule

MIB = 2**20
TILES = TileTimes.nominal(1e11, 128, 1e-4)
SPEEDS = Speeds(
    read_bytes_per_s=1e9, write_bytes_per_s=5e8, stage_bytes_per_s=4e9, touch_bytes_per_s=4e9, file_s=2e-3,
    file_lost_s=1e-3, block_s=1e-4, read_cpu_s=2e-10, check_cpu_s=1e-9, expand_cpu_s=4e-9,
)  # fmt: skip
RATES = Rates(TILES, SPEEDS)
HABITS = dataclasses.replace(HOST, block_tokens=8_192)
TILE = Tile(16_384, 4_096, 1_024, 256)
MACHINE = Machine(
    kernel="torch-cpu", operator="flash", habits=HABITS, device_allowed_bytes=None, host_allowed_bytes=256 * MIB,
    host_reserved_bytes=20 * MIB, rates=RATES, measured=RATES, tile=TILE, step_flops=2e11,
)  # fmt: skip


def request(
    tokens: int,
    *,
    causal: bool = False,
    group: int = 1,
    queries: int | None = None,
    durable: bool = True,
    chunk: int = 1,
    window: int | None = None,
) -> Request:
    rows = tokens if queries is None else queries
    mask = masked(tokens, rows, causal=causal)
    if window is not None:
        mask = last_keys(window).over(range(tokens - rows, tokens), tokens).shifted(rows - tokens, 0)
    stored = Stored(tokens, chunk, 1, 256, encoding="raw" if chunk == 1 else "compressed")
    work = Workload(
        lanes=2, group=group, head_dim=64, value_dim=64, stored_itemsize=4, compute_itemsize=4, out_itemsize=4,
        row_bytes=group * (64 * 4 + 8), left_bytes=group * (64 * 4 + 4),
        flops=2 * 128 * mask.scores(range(rows), range(tokens)) * 2 * group, staging_bytes=0, durable=durable,
        resident_output_bytes=0,
    )  # fmt: skip
    arrays = (dataclasses.replace(stored, heads_fetched=group, first=tokens - rows), stored, stored)
    return Request(work, rows, tokens, rows == tokens, mask, arrays)


def masked(tokens: int, rows: int, *, causal: bool) -> Mask:
    """The mask of the last rows, counted from 0."""
    positions = range(tokens - rows, tokens)
    return (CAUSAL if causal else FULL).over(positions, tokens).shifted(rows - tokens, 0)


def exactly(wanted: Request, schedule: Schedule, layout: Layout) -> Traffic:
    return traffic_model.moved(wanted.work, schedule, layout, wanted.arrays)


def allowed(host: int) -> Machine:
    return dataclasses.replace(MACHINE, host_allowed_bytes=host)


def test_the_memory_model_is_a_sum() -> None:
    work = request(700).work
    axis = Axis(700, 100, 7)
    layout = Layout(
        rows_per_task=3, query_places=3, resident_rows=7, block_tokens=50, query_tokens=50, slot_bytes=50 * 64 * 4,
        ring_slots=4, cache_slots=5, tile=Tile(16_384, 50, 50, 50), out_tokens=25,
    )  # fmt: skip
    held = footprint(work, axis, axis, layout, 7, HOST, 1000)
    host = held.pageable
    assert held.device == held.pinned == {}
    assert host["queries"] == 3 * 100 * 64 * 4
    assert host["partials"] == 7 * 100 * (64 * 4 + 8) == 7 * partial_bytes(work, 100)
    assert host["ring"] == 4 * 50 * 64 * 4
    assert host["cache"] == 5 * 50 * 64 * 4
    assert host["tile"] == 100 * (64 * 4 + 4 + 5 * 8)
    assert host["writing"] == 25 * 3 * 64 * 4 + 8 * 100
    assert (host["upcast"], host["reading"], host["output"], host["reserved"]) == (0, 0, 0, 1000)
    assert held.disk["output"] == 2 * 700 * (64 * 4 + 4)
    assert held.disk["partials"] == (7 + 1) * (4096 + 1 + 100 * 264) + 2 * 7 * 4096
    assert partial_file_bytes(work, 100, 7) == 4096 + 1 + 100 * 264
    half = dataclasses.replace(work, stored_itemsize=2)
    assert footprint(half, axis, axis, layout, 7, HOST, 0).pageable["upcast"] == 50 * 128 * 4
    cuda = footprint(half, axis, axis, layout, 7, CUDA, 1000)
    assert cuda.device_bytes == 2 * MIB + 2 * MIB  # all of it small: one segment, and one for the call
    assert cuda.device["leaving"] == 100 * (64 * 4 + 4) + 2 * 4096
    assert set(cuda.pinned) == {"ring", "cache", "leaving", "partials"}
    leaving = footprint(half, axis, axis, dataclasses.replace(layout, leaving_rows=3), 7, CUDA, 1000)
    assert leaving.pinned["leaving"] == 3 * (100 * 260 + 2 * 4096)
    assert cuda.pageable["partial staging"] == 100 * 264
    assert cuda.pinned["partials"] == 0
    parked = footprint(half, axis, axis, dataclasses.replace(layout, parked_rows=2), 7, CUDA, 1000)
    assert parked.pinned["partials"] == 2 * (100 * 264 + 2 * 4096)
    assert cuda.host_bytes == sum(cuda.pinned.values()) + sum(cuda.pageable.values())
    assert footprint(dataclasses.replace(work, durable=False), axis, axis, layout, 7, HOST, 0).disk_bytes == 0


def forced(tokens: int, schedule: str, *, causal: bool = False, **more: int) -> Layout:
    axis = Axis.cut(tokens, 7)
    fields = {"rows_per_task": 3, "query_places": 3, "resident_rows": 7, "block_tokens": axis.chunk_tokens,
              "ring_slots": 4, "query_tokens": axis.chunk_tokens, "cache_slots": 0, "out_tokens": axis.chunk_tokens,
              "slot_bytes": axis.chunk_tokens * 256, **more}  # fmt: skip
    return Layout(tile=TILE, **fields)


def moved(tokens: int, schedule: str, layout: Layout, *, causal: bool = False) -> Traffic:
    wanted = request(tokens, causal=causal)
    axis = Axis.cut(tokens, 7)
    grid = Grid(axis, axis, wanted.mask, True)
    return exactly(wanted, make_schedule(schedule, grid, layout), layout)


def test_what_is_used_again_is_read_again_unless_there_is_room() -> None:
    tokens, lanes, row = 7 * 4096, 2, 256
    alone = forced(tokens, "rectangular", rows_per_task=1)
    assert moved(tokens, "rectangular", alone).fetched_bytes == lanes * row * (tokens + 2 * 7 * tokens)
    cached = dataclasses.replace(alone, cache_slots=14)
    assert moved(tokens, "rectangular", cached).fetched_bytes == lanes * row * 3 * tokens, "each byte once"
    some = dataclasses.replace(alone, cache_slots=5)
    found = lanes * row * (tokens + 2 * 7 * tokens) - moved(tokens, "rectangular", some).fetched_bytes
    hits = found / (lanes * row * 4096)
    assert 6 * 5 <= hits <= 6 * (5 + 4), "from the second task on, as many blocks as there are slots for"


def test_cqs_uses_every_chunk_in_k_tasks() -> None:
    tokens = 7 * 4096
    found = moved(tokens, "cqs", forced(tokens, "cqs", ring_slots=1))
    assert found.query_tokens == found.key_tokens == 2 * 3 * tokens
    assert found.fetched_bytes == 2 * 3 * 3 * tokens * 256
    assert found.spills == found.restored_bytes == 0
    spilling = moved(tokens, "cqs", forced(tokens, "cqs", resident_rows=3))
    assert spilling.spilled_bytes == spilling.restored_bytes > 0
    assert spilling.spilled_bytes == spilling.spills * (4096 + 1 + 4096 * 264)
    assert spilling.finished_bytes == 2 * (tokens * 260 + 7 * 4096)


@given(
    st.sampled_from([57, 73, 91, 133]), st.booleans(), st.integers(0, 60), st.integers(0, 60), st.booleans(),
    st.sampled_from([1, 900]), st.sampled_from([None, None, 100, 3_000]),
)  # fmt: skip
def test_estimates_are_near_what_is_counted(
    chunks: int, causal: bool, spare: int, cache: int, rectangular: bool, stored: int, window: int | None
) -> None:
    tokens = chunks * 512
    rectangular |= window is not None
    wanted = request(tokens, causal=causal, chunk=stored, window=window)
    axis = Axis.cut(tokens, chunks)
    grid = Grid(axis, axis, wanted.mask, True)
    rows = min(4, chunks) if rectangular else Cqs(grid).rows_per_task
    layout = dataclasses.replace(
        forced(tokens, "cqs"), rows_per_task=rows, resident_rows=min(chunks, rows + spare), block_tokens=256,
        query_tokens=512, slot_bytes=512 * 256, cache_slots=cache,
    )  # fmt: skip
    schedule = Rectangular(grid, rows) if rectangular else Cqs(grid)
    exact = exactly(wanted, schedule, layout)
    guess = traffic_model.moved(wanted.work, schedule, layout, wanted.arrays, exactly=False)
    assert guess.fetched_bytes == pytest.approx(exact.fetched_bytes, rel=0.4)
    assert guess.query_tokens == pytest.approx(exact.query_tokens, rel=0.2)
    assert guess.key_tokens == pytest.approx(exact.key_tokens, rel=0.2)
    assert guess.finished_bytes == exact.finished_bytes
    if rectangular or layout.resident_rows >= chunks:
        assert guess.spills == exact.spills == 0


def test_the_kernel_time_is_that_of_the_calls() -> None:
    wanted, tokens = request(7 * 2048), 7 * 2048
    axis = Axis.cut(tokens, 7)
    grid = Grid(axis, axis, wanted.mask, True)
    layout = forced(tokens, "rectangular")
    assert kernel_s(wanted.work, grid, layout, TILES) == pytest.approx(2 * 49 * TILES.tile_s(2048, 2048))
    causal = request(tokens, causal=True)
    grid = Grid(axis, axis, causal.mask, True)
    diagonal = 2 * TILES.tile_s(1024, 1024) * TILES.stacked + TILES.tile_s(1024, 1024)  # two triangles and a square
    expected = 2 * (21 * TILES.tile_s(2048, 2048) + 7 * diagonal)
    assert kernel_s(causal.work, grid, layout, TILES) == pytest.approx(expected)


def test_times_between_the_measured_sizes_follow_power_laws() -> None:
    times = TileTimes((100, 1000), (10, 1000), ((1.0, 100.0), (10.0, 1000.0)), 0.5, 0.4)
    assert times.tile_s(100, 10) == pytest.approx(1.0)
    assert times.tile_s(1000, 100) == pytest.approx(100.0)
    assert times.tile_s(10_000, 1000) == pytest.approx(10_000.0), "beyond the largest as before it"
    assert times.tile_s(1, 1) == pytest.approx(1.0), "below the smallest as the smallest"
    assert times.call_s(100, 10, causal=True, tiles=1) == pytest.approx(0.5)
    assert times.call_s(100, 10, causal=True, tiles=3) == pytest.approx(3 * 0.4)
    assert times.best_rows() == 100
    assert dataclasses.replace(times, seconds=((1.0, 100.0), (10.0, 900.0))).best_rows() == 1000
    assert times.scaled(2).tile_s(100, 10) == pytest.approx(2.0)


def test_threads_wait_for_the_one_with_the_most_rows() -> None:
    times = TileTimes((64, 4096), (64, 4096), ((1.0, 64.0), (64.0, 4096.0)), 1.0, 1.0, threads=2)
    assert times.tile_s(1024, 64) == pytest.approx(16.0), "2 blocks of 256 for each of 2 threads"
    assert times.tile_s(1025, 64) == pytest.approx(24.0), "one more row: 3 blocks for one of them"


def test_a_run_takes_as_long_as_the_slowest_of_what_overlaps() -> None:
    wanted = request(7 * 2048)
    axis = Axis.cut(7 * 2048, 7)
    grid = Grid(axis, axis, wanted.mask, True)
    layout = forced(7 * 2048, "rectangular", rows_per_task=1, resident_rows=2)
    schedule = make_schedule("rectangular", grid, layout)
    traffic = exactly(wanted, schedule, layout)

    def seconds(kernel: float, **speeds: float) -> float:
        told = Rates(TILES, dataclasses.replace(SPEEDS, **speeds))
        found = cost(wanted.work, schedule, layout, traffic, kernel, told, 60.0, traffic.fetched_bytes, 0)
        return found.seconds

    assert seconds(10.0) == pytest.approx(10.0, rel=0.02), "reading and writing hide behind the kernel"
    slow_disk = traffic.fetched_bytes / 1e6
    assert seconds(10.0, read_bytes_per_s=1e6) == pytest.approx(slow_disk, rel=0.1), "the kernel hides behind the disk"
    assert seconds(10.0, file_s=1.0) == pytest.approx(2 * 7 * 3 + 3, rel=0.02), "three files for each finished row"
    assert seconds(100.0) > 100.0 + SPEEDS.file_s, "a checkpoint after 60 s"


def test_bytes_of_a_full_rectangular_plan() -> None:
    plan = make_plan(dataclasses.replace(request(7000), schedule="rectangular", chunks=7), MACHINE)
    assert plan.layout.rows_per_task == 7
    assert plan.tasks == 2
    assert plan.cost.bytes_read == 2 * (1 + 1 + 1) * 7000 * 256
    assert plan.cost.bytes_written == 2 * (7000 * (256 + 4) + 7 * 4096)
    assert plan.pairs == 2 * 49


def test_compressed_chunks_come_whole() -> None:
    stored = Stored(axis_tokens=1000, chunk_tokens=300, heads_fetched=2, row_bytes=10, encoding="compressed")
    assert stored.fetched_bytes(range(0, 300)) == 300 * 20
    assert stored.fetched_bytes(range(299, 301)) == 600 * 20
    assert stored.fetched_bytes(range(850, 1000)) == (300 + 100) * 20
    assert stored.fetched_bytes(range(0)) == 0
    assert dataclasses.replace(stored, first=250).fetched_bytes(range(0, 50)) == 300 * 20


def test_chunks_with_a_checksum_come_whole_once() -> None:
    stored = Stored(900, 300, 2, row_bytes=10, encoding="checked", heads_checked=2, heads_first=2)
    assert stored.fetched_bytes(range(99, 101)) == 2 * 20
    assert list(stored.chunks(range(299, 301))) == [0, 1]
    assert stored.rest_bytes(range(299, 301), 0) == 299 * 20
    shared = dataclasses.replace(stored, heads_checked=4)
    assert shared.rest_bytes(range(0, 300), 0) == 300 * 20, "the other heads of the chunk come with it"
    assert list(dataclasses.replace(stored, first=1).chunks(range(299, 301))) == [1]
    assert list(dataclasses.replace(stored, encoding="raw").chunks(range(299, 301))) == []


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
def test_the_first_read_of_a_chunk_takes_the_rest_of_it_too(schedule: str) -> None:
    tokens, row = 7 * 4096, 256
    layout = forced(tokens, schedule, ring_slots=1, rows_per_task=3 if schedule == "cqs" else 1)
    wanted = request(tokens)
    query, key, value = (
        dataclasses.replace(
            a, encoding="checked", chunk_tokens=2 * 4096, axis_tokens=8 * 4096, heads_checked=1, heads_first=1
        )
        for a in wanted.arrays
    )
    axis = Axis.cut(tokens, 7)
    grid = Grid(axis, axis, wanted.mask, True)
    plain = moved(tokens, schedule, layout).fetched_bytes
    checked = dataclasses.replace(wanted, arrays=(query, key, value))
    found = exactly(checked, make_schedule(schedule, grid, layout), layout)
    assert found.fetched_bytes == plain + 2 * 3 * 4 * 4096 * row, "for each of 4 chunks of each array the other half"
    assert found.checked_bytes == found.fetched_bytes


def test_a_window_is_read_where_it_is() -> None:
    """A window of 4 of 57 chunks: each row chunk meets its own and the 4 before it."""
    tokens, size = 57 * 512, 512
    wanted = request(tokens, causal=True)
    mask = last_keys(4 * size + 1).over(range(tokens), tokens)
    wanted = dataclasses.replace(wanted, mask=mask)
    axis = Axis(tokens, size, 57)
    grid = Grid(axis, axis, mask, True)
    assert grid.pairs == 1 + 2 + 3 + 4 + 53 * 5
    for schedule in (Cqs(grid), Rectangular(grid, 1)):
        layout = dataclasses.replace(forced(tokens, "cqs"), rows_per_task=schedule.rows_per_task, resident_rows=57,
                                     block_tokens=size, query_tokens=size, slot_bytes=size * 256)  # fmt: skip
        tasks = [schedule.task(number, 0) for number in range(len(schedule))]
        exact, guess = (
            traffic_model.moved(wanted.work, schedule, layout, wanted.arrays, exactly=it) for it in (True, False)
        )
        assert exact.key_tokens == 2 * 2 * size * sum(len(task.columns) for task in tasks) // 2
        assert exact.query_tokens == 2 * size * sum(len(task.rows) for task in tasks)
        assert guess.key_tokens == pytest.approx(exact.key_tokens, rel=0.25)
        assert guess.query_tokens == pytest.approx(exact.query_tokens, rel=0.25)
    scores = tokens * (4 * size + 1) - (4 * size) * (4 * size + 1) // 2
    assert mask.scores(range(tokens), range(tokens)) == scores
    plan = make_plan(wanted, MACHINE)
    assert plan.schedule == "rectangular", "under a window the tasks of CQS are not equal"


def test_a_layout_that_was_used_is_used_again_while_it_fits() -> None:
    first = make_plan(request(50_000, causal=True), MACHINE)
    begun = dataclasses.replace(request(50_000, causal=True), grid=first.grid, out_tokens=first.layout.out_tokens)
    slow = dataclasses.replace(SPEEDS, read_bytes_per_s=1e6, block_s=1.0)
    fewer = dataclasses.replace(TILE, rows=2_048)
    other = dataclasses.replace(allowed(2**40), rates=Rates(TILES.scaled(9), slow), tile=fewer)
    again = plan_again(begun, other, first.schedule, first.layout)
    assert again is not None
    assert (again.schedule, again.layout) == (first.schedule, first.layout)
    assert make_plan(begun, other).layout != first.layout
    assert plan_again(begun, allowed(first.least.host_bytes), first.schedule, first.layout) is None
    little = dataclasses.replace(MACHINE, host_free_bytes=first.footprint.host_bytes - 1)
    assert plan_again(begun, little, first.schedule, first.layout) is None


@pytest.mark.parametrize("change", [
    {"ring_slots": 1}, {"ring_slots": 3}, {"parked_rows": 1}, {"resident_columns": 2}, {"block_tokens": 1},
    {"tile": dataclasses.replace(TILE, columns=1)}, {"tile": dataclasses.replace(TILE, leaf=1)},
    {"tile": dataclasses.replace(TILE, edge=1)}, {"tile": dataclasses.replace(TILE, rows=1)},
    {"tile": dataclasses.replace(TILE, bands=True)},
], ids=str)  # fmt: skip
def test_a_layout_that_no_plan_has_is_not_used(change: dict[str, Any]) -> None:
    """One slot of the ring would be waited for without end, and tiles of one key would take for ever."""
    first = make_plan(request(50_000, causal=True), MACHINE)
    begun = dataclasses.replace(request(50_000, causal=True), grid=first.grid, out_tokens=first.layout.out_tokens)
    forged = dataclasses.replace(first.layout, **change)
    assert plan_again(begun, MACHINE, first.schedule, first.layout) is not None
    assert plan_again(begun, MACHINE, first.schedule, forged) is None


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("chunks", [7, 13, 31, 57])
def test_partials_that_have_places_in_memory_never_leave_it(chunks: int, durable: bool) -> None:
    """On a device with memory of its own: the next comes when one has left, which takes one place more."""
    wanted = dataclasses.replace(request(chunks * 8_192, durable=durable), chunks=chunks, schedule="cqs")
    ample = dataclasses.replace(MACHINE, habits=CUDA, device_allowed_bytes=2**40, host_allowed_bytes=2**40)
    least = make_plan(wanted, ample).least.device_bytes
    parked = 0
    for extra in (1.0, 1.1, 1.3, 1.6, 2.0, 3.0):
        plan = make_plan(wanted, dataclasses.replace(ample, device_allowed_bytes=int(least * extra)))
        assert plan.fits
        assert not plan.cost.spills
        parked = max(parked, plan.layout.parked_rows)
    assert parked or chunks == 7


def test_equal_prices_go_to_cqs_and_spills_to_rectangular() -> None:
    assert make_plan(request(60_000, causal=True), MACHINE).schedule == "cqs"
    tight = make_plan(request(200_000, causal=True), allowed(40 * MIB))
    assert tight.fits
    assert tight.schedule == "rectangular"


def test_without_a_disk_to_spill_to_cqs_holds_every_partial() -> None:
    plan = make_plan(dataclasses.replace(request(60_000, durable=False), schedule="cqs"), MACHINE)
    assert plan.layout.resident_rows == plan.grid.rows.chunks
    assert plan.cost.spills == 0


@given(
    st.integers(1, 300_000), st.booleans(), st.sampled_from([1, 4]), st.integers(21, 400),
    st.sampled_from(["auto", "cqs", "rectangular"]),
)  # fmt: skip
def test_a_plan_that_fits_is_within_budget(tokens: int, causal: bool, group: int, mib: int, schedule: str) -> None:
    wanted = dataclasses.replace(request(tokens, causal=causal, group=group), schedule=schedule)
    plan = make_plan(wanted, allowed(mib * MIB))
    assert plan.fits == (plan.footprint.host_bytes <= mib * MIB)
    assert plan.layout.rows_per_task <= plan.layout.resident_rows
    assert plan.grid.rows.chunk_tokens % plan.layout.out_tokens == 0
    least = plan.least.host_bytes
    assert make_plan(wanted, allowed(least)).fits, "the smallest budget named is one that does"
    assert not make_plan(wanted, allowed(least - 1)).fits
    assert plan.fits == (mib * MIB >= least)


@given(st.integers(1, 5000), st.integers(1, 200))
def test_query_slices_are_cut_into_any_number_of_chunks(queries: int, chunks: int) -> None:
    plan = make_plan(dataclasses.replace(request(5001, causal=True, queries=queries), chunks=chunks), MACHINE)
    assert plan.schedule == "rectangular"
    assert plan.grid.rows.chunks == chunks


def test_four_times_the_keys_need_no_more_memory() -> None:
    needs = [
        make_plan(request(tokens, queries=4096), allowed(64 * MIB)).footprint.host_bytes
        for tokens in (10**5, 4 * 10**5)
    ]
    assert needs[1] <= needs[0]


def test_measured_rates_tell_the_time_and_change_nothing_else() -> None:
    slow = dataclasses.replace(RATES, tiles=TILES.scaled(7))
    plan = make_plan(request(90_000, causal=True), MACHINE)
    told = make_plan(request(90_000, causal=True), dataclasses.replace(MACHINE, measured=slow))
    assert told.cost.seconds > 3 * plan.cost.seconds
    assert told.cost.bytes_read == plan.cost.bytes_read
    assert dataclasses.replace(told, cost=plan.cost, candidates=()) == dataclasses.replace(plan, candidates=())


def test_a_billion_tokens_are_planned() -> None:
    plan = make_plan(request(10**9, causal=True), allowed(64 * 2**30))
    assert plan.fits
    assert plan.flops == 2 * 128 * 2 * (10**9 * (10**9 + 1) // 2)


@pytest.mark.parametrize(("chunks", "message"), [(8, "7 or 13"), (0, "nearest: 7")])
def test_chunks_that_cannot_be(chunks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(dataclasses.replace(request(1000), chunks=chunks), MACHINE)


def test_a_run_that_has_begun_keeps_its_grid() -> None:
    first = make_plan(request(50_000), MACHINE)
    for host, schedule in ((30 * MIB, "auto"), (2**30, "rectangular")):
        later = dataclasses.replace(
            request(50_000), grid=first.grid, out_tokens=first.layout.out_tokens, schedule=schedule
        )
        plan = make_plan(later, allowed(host))
        assert plan.grid == first.grid
        assert plan.layout.out_tokens == first.layout.out_tokens


@given(
    st.integers(1, 300_000), st.booleans(), st.sampled_from([1, 4]), st.integers(22, 400),
    st.sampled_from(["cqs", "rectangular"]), st.booleans(),
)  # fmt: skip
def test_a_run_that_has_begun_finds_its_layout_again(
    tokens: int, causal: bool, group: int, mib: int, schedule: str, slow_disk: bool
) -> None:
    wanted = dataclasses.replace(request(tokens, causal=causal, group=group), schedule=schedule)
    rates = Rates(TILES, dataclasses.replace(SPEEDS, read_bytes_per_s=1e7)) if slow_disk else RATES
    machine = dataclasses.replace(allowed(mib * MIB), rates=rates, measured=rates)
    first = make_plan(wanted, machine)
    begun = dataclasses.replace(wanted, grid=first.grid, out_tokens=first.layout.out_tokens)
    later = make_plan(begun, dataclasses.replace(machine, host_free_bytes=2**20))
    assert (later.layout, later.grid) == (first.layout, first.grid)


def test_checkpoints_are_no_more_than_there_are_moments_for_them() -> None:
    plans = [
        make_plan(dataclasses.replace(request(7000, causal=True), checkpoint_every_s=every, chunks=7), MACHINE)
        for every in (0.0, 1e-9, 60.0)
    ]
    steps = 2 * len(Rectangular(plans[0].grid, 7).task(0, 0).steps)
    assert plans[0].cost.checkpoints == plans[1].cost.checkpoints >= steps
    assert plans[2].cost.checkpoints == 0
    assert plans[0].cost.bytes_written > plans[2].cost.bytes_written


def test_what_an_allocator_holds() -> None:
    """Small tensors share segments of 2 MiB, those below 10 MiB segments of 20; each other has its own."""
    assert segments([]) == 0
    assert segments([1, MIB // 2]) == 2 * MIB
    assert segments([8 * MIB, 8 * MIB, 4 * MIB]) == 20 * MIB
    assert segments([8 * MIB, 8 * MIB, 5 * MIB]) == 2 * 20 * MIB
    assert segments([10 * MIB, 11 * MIB + 1]) == (10 + 12) * MIB
    assert segments([512 * 3, 9 * MIB, 30 * MIB]) == (2 + 20 + 30) * MIB
