"""The planner: sums spelled out, budgets kept, the smallest feasible budget found. No disk, no torch tensors."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqsa_stream.masks import mask_of
from cqsa_stream.schedulers.costs import Rates, Stored
from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.memory import Layout, Workload, footprint, partial_bytes, slot_bytes
from cqsa_stream.schedulers.planner import Machine, Request, make_plan

MIB = 2**20
RATES = Rates(1e11, 1e9, 5e8, 0.02, 1e-4)
MACHINE = Machine(
    device="cpu", device_allowed_bytes=None, host_allowed_bytes=256 * MIB, device_reserved_bytes=0,
    host_reserved_bytes=20 * MIB, rates=RATES, measured=RATES, tile_rows=16_384, tile_columns=4_096,
    leaf=1_024, block_tokens=8_192, column_tokens=16_384, step_flops=2e11,
)  # fmt: skip


def request(
    tokens: int,
    *,
    causal: bool = False,
    group: int = 1,
    queries: int | None = None,
    durable: bool = True,
    chunk: int = 1,
) -> Request:
    rows = tokens if queries is None else queries
    mask = mask_of(causal, tokens, tokens - rows)
    stored = Stored(tokens, chunk, 1, 256)
    work = Workload(
        lanes=2, group=group, head_dim=64, value_dim=64, stored_itemsize=4, compute_itemsize=4, out_itemsize=4,
        flops=2 * 128 * mask.scores(range(rows), range(tokens)) * 2 * group, staging_bytes=0, durable=durable,
        resident_output_bytes=0,
    )  # fmt: skip
    arrays = (dataclasses.replace(stored, heads_fetched=group), stored, stored)
    return Request(work, rows, tokens, tokens - rows, rows == tokens, mask.keys_seen, arrays)


def allowed(host: int) -> Machine:
    return dataclasses.replace(MACHINE, host_allowed_bytes=host)


def test_the_memory_model_is_a_sum() -> None:
    work = request(700).work
    axis = Axis(700, 100, 7)
    grid = Grid.of(axis, axis, mask_of(False, 700, 0).keys_seen, True)
    layout = Layout(3, 7, 50, 4, 16_384, 50, 50, 25)
    host = footprint(work, grid, layout, "cpu", 0, 1000).host
    assert host["queries"] == 3 * 100 * 64 * 4
    assert host["partials"] == 7 * 100 * (64 * 4 + 8) == 7 * partial_bytes(work, 100)
    assert host["ring"] == 4 * 50 * 64 * 4 == 4 * slot_bytes(64, 64, 1, 4, 50)
    assert host["tile"] == 100 * (64 * 4 + 4 + 5 * 8)
    assert host["writing"] == 25 * 3 * 64 * 4 + 8 * 100
    assert (host["upcast"], host["reading"], host["output"], host["reserved"]) == (0, 0, 0, 1000)
    half = dataclasses.replace(work, stored_itemsize=2)
    assert footprint(half, grid, layout, "cpu", 0, 0).host["upcast"] == 50 * 128 * 4
    cuda = footprint(half, grid, layout, "cuda", 77, 1000)
    assert cuda.device["reserved"] == 77
    assert cuda.host["partial staging"] == 100 * 264
    assert "partials" not in cuda.host


def test_bytes_of_a_full_rectangular_plan() -> None:
    plan = make_plan(dataclasses.replace(request(7000), schedule="rectangular", chunks=7), MACHINE)
    assert plan.layout.rows_per_task == 7
    assert plan.tasks == 2
    assert plan.cost.bytes_read == 2 * (1 + 1 + 1) * 7000 * 256
    assert plan.cost.bytes_written == 2 * 7000 * (256 + 4)
    assert plan.pairs == 2 * 49


def test_bytes_of_a_full_cqs_plan() -> None:
    plan = make_plan(dataclasses.replace(request(7 * 32), schedule="cqs", chunks=7), MACHINE)
    assert plan.cost.bytes_read == 2 * 3 * (1 + 1 + 1) * 7 * 32 * 256, "every chunk is in k = 3 quorums"


def test_stored_chunks_come_whole() -> None:
    stored = Stored(axis_tokens=1000, chunk_tokens=300, heads_fetched=2, row_bytes=10)
    assert stored.fetched_bytes(range(0, 300), 300) == 300 * 20
    assert stored.fetched_bytes(range(299, 301), 300) == 600 * 20
    assert stored.fetched_bytes(range(0, 300), 100) == 3 * 300 * 20
    assert stored.fetched_bytes(range(850, 1000), 300) == (300 + 100) * 20
    assert stored.fetched_bytes(range(0), 300) == 0


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
    assert plan.layout.rows_per_task <= plan.layout.resident_rows or plan.schedule == "cqs"
    assert plan.grid.rows.chunk_tokens % plan.layout.out_tokens == 0
    if not plan.fits:
        least = plan.footprint.host_bytes
        assert make_plan(wanted, allowed(least)).fits, "the smallest budget named is one that does"


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
    slow = dataclasses.replace(RATES, flops_per_s=RATES.flops_per_s / 7)
    plan = make_plan(request(90_000, causal=True), MACHINE)
    told = make_plan(request(90_000, causal=True), dataclasses.replace(MACHINE, measured=slow))
    assert told.cost.seconds > 3 * plan.cost.seconds
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
