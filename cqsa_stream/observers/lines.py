"""Plain lines for logs, and the words and tables that the bar prints too."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from cqsa_stream.events import Checkpointed, Ended, Event, Figures, Progressed, Started

__all__ = ["PlainLines", "figure_lines", "rates", "side_by_side", "status_lines"]


def rates(figures: Figures) -> str:
    """Return TFLOP/s and GB/s read of this session, and the time left at its rate."""
    seconds = max(figures.session_s, 1e-9)
    eta = "?" if figures.eta_s is None else tqdm.format_interval(figures.eta_s)
    return (
        f"{figures.session_flops / seconds / 1e12:.3g} TFLOP/s, read {figures.bytes_read / seconds / 1e9:.3g} GB/s, "
        f"{eta} left"
    )


def side_by_side(predicted: Mapping[str, float], measured: Mapping[str, float]) -> str:
    """Return a table of what a plan said and what a run took."""
    lines = [f"{'':<15}{'predicted':>12}{'measured':>12}"]
    for name, label, unit in (
        ("seconds", "seconds", 1.0),
        ("host_bytes", "peak host MiB", 2.0**20),
        ("device_bytes", "peak device MiB", 2.0**20),
        ("bytes_read", "read MiB", 2.0**20),
        ("bytes_written", "written MiB", 2.0**20),
    ):
        if predicted.get(name) or measured.get(name):
            said, found = predicted.get(name, 0) / unit, measured.get(name, 0) / unit
            lines.append(f"{label:<15}{said:>12,.1f}{found:>12,.1f}")
    return "\n".join(lines)


def status_lines(found: dict[str, Any]) -> str:
    """Return a run's status as text: its figures, then what was predicted beside what was measured."""
    apart = ("predicted", "measured", "workers")
    text = figure_lines({name: value for name, value in found.items() if name not in apart})
    for worker in found["workers"]:
        state = "at work" if worker["lives"] else "gone"
        left = "waits" if worker["share"] is None else f"share {worker['share']}, {worker['tasks_left']} tasks left"
        text += (
            f"\nworker {worker['name']:<5} {state}: process {worker['pid']} on {worker['host']}, {worker['device']}, "
            f"{worker['flops_per_s'] / 1e9:,.1f} GFLOP/s, heard of {worker['silent_s']:.0f} s ago, {left}"
        )
    return f"{text}\n\n{side_by_side(found['predicted'] or {}, found['measured'])}"


def figure_lines(fields: Mapping[str, Any]) -> str:
    """Return figures by their names, a line each."""
    width = max(map(len, fields))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in fields.items())


class PlainLines:
    """One line a minute, for logs."""

    def __init__(self, file: TextIO, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._every_s, self._clock = file, every_s, clock
        self._last = clock()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progressed | Checkpointed) and self._clock() - self._last < self._every_s:
            return
        self._last = self._clock()
        if isinstance(event, Started):
            print(f"cqsa: {event.problem}", file=self._file)
        figures = event.figures
        share = figures.pairs_done / max(1, figures.pairs_total)
        what = f" ({event.reason})" if isinstance(event, Ended) else ""
        print(
            f"cqsa: {figures.pairs_done}/{figures.pairs_total} pairs ({share:.1%}), "
            f"{figures.rows_done}/{figures.rows_total} rows, {rates(figures)}{what}",
            file=self._file,
            flush=True,
        )
        if isinstance(event, Ended) and event.reason == "done":
            print(side_by_side(event.predicted, event.measured), file=self._file, flush=True)
