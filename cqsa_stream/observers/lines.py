"""The words of progress: lines for logs, the parts of a bar, and what is said at a run's end."""

import time
from collections.abc import Callable, Mapping
from typing import TextIO

from cqsa_stream.events import Ended, Event, Figures, Started
from cqsa_stream.schedulers.plan_text import plan_text
from cqsa_stream.schedulers.units import amount_text, duration_text, size_text, time_text

__all__ = ["PlainLines", "begun_lines", "ended_line", "progress_parts", "share_text", "side_by_side", "stages_text"]

_COMPARED = (  # of what was predicted and measured: name, label, as text, short
    ("seconds", "time", duration_text, "took"),
    ("host_bytes", "peak host memory", size_text, "host"),
    ("device_bytes", "peak device memory", size_text, "device"),
    ("bytes_read", "read", size_text, "read"),
    ("bytes_written", "written", size_text, "wrote"),
)


def share_text(figures: Figures) -> str:
    """Return which part of the work is done: 100% only where all is."""
    return f"{100 * figures.flops_done // max(1, figures.flops_total):3}%"


def progress_parts(figures: Figures) -> list[str]:
    """Return the times, the rate of computing and that of reading, of this session: the most important first."""
    seconds = max(figures.session_s, 1e-9)
    return [
        f"{time_text(figures.session_s)} elapsed, {time_text(figures.eta_s)} left",
        amount_text(figures.session_flops / seconds, "FLOP/s"),
        f"read {amount_text(figures.bytes_read / seconds, 'B/s')}",
    ]


def stages_text(figures: Figures) -> str:
    """Say what limits, and how busy each stage was; nothing where that was not measured."""
    busy = {name: share for name, share in figures.busy.items() if share >= 0.005}
    if not busy:
        return ""
    most = max(busy, key=lambda name: busy[name])
    return f"limited by {most}: " + ", ".join(f"{name} {share:.0%} busy" for name, share in busy.items())


def begun_lines(event: Started, *, verbose: bool = False) -> list[str]:
    """Return the problem, or the whole plan, which begins with it, and what is on disk already."""
    figures = event.figures
    on_disk = f"resuming: {figures.pairs_done:,} of {figures.pairs_total:,} pairs are on disk"
    return [plan_text(event.plan) if verbose else event.problem, *([on_disk] if figures.pairs_done else [])]


def ended_line(event: Ended) -> str:
    """Say what a session took, and in brackets what was predicted of it."""
    parts = [
        f"{short} {text(event.measured.get(name, 0))} ({text(event.predicted[name])})"
        for name, _, text, short in _COMPARED
        if event.predicted.get(name)
    ]
    return f"measured (predicted): {', '.join(parts)}"


def side_by_side(predicted: Mapping[str, float], measured: Mapping[str, float]) -> str:
    """Return a table of what a plan said and what a run took."""
    lines = [f"{'':<18}  {'predicted':>11}  {'measured':>11}"]
    for name, label, text, _ in _COMPARED:
        if predicted.get(name) or measured.get(name):
            lines.append(f"{label:<18}  {text(predicted.get(name, 0)):>11}  {text(measured.get(name, 0)):>11}")
    return "\n".join(lines)


class PlainLines:
    """Lines with a time stamp for logs: how a session begins and ends, and one a minute between."""

    def __init__(
        self,
        file: TextIO,
        every_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        *,
        verbose: bool = False,
    ) -> None:
        self._file, self._every_s, self._clock, self._verbose = file, every_s, clock, verbose
        self._last = clock()

    def opening(self, what: str) -> None:
        """Say that a run is being opened."""
        self._print(f"opening {what}")

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            for line in begun_lines(event, verbose=self._verbose):
                self._print(line)
        elif self._clock() - self._last >= self._every_s or isinstance(event, Ended):
            why = f"   ({event.why})" if isinstance(event, Ended) and event.reason != "done" else ""
            self._print("   ".join([share_text(event.figures), *progress_parts(event.figures)]) + why)
            if self._verbose:
                self._print(stages_text(event.figures))
        else:
            return
        self._last = self._clock()
        if isinstance(event, Ended) and event.reason == "done":
            self._print(ended_line(event))

    def _print(self, text: str) -> None:
        print(time.strftime("%Y-%m-%d %H:%M:%S cqsa:"), text, file=self._file, flush=True)
