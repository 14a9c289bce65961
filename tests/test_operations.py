"""The engine's seams: an operation with two sums, each with its own cover; and shares, which fix a result's bits."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cqsa_stream.engine.job import Job
from cqsa_stream.engine.loop import Engine
from cqsa_stream.engine.meter import Meter
from cqsa_stream.engine.operation import Operation
from cqsa_stream.engine.sinks import MemorySink, Stored, ZarrSink
from cqsa_stream.engine.stores import NoStore
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.errors import RunStopped
from cqsa_stream.kernels.choose import fold_for, kernel_of
from cqsa_stream.kernels.contract import KernelChoice
from cqsa_stream.machine.device import device_of
from cqsa_stream.operations.forward import Forward
from cqsa_stream.options import Options
from cqsa_stream.planning import plan_run
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.masks.rule import Rule
from cqsa_stream.schedulers.masks.window import CAUSAL, last_keys
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.schedulers.shares import Share
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.output import create_array, holds_array, open_output
from cqsa_stream.storage.partials import PartialStore, SumFiles
from tests.conftest import ROOT, environment
from tests.reference import dense
from tests.two_sums import TwoSums, expected

CPU = device_of("cpu")
TOKENS, CHUNKS = 130, 7
Stop = Callable[[float], str | None]


def go_on(_: float) -> str | None:
    return None


def whole_numbers(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Small whole numbers: their sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 2, TOKENS, 4), (1, 1, TOKENS, 4), (1, 1, TOKENS, 3))
    return tuple(torch.randint(-9, 9, shape, generator=generator).double() for shape in shapes)


class Bench:
    """A problem on disk for engines to work on: what a session makes, without the session."""

    def __init__(self, folder: Path, tensors: tuple[torch.Tensor, ...], schedule: str, rule: Rule) -> None:
        self.folder = folder
        self.arrays = {}
        for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
            path = folder / f"{name}.npy"
            if not path.exists():
                np.save(path, tensor.numpy())
            self.arrays[name] = open_array(path)
        self.problem = Problem.of(self.arrays["query"], self.arrays["key"], self.arrays["value"], rule=rule)
        options = Options(device="cpu", schedule=schedule, chunks=CHUNKS, host_memory="1GiB")
        self.plan: Plan = plan_run(self.problem, self.arrays, options, durable=True)[0]

    def store(self, operation: Operation, share: int = 0) -> PartialStore:
        grid = self.plan.grid
        files = []
        for sum_ in operation.sums:
            by_rows = sum_.axis == "rows"
            axis, other = (grid.rows, grid.columns) if by_rows else (grid.columns, grid.rows)

            def sizes(chunk: int, sum_: Any = sum_, axis: Any = axis) -> tuple[int, ...]:
                return tuple(len(axis.span(chunk)) * field.numbers * field.itemsize for field in sum_.fields)

            complete = grid.complete_cover if by_rows else (lambda chunk: grid.needing(chunk).bits)
            files.append(SumFiles(axis.chunks, other.chunks, sizes, complete))
        found = PartialStore(self.folder / "partials", bytes(32), self.problem.lanes, files, share)
        found.prepare()
        return found

    def sink(self, operation: Operation) -> ZarrSink:
        batch, grid = self.problem.batch, self.plan.grid
        arrays = []
        for sum_ in operation.sums:
            axis = grid.rows if sum_.axis == "rows" else grid.columns
            kept = []
            for field in sum_.fields:
                path = self.folder / f"{field.name}.zarr"
                heads = field.heads * self.problem.kv_heads
                width = (field.width,) if field.width else ()
                shape, chunk = (batch, heads, axis.tokens, *width), (1, 1, axis.chunk_tokens, *width)
                if not holds_array(path):
                    create_array(path, shape, field.left_dtype, chunk)
                kept.append(Stored(open_output(path), getattr(torch, field.left_dtype), axis.chunk_tokens))
            arrays.append(kept)
        axes = [grid.rows if sum_.axis == "rows" else grid.columns for sum_ in operation.sums]
        return ZarrSink(arrays, axes, self.lane_heads)

    def lane_heads(self, sum_: int, lane: int) -> tuple[int, range]:
        batch, query_heads, kv_heads = self.problem.lane_heads(lane)
        return batch, query_heads if sum_ == 0 else kv_heads

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(open_output(self.folder / f"{name}.zarr").read().result())

    def engine(self, operation: Operation, stop: Stop = go_on, share: Share | None = None) -> Engine:
        """An engine that commits at every safe point."""
        share = share or Share()
        store, sink = self.store(operation, share.number), self.sink(operation)
        meter = Meter(self.problem, self.plan.grid, self.arrays, store, sink, CPU)
        job = Job(
            self.problem,
            self.plan,
            operation,
            self.arrays,
            sink,
            store,
            CPU,
            stop,
            lambda _: None,
            meter,
            0.0,
            Timeline(CPU),
        )
        return Engine(dataclasses.replace(job, share=share))

    def forward(self) -> Forward:
        kernel = kernel_of(KernelChoice(self.plan.kernel, self.plan.operator), CPU.torch, torch.float32)
        return Forward(self.problem, self.plan.layout.tile, kernel, fold_for(CPU.torch), CPU, Timeline(CPU))


def two_sums(folder: Path, schedule: str, window: int | None) -> Bench:
    return Bench(folder, whole_numbers(), schedule, rule=CAUSAL if window is None else last_keys(window))


def check_two_sums(bench: Bench, window: int | None) -> None:
    q, k, v = whole_numbers()
    rows, keys = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    seen = (keys <= rows) & (keys > rows - (window or TOKENS))
    for name, numbers in zip(("values", "queries", "count"), expected(q, k, v, seen), strict=True):
        assert torch.equal(bench.read(name), numbers), name


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
def test_two_sums_at_once(schedule: str, window: int | None, tmp_path: Path) -> None:
    bench = two_sums(tmp_path, schedule, window)
    bench.engine(TwoSums(bench.problem)).run()
    check_two_sums(bench, window)


def killed(call: str) -> None:
    """Call a function of this file in a process of its own, which is killed."""
    code = f"import tests.test_operations; tests.test_operations.{call}"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, check=False)
    assert found.returncode == -signal.SIGKILL, found.stderr.decode()


def killed_before_commit(folder: str, schedule: str, window: int | None, number: int) -> None:
    """Run in a process of its own: it is killed when it is about to make its ``number``-th commit."""
    left = [number]
    commit = PartialStore.commit

    def committing(store: PartialStore, *what: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(store, *what)

    PartialStore.commit = committing  # type: ignore[assignment,method-assign]
    bench = two_sums(Path(folder), schedule, window)
    bench.engine(TwoSums(bench.problem)).run()


@pytest.mark.parametrize(("schedule", "window", "numbers"), [("cqs", None, (2, 3, 6, 9)), ("rectangular", 40, (2, 4))])
def test_killed_between_the_commits_of_two_sums(
    schedule: str, window: int | None, numbers: tuple[int, ...], tmp_path: Path
) -> None:
    """A pair may be in one of the sums alone then: only the other adds it again."""
    whole_bench = two_sums(tmp_path, schedule, window)
    halves = 0
    for number in numbers:
        killed(f"killed_before_commit({str(tmp_path)!r}, {schedule!r}, {window}, {number})")
        store = whole_bench.store(TwoSums(whole_bench.problem))
        rows, columns = (
            {(chunk, b) for chunk, cover in store.covers(n)[0].items() for b in range(CHUNKS)
             if cover is None or cover >> b & 1} for n in (0, 1)
        )  # fmt: skip
        needed = {(a, b) for a in range(CHUNKS) for b in whole_bench.plan.grid.needed(a)}
        halves += len(needed & (rows ^ {(a, b) for b, a in columns}))
    assert halves, "in none of the kills a pair was in one sum alone: this test tests nothing"
    whole_bench.engine(TwoSums(whole_bench.problem)).run()
    check_two_sums(whole_bench, window)


def noise() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(1, heads, TOKENS, 8, generator=generator) for heads in (2, 1, 1))


def forward_bench(folder: Path, schedule: str) -> Bench:
    folder.mkdir()
    return Bench(folder, noise(), schedule, rule=CAUSAL)


def results(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    return bench.read("out"), bench.read("lse")


def check_forward(found: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v = noise()
    out, lse = dense(q, k, v, causal=True)
    torch.testing.assert_close(found[0].double(), out, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(found[1].double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
def test_the_bits_depend_on_the_shares_alone(schedule: str, tmp_path: Path) -> None:
    """Two shares by one engine after the other, by two at a time, and with one killed inside a task and taken over."""
    one = forward_bench(tmp_path / "one", schedule)
    for number in (1, 0):
        one.engine(one.forward(), share=Share(number, 2)).run()
    check_forward(results(one))

    two = forward_bench(tmp_path / "two", schedule)
    engines = [two.engine(two.forward(), share=Share(number, 2)) for number in (0, 1)]
    threads = [threading.Thread(target=engine.run) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results(one), results(two), strict=True))

    killed(f"killed_in_a_share({str(tmp_path / 'dead')!r}, {schedule!r})")
    dead = Bench(tmp_path / "dead", noise(), schedule, rule=CAUSAL)
    dead.engine(dead.forward(), share=Share(0, 2)).run()
    covers = dead.store(dead.forward()).covers()[0]
    assert any(cover is not None for cover in covers.values()) or len(covers) < CHUNKS, "share 1 is not done"
    dead.engine(dead.forward(), share=Share(1, 2)).run()
    assert all(torch.equal(a, b) for a, b in zip(results(one), results(dead), strict=True))


def killed_in_a_share(folder: str, schedule: str) -> None:
    """Run in a process of its own: share 1 commits at each safe point, and is killed at the third."""
    bench = forward_bench(Path(folder), schedule)
    left = iter([None, None])

    def kill(_: float) -> str | None:
        try:
            return next(left)
        except StopIteration:
            os.kill(os.getpid(), signal.SIGKILL)
            raise

    bench.engine(bench.forward(), kill, Share(1, 2)).run()


def test_a_share_that_stops_goes_on(tmp_path: Path) -> None:
    bench = forward_bench(tmp_path / "bench", "cqs")
    steps = 0
    for number in (0, 1):
        while True:
            left = iter([None] * 2)
            try:
                bench.engine(bench.forward(), lambda _, left=left: next(left, "stopped"), Share(number, 2)).run()  # type: ignore[misc]
                break
            except RunStopped:
                steps += 1
    assert steps > 2
    check_forward(results(bench))


def test_what_two_shares_hold_both_counts_once(tmp_path: Path) -> None:
    """A stale engine has left pairs of a row in share 1 of which share 0 holds some, too: it is discarded whole."""
    bench = forward_bench(tmp_path / "bench", "cqs")
    bench.engine(bench.forward(), share=Share(0, 2)).run()
    row, grid = 3, bench.plan.grid
    part = bench.store(bench.forward()).covers()[0][row]
    assert part not in (None, 0, grid.complete_cover(row)), "share 0 holds a part of the row"
    stale = grid.complete_cover(row) & ~1
    assert part & stale
    span, later = grid.rows.span(row), torch.arange(TOKENS) >= grid.columns.span(1).start
    q, k, v = noise()
    out, lse = (it[0, :, span.start : span.stop].contiguous() for it in dense(q, k, v, causal=True, seen=later))
    bench.store(bench.forward(), 1).commit(0, 0, row, stale, [lse.numpy(), out.float().numpy()])
    bench.engine(bench.forward(), share=Share(1, 2)).run()
    assert bench.store(bench.forward()).covers()[0][row] == part
    bench.engine(bench.forward(), share=Share(1, 2)).run()
    check_forward(results(bench))


def test_a_run_in_memory_has_no_store(tmp_path: Path) -> None:
    bench = forward_bench(tmp_path / "bench", "rectangular")
    operation, grid = bench.forward(), bench.plan.grid
    tensors = [torch.empty(1, 2, TOKENS), torch.empty(1, 2, TOKENS, 8)]
    sink = MemorySink([tensors], [grid.rows], bench.lane_heads)
    store = NoStore(1, 1)
    meter = Meter(bench.problem, grid, bench.arrays, store, sink, CPU)
    job = Job(
        bench.problem,
        bench.plan,
        operation,
        bench.arrays,
        sink,
        store,
        CPU,
        go_on,
        lambda _: None,
        meter,
        0.0,
        Timeline(CPU),
    )
    Engine(job).run()
    check_forward((tensors[1], tensors[0]))
    with pytest.raises(AssertionError, match="never lets"):
        store.commit(0, 0, 0, 1, [])
