"""Counting: what is done, how many bytes moved, how much memory was held. Bytes are counted as they move."""

import time
from pathlib import Path

import psutil
import torch

from cqsa_stream.engine.sinks import Sink
from cqsa_stream.events import Figures
from cqsa_stream.machine.driver import process_bytes
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.storage.open import TokenArray
from cqsa_stream.storage.partials import PartialStore

__all__ = ["HostPeak", "Meter", "pair_flops"]


class HostPeak:
    """The growth of this process's resident memory since the start, at its highest (Linux: to the page)."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's own high-water mark starts anew
            self._exact = True
        except OSError:
            self._exact = False
        self._start = self._process.memory_info().rss
        self._highest = self._start

    def bytes(self) -> int:
        self._highest = max(self._highest, self._high_water() if self._exact else self._process.memory_info().rss)
        return self._highest - self._start

    def _high_water(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def pair_flops(problem: Problem, grid: Grid, row: int, columns: range) -> int:
    """Return the floating-point operations of a row chunk against neighbouring column chunks, in one lane."""
    if not columns:
        return 0
    keys = range(grid.columns.span(columns.start).start, grid.columns.span(columns.stop - 1).stop)
    scores = problem.mask.scores(grid.rows.span(row), keys)
    return 2 * (problem.head_dim + problem.value_dim) * problem.group * scores


class Meter:
    """The figures of one session."""

    def __init__(
        self,
        problem: Problem,
        grid: Grid,
        arrays: dict[str, TokenArray],
        store: PartialStore | None,
        sink: Sink,
        device: torch.device,
        host: HostPeak,
    ) -> None:
        self.problem, self.grid = problem, grid
        self._store, self._sink, self._device, self._host = store, sink, device, host
        self._arrays = {id(array): array for array in arrays.values()}.values()
        self._started = time.monotonic()
        self._before = self._array_bytes()
        self._driver_highest = self._reserved = 0
        self.rows_total = problem.lanes * sum(1 for a in range(grid.rows.chunks) if grid.rows.span(a))
        self.finished: list[set[int]] = [set() for _ in range(problem.lanes)]
        self.session_flops = 0
        self.restart([{} for _ in range(problem.lanes)])
        if device.type == "cuda":
            torch.cuda.empty_cache()  # so that what is held from now on was taken for this session
            torch.cuda.reset_peak_memory_stats(device)
            self._device_before = torch.cuda.memory_reserved(device)

    def restart(self, covers: list[dict[int, int | None]]) -> None:
        """Count anew what is done, from the covers of the stored partials."""
        self.finished = [{row for row, cover in lane.items() if cover is None} for lane in covers]
        self.pairs_done = self.flops_done = 0
        self.tokens_done = tokens_done(self.problem, self.grid, self.finished)
        for lane in covers:
            for row, cover in lane.items():
                pairs, flops = covered(self.problem, self.grid, row, cover)
                self.pairs_done += pairs
                self.flops_done += flops

    @property
    def rows_done(self) -> int:
        return sum(map(len, self.finished))

    def pairs_computed(self, rows: tuple[int, ...], column: int) -> None:
        flops = sum(pair_flops(self.problem, self.grid, row, range(column, column + 1)) for row in rows)
        self.pairs_done += len(rows)
        self.flops_done += flops
        self.session_flops += flops

    def row_finished(self, lane: int, row: int) -> None:
        self.finished[lane].add(row)
        self.tokens_done += self.problem.group * len(self.grid.rows.span(row))

    def figures(self) -> Figures:
        self._ask_the_driver()
        stored_read, stored_written = (self._store.bytes_read, self._store.bytes_written) if self._store else (0, 0)
        return Figures(
            pairs_done=self.pairs_done,
            pairs_total=self.grid.pairs * self.problem.lanes,
            rows_done=self.rows_done,
            rows_total=self.rows_total,
            tokens_done=self.tokens_done,
            flops_done=self.flops_done,
            flops_total=self.problem.flops,
            session_s=time.monotonic() - self._started,
            session_flops=self.session_flops,
            bytes_read=self._array_bytes() - self._before + stored_read,
            bytes_written=self._sink.bytes_written + stored_written,
            device_peak_bytes=self._device_peak(),
            device_driver_peak_bytes=self._driver_highest,
            device_reserved_bytes=self._reserved,
            host_peak_bytes=self._host.bytes(),
        )

    def _device_peak(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.max_memory_reserved(self._device) - self._device_before

    def _ask_the_driver(self) -> None:
        if self._device.type == "cuda":
            before, found = torch.cuda.memory_reserved(self._device), process_bytes(self._device) or 0
            self._driver_highest = max(self._driver_highest, found)
            if before == torch.cuda.memory_reserved(self._device):
                self._reserved = max(self._reserved, found - before)

    def _array_bytes(self) -> int:
        return sum(array.bytes_read for array in self._arrays)


def covered(problem: Problem, grid: Grid, row: int, cover: int | None) -> tuple[int, int]:
    """Return (pairs, floating-point operations) that a row's cover holds; None stands for a finished row."""
    needed = grid.needed[row]
    if cover is None or cover == grid.complete_cover(row):
        return len(needed), pair_flops(problem, grid, row, needed)
    held = [column for column in needed if cover >> column & 1]
    return len(held), sum(pair_flops(problem, grid, row, range(column, column + 1)) for column in held)


def tokens_done(problem: Problem, grid: Grid, finished: list[set[int]]) -> int:
    """Return the query tokens, each head's counted, whose output is finished."""
    return problem.group * sum(len(grid.rows.span(row)) for rows in finished for row in rows)
