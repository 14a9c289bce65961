"""Measuring this machine: what a plan's seconds rest on, each figure by what the engine itself does."""

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch

from cqsa_stream.allocator import returning_freed_memory
from cqsa_stream.calibration import Calibration
from cqsa_stream.events import Ended, Event, Started
from cqsa_stream.execute import run_in_memory
from cqsa_stream.kernels import kernel_for
from cqsa_stream.partial import fold
from cqsa_stream.planning import Options, plan_run
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.masks import TileMask
from cqsa_stream.schedulers.rates import TileTimes
from cqsa_stream.storage.arrays import TokenArray, open_array
from cqsa_stream.storage.atomic import replace_file
from cqsa_stream.storage.output import create_array, write

__all__ = ["measure", "speed"]

_HEAD_DIMS = (64, 128)
_SIZES = {
    "cpu": (128, 1_024, 4_096, 16_384),
    "cuda": (256, 2_048, 16_384, 65_536),
    "plain": (128, 512, 2_048),
}
_LEAF, _LEAVES = 1_024, 8
_ROUNDS, _LEAST_S = 7, 0.004
_FILE_TOKENS = 16_384  # 4 MiB of float32
_FILES = 32


def measure(device: torch.device, folder: Path) -> Calibration:
    """Measure the kernels of a device, and the disk that holds ``folder``: seconds to a minute. Raises OSError."""
    tiles: dict[str, dict[int, TileTimes]] = {}
    with returning_freed_memory():
        for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            tiles[name] = {dim: _tile_times(device, dtype, dim) for dim in _HEAD_DIMS}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".cqsa-bench-") as temporary:
            plain, decoded = _write_arrays(Path(temporary))
            writing = _writing(Path(temporary), device)
            read_bytes_per_s, read_cpu_s, decode_cpu_s = _reading(plain, decoded)
            block_s = _handing_over(device, plain, tiles["float32"][64])
        return Calibration(
            tiles=tiles,
            read_bytes_per_s=read_bytes_per_s,
            stage_bytes_per_s=_staging(device),
            touch_bytes_per_s=_touching(),
            **writing,
            block_s=block_s,
            read_cpu_s=read_cpu_s,
            decode_cpu_s=decode_cpu_s,
            cores=torch.get_num_threads() if device.type == "cpu" else 0,
        )


def _seconds(action: Callable[[], object], device: torch.device, at_least_s: float) -> float:
    """Return the mean seconds of an action, done as often as that takes so long."""
    times, start = 0, time.perf_counter()
    while True:
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times, passed = times + 1, time.perf_counter() - start
        if passed >= at_least_s:
            return passed / times


class _Calls:
    """Kernel calls and their merges, as the engine makes them."""

    def __init__(self, device: torch.device, dtype: torch.dtype, dim: int, most: int) -> None:
        self._kernel, self._dim = kernel_for(device, dtype), dim
        self._q, self._k, self._v = (torch.randn(1, most, dim).to(device, dtype) for _ in range(3))
        self._out = torch.zeros(1, most, dim, device=device)
        self._lse = torch.full((1, most), -torch.inf, dtype=torch.float64, device=device)

    def __call__(self, rows: int, columns: int, tiles: int) -> None:
        """Attend rows to columns; without columns, causal tiles along the diagonal."""
        mask: TileMask = "full" if columns else "causal"
        queries = self._q[:, :rows].reshape(tiles, -1, self._dim)
        keys, values = (x[:, : columns or rows].reshape(tiles, -1, self._dim) for x in (self._k, self._v))
        tile, tile_lse = self._kernel.attend(queries, keys, values, mask, self._dim**-0.5)
        fold(self._out[:, :rows], self._lse[:, :rows], tile.reshape(1, rows, -1), tile_lse.reshape(1, rows))


@returning_freed_memory()
def speed(device: torch.device, calibration: Calibration) -> float:
    """Return what a kernel call takes now, beside what it took when the machine was measured."""
    dtype, size = ("float32", 4_096) if device.type == "cpu" else ("bfloat16", 16_384)
    calls = _Calls(device, getattr(torch, dtype), 64, size)
    calls(size, size, 1)
    now = _seconds(lambda: calls(size, size, 1), device, 0.1)
    return now / calibration.tiles[dtype][64].tile_s(size, size)


def _tile_times(device: torch.device, dtype: torch.dtype, dim: int) -> TileTimes:
    """Time calls of all sizes in turns: on a machine whose speed changes, no size gets all the slow moments."""
    sizes = _SIZES["plain" if device.type == "cuda" and dtype == torch.float32 else device.type]
    leaf = min(_LEAF, sizes[-1]) if device.type == "cpu" else sizes[-1]
    leaves = min(_LEAVES, sizes[-1] // leaf)
    calls = _Calls(device, dtype, dim, sizes[-1])
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


class _Busy:
    """Keeps the processor as busy as a run does, and tells what else it did in the meantime cost this work.

    A run on another device leaves the processor idle.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stop, self._done = device, threading.Event(), 0
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> "_Busy":
        if self._device.type == "cpu":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._device.type == "cpu":
            self._thread.join()

    def _work(self) -> None:
        kernel, tile = kernel_for(self._device, torch.float32), torch.zeros(1, 1_024, 64)
        while not self._stop.is_set():
            kernel.attend(tile, tile, tile, "full", 1.0)
            self._done += 1

    def lost_s(self, action: Callable[[], object], times: int) -> float:
        """Return the seconds of work that one action costs, from so many in a row and as long without."""
        if self._device.type != "cpu":
            return 1e-9
        done, start = self._done, time.perf_counter()
        for _ in range(times):
            action()
        done, passed = self._done - done, time.perf_counter() - start
        alone = self._done
        time.sleep(passed)
        alone = self._done - alone
        return float(max(passed * (1 - done / max(1, alone)) / times, 1e-9))


def _write_arrays(folder: Path) -> tuple[TokenArray, TokenArray]:
    """Write the same numbers uncompressed, and with a checksum that a decoder looks at."""
    values = np.random.default_rng(0).standard_normal((1, 1, _FILES * _FILE_TOKENS, 64), dtype=np.float32)
    for name, codec in (("plain", "none"), ("decoded", "crc32c")):
        array = create_array(folder / name, values.shape, "float32", (1, 1, _FILE_TOKENS, 64), codec)
        write(array, values)
    return open_array(folder / "plain"), open_array(folder / "decoded")


def _writing(folder: Path, device: torch.device) -> dict[str, float]:
    """Return the seconds of a small durable file, alone and beside kernels, and bytes per second of large ones.

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

    alone, large_s = _seconds(three, cpu, 0.5) / 3, _seconds(whole, cpu, 0.5)
    with _Busy(device) as busy:
        beside = _seconds(three, cpu, 0.5) / 3
        lost = statistics.median(busy.lost_s(three, 40) for _ in range(5)) / 3
    return {
        "file_s": alone,
        "busy_file_s": beside,
        "file_lost_s": lost,
        "write_bytes_per_s": block.nbytes / max(large_s - alone, 1e-4),
    }


def _reading(plain: TokenArray, decoded: TokenArray) -> tuple[float, float, float]:
    """Return bytes per second from the disk itself, and processor seconds a byte from memory: plain, and decoded."""
    buffer = np.empty((1, _FILE_TOKENS, 64), np.float32)

    def all_of(array: TokenArray) -> None:
        for start in range(0, array.shape[2], _FILE_TOKENS):
            array.read_into(0, range(1), range(start, start + _FILE_TOKENS), buffer)

    size = _FILES * buffer.nbytes
    cold = []
    for _ in range(3):
        for path in Path(plain.source).rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        all_of(plain)
        cold.append(size / (time.perf_counter() - start))
    found = []
    for array in (plain, decoded):
        times = []
        for _ in range(4):
            start = time.process_time()
            all_of(array)
            times.append((time.process_time() - start) / size)
        found.append(statistics.median(times[1:]))
    return statistics.median(cold), found[0], found[1]


def _handing_over(device: torch.device, keys: TokenArray, times: TileTimes) -> float:
    """Return the seconds that a small block takes in a run, besides those of the kernel."""
    problem = Problem.of(keys, keys, keys, queries=(0, 512))
    arrays = dict.fromkeys(("query", "key", "value"), keys)
    least = plan_run(problem, arrays, Options(device=str(device), host_memory=1), durable=False)[0].least
    options = Options(device=str(device), host_memory=least.host_bytes)
    found = []
    for _ in range(3):
        seen: list[Event] = []
        run_in_memory(problem, arrays, options, [seen.append], with_lse=False)
        first, last = seen[0], seen[-1]
        assert isinstance(first, Started)
        assert isinstance(last, Ended)
        rows, columns = first.plan["chunk_tokens"], first.plan["layout"]["block_tokens"]
        blocks = -(-problem.queries // rows) * -(-problem.keys // columns)
        kernel = blocks * times.tile_s(min(rows, problem.queries), columns)
        found.append((last.measured["seconds"] - kernel) / (2 * blocks))
    return float(max(statistics.median(found), 1e-6))


def _staging(device: torch.device) -> float:
    """Return bytes per second, as they arrive, from host buffers to where the kernel reads."""
    size = 1 << 22
    if device.type == "cpu":
        narrow, wide = torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size)
        return 4 * size / _seconds(lambda: wide.copy_(narrow), device, 0.1)
    pinned = torch.zeros(16 * size, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(pinned, device=device)
    return pinned.numel() / _seconds(lambda: target.copy_(pinned, non_blocking=True), device, 0.1)


def _touching() -> float:
    """Return bytes per second of memory that is used for the first time."""
    size = 32 << 20
    return size / _seconds(lambda: np.empty(size, np.uint8).fill(0), torch.device("cpu"), 0.2)
