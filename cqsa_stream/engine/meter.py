"""Counting: what is done, how many bytes moved, how much memory was held. Bytes are counted as they move."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from cqsa_stream.engine.progress import Progress
from cqsa_stream.engine.sinks import Sink
from cqsa_stream.engine.stores import Store
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.events import Figures
from cqsa_stream.machine.device import Device
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.storage.contract import TokenArray

__all__ = ["HostPeak", "Meter"]

_MOVED = ("session_flops", "bytes_read", "bytes_written", "device_peak_bytes", "host_peak_bytes")


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


class Meter:
    """The figures of one session."""

    def __init__(
        self, problem: Problem, grid: Grid, arrays: dict[str, TokenArray], store: Store, sink: Sink, device: Device
    ) -> None:
        self._problem, self._grid = problem, grid
        self._store, self._sink, self._device = store, sink, device
        self._arrays = {id(array): array for array in arrays.values()}.values()
        self._host = HostPeak()
        self._started = time.monotonic()
        self._before = self._array_bytes()
        device.forget_peak()  # so that what is held from now on was taken for this session
        self._held_before = device.held_bytes()
        self._driver_highest = self._reserved = 0
        self._session_flops = 0
        self._timeline: Timeline | None = None
        self._readers = self._writers = 1
        self._others: dict[str, int] = dict.fromkeys(_MOVED, 0)
        self.restart([])

    def timing(self, timeline: Timeline, readers: int, writers: int) -> "Meter":
        """Tell how busy the stages were, too: so many readers and writers work at the same time."""
        self._timeline, self._readers, self._writers = timeline, readers, writers
        return self

    def since(self, host: HostPeak) -> "Meter":
        """Count the growth of host memory from an earlier moment on."""
        self._host = host
        return self

    def restart(self, covers: Iterable[Mapping[int, int | None]]) -> None:
        """Count anew what is done, from the covers of the stored partials."""
        self._progress = Progress(self._problem, self._grid, covers)

    def count_others(self, said: Iterable[Mapping[str, Any]]) -> None:
        """Count what other processes say that they did in this session, by the names of ``Figures``."""
        found = [{name: int(one.get(name) or 0) for name in _MOVED} for one in said]
        self._others = {name: sum(one[name] for one in found) for name in _MOVED}

    @property
    def rows_done(self) -> int:
        return self._progress.rows_done

    @property
    def rows_total(self) -> int:
        return self._progress.rows_total

    def pairs_computed(self, rows: tuple[int, ...], column: int) -> None:
        self._session_flops += sum(self._progress.pair_computed(row, column) for row in rows)

    def row_finished(self, row: int) -> None:
        self._progress.row_finished(row)

    def figures(self) -> Figures:
        done, busy = self._progress, self._timeline.busy_s if self._timeline else lambda _: 0.0
        self._ask_the_driver()
        others = self._others
        return Figures(
            pairs_done=done.pairs_done,
            pairs_total=done.pairs_total,
            rows_done=done.rows_done,
            rows_total=done.rows_total,
            tokens_done=done.tokens_done,
            flops_done=done.flops_done,
            flops_total=self._problem.flops,
            session_s=time.monotonic() - self._started,
            session_flops=self._session_flops + others["session_flops"],
            bytes_read=self._array_bytes() - self._before + self._store.bytes_read + others["bytes_read"],
            bytes_written=self._sink.bytes_written + self._store.bytes_written + others["bytes_written"],
            device_peak_bytes=self._device.peak_bytes() - self._held_before + others["device_peak_bytes"],
            device_driver_peak_bytes=self._driver_highest,
            device_reserved_bytes=self._reserved,
            host_peak_bytes=self._host.bytes() + others["host_peak_bytes"],
            kernel_s=busy("kernel"),
            copy_s=busy("copy"),
            read_s=busy("read") / self._readers,
            write_s=busy("write") / self._writers + busy("commit"),
        )

    def _ask_the_driver(self) -> None:
        before, found = self._device.held_bytes(), self._device.process_bytes() or 0
        self._driver_highest = max(self._driver_highest, found)
        if before == self._device.held_bytes():
            self._reserved = max(self._reserved, found - before)

    def _array_bytes(self) -> int:
        return sum(array.bytes_read for array in self._arrays)
