"""Measuring this machine: what a plan's seconds rest on, each figure by what the engine itself does."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from cqsa_stream.command import Command, Target
from cqsa_stream.engine.calls import Calls
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.events import Ended, Event
from cqsa_stream.generate import generate
from cqsa_stream.inputs import open_inputs
from cqsa_stream.kernels.choose import choices, competing, fold_for, kernel_of
from cqsa_stream.kernels.contract import Kernel, Scores
from cqsa_stream.machine.allocator import returning_freed_memory
from cqsa_stream.machine.calibration import Calibration, Timed, trying
from cqsa_stream.machine.device import Device, Host
from cqsa_stream.options import Options
from cqsa_stream.planning import plan_run
from cqsa_stream.problem import Problem
from cqsa_stream.run.durable import compute
from cqsa_stream.run.session import compute_in_memory
from cqsa_stream.run.stopping import Stopper
from cqsa_stream.schedulers.masks.calls import Call
from cqsa_stream.schedulers.masks.window import CAUSAL, FULL
from cqsa_stream.schedulers.model.rates import Speeds, TileTimes
from cqsa_stream.storage.atomic import replace_file
from cqsa_stream.storage.open import TokenArray, open_array
from cqsa_stream.storage.output import create_array, write

__all__ = ["measure", "speed"]

_HEAD_DIMS = (64, 128)
_PARTS = (128, 16, 4, 1)  # of a kernel's largest call: the sizes at which it is timed
_LEAVES = 8
_ROUNDS, _ROUNDS_APART, _LEAST_S = 7, 3, 0.004
_FILE_TOKENS = 16_384  # 4 MiB of float32
_FILES = 32
_RUN: dict[str, Any] = {"tokens": 4_096, "heads": 8, "head_dim": 64, "dtype": "float32"}
_RUNS = 5
_LOOK_S, _BUSY = 0.5, 20.0  # seconds; % of all processors
_NOTHING = 1e-9


@returning_freed_memory()
def measure(device: Device, folder: Path, say: Callable[[str], object] = lambda _: None) -> Calibration:
    """Measure the kernels of a device, and the disk that holds ``folder``: under a minute. Raises OSError.

    What a block and a file cost besides shows in short runs: it is by what they take longer than was predicted.
    ``say`` is told each stage, and where other processes use the processor.
    """
    if (busy := psutil.cpu_percent(_LOOK_S)) > _BUSY:
        say(f"other processes use {busy:.0f} % of the processor; the figures will be too slow: bench again later")
    say(f"kernels of {device} (1 of 3)")
    tiles = _all_times(device)
    say(f"disk and memory of {folder} (2 of 3)")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".cqsa-bench-") as temporary:
        speeds = Speeds(
            stage_bytes_per_s=_staging(device),
            touch_bytes_per_s=_touching(),
            file_lost_s=_NOTHING,
            block_s=_NOTHING,
            **_writing(Path(temporary)),
            **_reading(Path(temporary)),
        )
        say("short runs (3 of 3)")
        arrays = open_inputs(*generate(Path(temporary) / "inputs", **_RUN))
        full, causal = (
            Problem.of(arrays["query"], arrays["key"], arrays["value"], rule=rule) for rule in (FULL, CAUSAL)
        )
        in_blocks = Options(str(device), host_memory=_least_bytes(device, full, arrays), schedule="rectangular")
        block_s = _delay_s(full, arrays, in_blocks, None, Calibration(tiles, speeds))
        speeds = replace(speeds, block_s=block_s)
        to_disk, options = Target.of(Path(temporary) / "out", None, fresh=True), replace(in_blocks, host_memory=None)
        lost_s = _delay_s(causal, arrays, options, to_disk, Calibration(tiles, speeds))
        return Calibration(tiles, replace(speeds, file_lost_s=lost_s))


def _seconds(action: Callable[[], object], at_least_s: float, device: Device | None = None) -> float:
    """Return the mean seconds of an action, done as often as that takes so long; on a device several in a row."""
    device = device or Host()
    times, start, in_a_row = 0, time.perf_counter(), device.habits.calls_in_a_row
    while True:
        for _ in range(in_a_row):
            action()
        device.synchronize()
        times, passed = times + in_a_row, time.perf_counter() - start
        if passed >= at_least_s:
            return passed / times


class _Calls:
    """Kernel calls and their merges, as the engine makes them."""

    def __init__(self, device: Device, kernel: Kernel, dtype: torch.dtype, dim: int, most: int) -> None:
        self._calls, self._scores = Calls(kernel, fold_for(device.torch), device, Timeline(device)), Scores(dim**-0.5)
        self._q, self._k, self._v = (torch.randn(1, most, dim).to(device.torch, dtype) for _ in range(3))
        self._out = torch.zeros(1, most, dim, device=device.torch)
        self._lse = torch.full((1, most), -torch.inf, dtype=torch.float64, device=device.torch)

    def __call__(self, rows: int, columns: int, tiles: int) -> None:
        """Attend rows to columns; without columns, causal tiles along the diagonal."""
        call = Call(range(rows), range(columns or rows // tiles), right=None if columns else 0, tiles=tiles)
        keys, values = (x[:, : columns or rows] for x in (self._k, self._v))
        partial = self._out[:, :rows], self._lse[:, :rows]
        self._calls.attend(partial, self._q[:, :rows], keys, values, call, self._scores)


@returning_freed_memory()
def speed(device: Device, calibration: Calibration) -> float:
    """Return what a kernel call takes now, beside what it took when the machine was measured."""
    last = calibration.tiles[-1]
    stored, size = getattr(torch, last.dtype), last.times.rows[-2]
    [choice] = [choice for choice in choices(device.torch, stored) if choice.operator == last.operator]
    calls = _Calls(device, kernel_of(choice, device.torch, stored), stored, last.dim, size)
    calls(size, size, 1)
    return _seconds(lambda: calls(size, size, 1), 0.1, device) / last.times.tile_s(size, size)


def _all_times(device: Device) -> tuple[Timed, ...]:
    """Time the kernel that a run takes, for each dtype in which one computes, by each of its operators."""
    found = []
    for dtype, dim in product((torch.float32, torch.float16, torch.bfloat16), _HEAD_DIMS):
        for choice in competing(choices(device.torch, dtype)):
            kernel = kernel_of(choice, device.torch, dtype)
            if dtype in kernel.abilities.dtypes:
                times = _tile_times(device, kernel, dtype, dim)
                found.append(Timed(str(dtype).removeprefix("torch."), dim, choice.operator, times))
    return tuple(found)


def _tile_times(device: Device, kernel: Kernel, dtype: torch.dtype, dim: int) -> TileTimes:
    """Time calls of all sizes in turns: on a machine whose speed changes, no size gets all the slow moments.

    A device of its own is made to work before each: rested, it is faster for a moment than in a run.
    """
    sizes = tuple(kernel.abilities.tile.rows // part for part in _PARTS)
    leaf = min(kernel.abilities.tile.leaf, sizes[-1])
    leaves = min(_LEAVES, sizes[-1] // leaf)
    calls = _Calls(device, kernel, dtype, dim, sizes[-1])
    one, many = (leaf, 0, 1), (leaf * leaves, 0, leaves)
    shapes = [(rows, columns, 1) for rows in sizes for columns in sizes] + [one, many]
    found: dict[tuple[int, int, int], list[float]] = {shape: [] for shape in shapes}
    for number in range((_ROUNDS_APART if device.habits.own_memory else _ROUNDS) + 1):
        for shape in found:
            if device.habits.own_memory:
                calls(sizes[-1], sizes[-1], 1)
                device.synchronize()
            seconds = _seconds(lambda shape=shape: calls(*shape), _LEAST_S, device)  # type: ignore[misc]
            if number:  # the first round warms up
                found[shape].append(seconds)
    middle = {shape: statistics.median(seconds) for shape, seconds in found.items()}
    table = tuple(tuple(middle[r, c, 1] for c in sizes) for r in sizes)
    full = TileTimes(sizes, sizes, table, 1.0, 1.0, device.threads).tile_s(leaf, leaf)
    return TileTimes(sizes, sizes, table, middle[one] / full, middle[many] / leaves / full, device.threads)


def _writing(folder: Path) -> dict[str, float]:
    """Return the seconds of a small durable file, and bytes per second of large ones.

    Small files are a row's: its output, its lse, and the header that says it is finished.
    """
    small = create_array(folder / "small", (1, 1, 64, 64), "float32", (1, 1, 1, 64))
    large = create_array(folder / "large", (1, 1, 8 * _FILE_TOKENS, 64), "float32", (1, 1, _FILE_TOKENS, 64))
    row, block = np.zeros((1, 64), np.float32), np.ones((_FILE_TOKENS, 64), np.float32)
    turns = count()

    def three() -> None:
        for _ in range(2):
            i = next(turns) % 64
            write(small[0, 0, i : i + 1], row)
        replace_file(folder / "header", [b"\0" * 4096])

    def whole() -> None:
        start = next(turns) % 8 * _FILE_TOKENS
        write(large[0, 0, start : start + _FILE_TOKENS], block)

    file_s = _seconds(three, 1.0) / 3
    return {"file_s": file_s, "write_bytes_per_s": block.nbytes / max(_seconds(whole, 1.0) - file_s, 1e-4)}


def _reading(folder: Path) -> dict[str, float]:
    """Return bytes per second from the disk itself, and processor seconds a byte from the page cache."""
    values = np.random.default_rng(0).standard_normal((1, 1, _FILES * _FILE_TOKENS, 64), dtype=np.float32)
    codecs = {"read_cpu_s": "none", "check_cpu_s": "crc32c", "expand_cpu_s": "zstd"}
    for codec in codecs.values():  # in chunks of 1 MiB: each costs something besides its bytes
        write(create_array(folder / codec, values.shape, "float32", (1, 1, _FILE_TOKENS // 4, 64), codec), values)
    buffer = np.empty((1, _FILE_TOKENS, 64), np.float32)

    def taken(array: TokenArray, clock: Callable[[], float]) -> float:
        """Return the seconds a byte to read the whole array."""
        start = clock()
        for first in range(0, array.shape[2], _FILE_TOKENS):
            array.read_into(0, range(1), range(first, first + _FILE_TOKENS), buffer)
        return (clock() - start) / values.nbytes

    cold = []
    for _ in range(3):
        for path in filter(Path.is_file, (folder / "none").rglob("*")):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cold.append(taken(open_array(folder / "none"), time.perf_counter))
    warm = {}
    for name, codec in codecs.items():
        array = open_array(folder / codec)
        warm[name] = statistics.median([taken(array, time.process_time) for _ in range(4)][1:])
    return {"read_bytes_per_s": 1 / statistics.median(cold), **warm}


def _least_bytes(device: Device, problem: Problem, arrays: dict[str, TokenArray]) -> int:
    """Return the smallest host budget with which the problem runs in memory: its blocks are the smallest, too."""
    options = Options(str(device), host_memory=1, schedule="rectangular")
    return plan_run(problem, arrays, options, durable=False)[0].least.host_bytes


def _delay_s(
    problem: Problem, arrays: dict[str, TokenArray], options: Options, target: Target | None, so_far: Calibration
) -> float:
    """Return by how much each block delays a run in memory; with a target, each file of a finished row one on disk."""
    with trying(so_far):
        out = None if target is None else target.out
        cost = plan_run(problem, arrays, options, durable=target is not None, out=out)[0].cost
        found = []
        for _ in range(_RUNS):
            seen: list[Event] = []
            run = compute_in_memory if target is None else compute
            run(Command(arrays, problem, options, target), [seen.append], Stopper())
            last = seen[-1]
            assert isinstance(last, Ended)
            found.append((last.measured["seconds"] - cost.seconds) / (cost.blocks if target is None else cost.files))
    return max(statistics.median(found), _NOTHING)


def _staging(device: Device) -> float:
    """Return bytes per second, as they arrive, from host buffers to where the kernel reads."""
    size = 1 << 18
    if device.habits.own_memory:
        pinned = torch.zeros(256 * size, dtype=torch.uint8).pin_memory()
        target = torch.empty_like(pinned, device=device.torch)
        return pinned.numel() / _seconds(lambda: target.copy_(pinned, non_blocking=True), 0.1, device)
    narrow, wide = torch.ones(64, size, dtype=torch.bfloat16), torch.ones(size)  # more than processors' caches
    turns = count()
    return 4 * size / _seconds(lambda: wide.copy_(narrow[next(turns) % 64]), 0.2)


def _touching() -> float:
    """Return bytes per second of memory that is used for the first time."""
    size = 32 << 20
    return size / _seconds(lambda: np.empty(size, np.uint8).fill(0), 0.2)
