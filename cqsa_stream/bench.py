"""Measuring this machine: what a plan's seconds rest on, each figure by what the engine itself does."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cqsa_stream.api import open_inputs
from cqsa_stream.engine.calls import Calls
from cqsa_stream.events import Ended, Event
from cqsa_stream.generate import generate
from cqsa_stream.kernels.choose import Kernel, fold_for, kernel_for
from cqsa_stream.kernels.fold import Partial
from cqsa_stream.kernels.torch_cuda import TorchCudaKernel, cudnn_runs
from cqsa_stream.machine.allocator import returning_freed_memory
from cqsa_stream.machine.calibration import Calibration, trying
from cqsa_stream.planning import Options, plan_run
from cqsa_stream.problem import Problem
from cqsa_stream.run.admission import Target
from cqsa_stream.run.session import run_in_memory, run_on_disk
from cqsa_stream.run.stopping import Stopper
from cqsa_stream.schedulers.masks.bands import Call
from cqsa_stream.schedulers.model.rates import Speeds, TileTimes
from cqsa_stream.storage.atomic import replace_file
from cqsa_stream.storage.open import TokenArray, open_array
from cqsa_stream.storage.output import create_array, write

__all__ = ["measure", "speed"]

_HEAD_DIMS = (64, 128)
_SIZES = {
    "cpu": (128, 1_024, 4_096, 16_384),
    "cuda": (256, 2_048, 16_384, 65_536),
    "plain": (128, 1_024, 8_192),
}
_LEAF, _LEAVES = 1_024, 8
_ROUNDS, _LEAST_S = 7, 0.004
_FILE_TOKENS = 16_384  # 4 MiB of float32
_FILES = 32
_RUN: dict[str, Any] = {"tokens": 4_096, "heads": 8, "head_dim": 64, "dtype": "float32"}
_RUNS = 5
_NOTHING = 1e-9
_IN_A_ROW = 4


@returning_freed_memory()
def measure(device: torch.device, folder: Path) -> Calibration:
    """Measure the kernels of a device, and the disk that holds ``folder``: under a minute. Raises OSError.

    What a block and a file cost besides shows in short runs: it is by what they take longer than was predicted.
    """
    tiles: dict[str, dict[int, TileTimes]] = {}
    for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        tiles[name] = {dim: _fastest_times(device, dtype, dim) for dim in _HEAD_DIMS}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".cqsa-bench-") as temporary:
        speeds = Speeds(
            stage_bytes_per_s=_staging(device),
            touch_bytes_per_s=_touching(),
            on_processor=device.type == "cpu",
            file_lost_s=_NOTHING,
            block_s=_NOTHING,
            **_writing(Path(temporary)),
            **_reading(Path(temporary)),
        )
        arrays = open_inputs(*generate(Path(temporary) / "inputs", **_RUN))
        speeds = replace(speeds, block_s=_block_s(device, arrays, Calibration(tiles, speeds)))
        lost = _file_lost_s(device, arrays, Calibration(tiles, speeds), Path(temporary))
        return Calibration(tiles, replace(speeds, file_lost_s=lost))


def _seconds(action: Callable[[], object], device: torch.device, at_least_s: float) -> float:
    """Return the mean seconds of an action, done as often as that takes so long; on a device several in a row."""
    times, start, in_a_row = 0, time.perf_counter(), 1 if device.type == "cpu" else _IN_A_ROW
    while True:
        for _ in range(in_a_row):
            action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times, passed = times + in_a_row, time.perf_counter() - start
        if passed >= at_least_s:
            return passed / times


class _Calls:
    """Kernel calls and their merges, as the engine makes them."""

    def __init__(self, device: torch.device, kernel: Kernel, dtype: torch.dtype, dim: int, most: int) -> None:
        self._calls, self._dim = Calls(kernel, fold_for(device), dim**-0.5, device), dim
        self._q, self._k, self._v = (torch.randn(1, most, dim).to(device, dtype) for _ in range(3))
        self._out = torch.zeros(1, most, dim, device=device)
        self._lse = torch.full((1, most), -torch.inf, dtype=torch.float64, device=device)

    def __call__(self, rows: int, columns: int, tiles: int) -> None:
        """Attend rows to columns; without columns, causal tiles along the diagonal."""
        call = Call(range(rows), range(columns or rows), "full" if columns else "causal", tiles)
        keys, values = (x[:, : columns or rows] for x in (self._k, self._v))
        partial = Partial(self._out[:, :rows], self._lse[:, :rows])
        self._calls.attend(partial, self._q[:, :rows], keys, values, call)


@returning_freed_memory()
def speed(device: torch.device, calibration: Calibration) -> float:
    """Return what a kernel call takes now, beside what it took when the machine was measured."""
    dtype, size = ("float32", 4_096) if device.type == "cpu" else ("bfloat16", 16_384)
    stored = getattr(torch, dtype)
    calls = _Calls(device, kernel_for(device, stored), stored, 64, size)
    calls(size, size, 1)
    now = _seconds(lambda: calls(size, size, 1), device, 0.1)
    return now / calibration.tiles[dtype][64].tile_s(size, size)


def _fastest_times(device: torch.device, dtype: torch.dtype, dim: int) -> TileTimes:
    """Time the kernel's calls; where a vendor has several operators, all of them, and take the fastest of each size."""
    if device.type == "cpu" or dtype == torch.float32:
        return _tile_times(device, kernel_for(device, dtype), dtype, dim)
    names = ("cudnn", "flash") if cudnn_runs(device, dtype) else ("flash",)
    return TileTimes.fastest({name: _tile_times(device, TorchCudaKernel(name), dtype, dim) for name in names})


def _tile_times(device: torch.device, kernel: Kernel, dtype: torch.dtype, dim: int) -> TileTimes:
    """Time calls of all sizes in turns: on a machine whose speed changes, no size gets all the slow moments."""
    sizes = _SIZES["plain" if device.type == "cuda" and dtype == torch.float32 else device.type]
    leaf = min(_LEAF, sizes[-1]) if device.type == "cpu" else sizes[-1]
    leaves = min(_LEAVES, sizes[-1] // leaf)
    calls = _Calls(device, kernel, dtype, dim, sizes[-1])
    one, many = (leaf, 0, 1), (leaf * leaves, 0, leaves)
    shapes = [(rows, columns, 1) for rows in sizes for columns in sizes] + [one, many]
    found: dict[tuple[int, int, int], list[float]] = {shape: [] for shape in shapes}
    for number in range(_ROUNDS + 1):
        for shape in found:
            seconds = _seconds(lambda shape=shape: calls(*shape), device, _LEAST_S)  # type: ignore[misc]
            if number:  # the first round warms up
                found[shape].append(seconds)
    middle = {shape: statistics.median(seconds) for shape, seconds in found.items()}
    table = tuple(tuple(middle[r, c, 1] for c in sizes) for r in sizes)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    full = TileTimes(sizes, sizes, table, 1.0, 1.0, threads).tile_s(leaf, leaf)
    return TileTimes(sizes, sizes, table, middle[one] / full, middle[many] / leaves / full, threads)


def _writing(folder: Path) -> dict[str, float]:
    """Return the seconds of a small durable file, and bytes per second of large ones.

    Small files are a row's: its output, its lse, and the header that says it is finished.
    """
    small = create_array(folder / "small", (1, 1, 64, 64), "float32", (1, 1, 1, 64))
    large = create_array(folder / "large", (1, 1, 8 * _FILE_TOKENS, 64), "float32", (1, 1, _FILE_TOKENS, 64))
    row, block = np.zeros((1, 64), np.float32), np.ones((_FILE_TOKENS, 64), np.float32)
    cpu = torch.device("cpu")
    turns = count()

    def three() -> None:
        for _ in range(2):
            i = next(turns) % 64
            write(small[0, 0, i : i + 1], row)
        replace_file(folder / "header", [b"\0" * 4096])

    def whole() -> None:
        start = next(turns) % 8 * _FILE_TOKENS
        write(large[0, 0, start : start + _FILE_TOKENS], block)

    file_s = _seconds(three, cpu, 1.0) / 3
    return {"file_s": file_s, "write_bytes_per_s": block.nbytes / max(_seconds(whole, cpu, 1.0) - file_s, 1e-4)}


def _reading(folder: Path) -> dict[str, float]:
    """Return bytes per second from the disk itself, and processor seconds a byte from the page cache."""
    values = np.random.default_rng(0).standard_normal((1, 1, _FILES * _FILE_TOKENS, 64), dtype=np.float32)
    for codec in ("none", "crc32c", "zstd"):  # in chunks of 1 MiB: each costs something besides its bytes
        write(create_array(folder / codec, values.shape, "float32", (1, 1, _FILE_TOKENS // 4, 64), codec), values)
    buffer, size = np.empty((1, _FILE_TOKENS, 64), np.float32), values.nbytes

    def all_of(array: TokenArray) -> None:
        for start in range(0, array.shape[2], _FILE_TOKENS):
            array.read_into(0, range(1), range(start, start + _FILE_TOKENS), buffer)

    cold = []
    for _ in range(3):
        for path in (folder / "none").rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        all_of(open_array(folder / "none"))
        cold.append(size / (time.perf_counter() - start))
    warm = {}
    for name, codec in (("read_cpu_s", "none"), ("check_cpu_s", "crc32c"), ("expand_cpu_s", "zstd")):
        array, times = open_array(folder / codec), []
        for _ in range(4):
            start = time.process_time()
            all_of(array)
            times.append((time.process_time() - start) / size)
        warm[name] = statistics.median(times[1:])
    return {"read_bytes_per_s": statistics.median(cold), **warm}


def _block_s(device: torch.device, arrays: dict[str, TokenArray], so_far: Calibration) -> float:
    """Return by how much each block delays a run of small ones, in memory."""
    problem = Problem.of(arrays["query"], arrays["key"], arrays["value"])
    with trying(so_far):
        least = plan_run(problem, arrays, Options(str(device), host_memory=1, schedule="rectangular"), durable=False)[0]
        options = Options(str(device), host_memory=least.least.host_bytes, schedule="rectangular")
        plan = plan_run(problem, arrays, options, durable=False)[0]
        found = []
        for _ in range(_RUNS):
            seen: list[Event] = []
            run_in_memory(problem, arrays, options, [seen.append], with_lse=False)
            found.append(_late(seen, plan.cost.seconds) / plan.cost.blocks)
    return max(statistics.median(found), _NOTHING)


def _file_lost_s(device: torch.device, arrays: dict[str, TokenArray], so_far: Calibration, folder: Path) -> float:
    """Return by how much each file of a finished row delays a run that writes many."""
    problem = Problem.of(arrays["query"], arrays["key"], arrays["value"], causal=True)
    options, target = Options(str(device), schedule="rectangular"), Target.of(folder / "out", None, fresh=True)
    with trying(so_far):
        plan = plan_run(problem, arrays, options, durable=True, out=target.out)[0]
        found = []
        for _ in range(_RUNS):
            seen: list[Event] = []
            run_on_disk(problem, arrays, options, target, [seen.append], Stopper())
            found.append(_late(seen, plan.cost.seconds) / plan.cost.files)
    return max(statistics.median(found), _NOTHING)


def _late(seen: list[Event], predicted_s: float) -> float:
    last = seen[-1]
    assert isinstance(last, Ended)
    return last.measured["seconds"] - predicted_s


def _staging(device: torch.device) -> float:
    """Return bytes per second, as they arrive, from host buffers to where the kernel reads."""
    size = 1 << 18
    if device.type == "cpu":
        narrow, wide = torch.ones(64, size, dtype=torch.bfloat16), torch.ones(size)  # more than processors' caches
        turns = count()
        return 4 * size / _seconds(lambda: wide.copy_(narrow[next(turns) % 64]), device, 0.2)
    pinned = torch.zeros(256 * size, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(pinned, device=device)
    return pinned.numel() / _seconds(lambda: target.copy_(pinned, non_blocking=True), device, 0.1)


def _touching() -> float:
    """Return bytes per second of memory that is used for the first time."""
    size = 32 << 20
    return size / _seconds(lambda: np.empty(size, np.uint8).fill(0), torch.device("cpu"), 0.2)
