"""Observers: who watches a run. Each is called with every event; the engine knows none of them."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, TextIO

from tqdm import tqdm

from cqsa_stream.errors import InputError
from cqsa_stream.events import Checkpointed, Ended, Event, Figures, Observer, Progressed, Started
from cqsa_stream.run.directory import RunDirectory

_log = logging.getLogger(__name__)

__all__ = [
    "EventLog",
    "JsonLines",
    "PlainLines",
    "ProgressBar",
    "after",
    "checked",
    "everyone",
    "rates",
    "side_by_side",
    "terminal_observer",
]


def checked(observers: Any) -> tuple[Observer, ...]:
    """Return a call's observers. Raises InputError where they are no functions."""
    found = tuple(observers) if isinstance(observers, Iterable) else (observers, None)
    if not all(map(callable, found)):
        raise InputError("observers: expected a sequence of functions that take an event")
    return found


def everyone(observers: Iterable[Observer]) -> Observer:
    """Return an observer that passes each event on to all. None can hurt the run: one that raises is told no more."""
    watching = dict(enumerate(observers))

    def observe(event: Event) -> None:
        for number, observer in tuple(watching.items()):
            try:
                observer(event)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                del watching[number]
                name = getattr(observer, "__qualname__", type(observer).__name__)
                found = f"{type(error).__name__}: {error}"
                _log.warning("observer %s raised %s; it is told no more, the run goes on", name, found)

    return observe


def after(first: Observer, then: Observer) -> Observer:
    """Return an observer that tells one, then the other."""

    def observe(event: Event) -> None:
        first(event)
        then(event)

    return observe


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


class ProgressBar:
    """A tqdm bar over pairs, for terminals."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._bar: tqdm[Any] | None = None

    def __call__(self, event: Event) -> None:
        figures = event.figures
        if isinstance(event, Started):
            print(f"cqsa: {event.problem}", file=self._file)
            self._bar = tqdm(
                total=figures.pairs_total,
                initial=figures.pairs_done,
                unit="pair",
                file=self._file,
                dynamic_ncols=True,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} pairs [{elapsed}{postfix}]",
            )
        if self._bar is None:
            return
        self._bar.set_postfix_str(rates(figures), refresh=False)
        self._bar.update(figures.pairs_done - self._bar.n)
        if isinstance(event, Ended):
            self._bar.close()
            if event.reason == "done":
                print(side_by_side(event.predicted, event.measured), file=self._file)


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


class JsonLines:
    """One JSON object for each event but progress within a second of the last."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progressed):
            if time.monotonic() - self._last < 1:
                return
            self._last = time.monotonic()
        print(json.dumps({"type": type(event).__name__.lower(), **asdict(event)}), file=self._file, flush=True)


class EventLog:
    """Keeps a run directory's event log and its latest figures: news, not state."""

    def __init__(self, directory: RunDirectory, options: dict[str, object], every_s: float = 1.0) -> None:
        self._directory, self._options, self._every_s = directory, options, every_s
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Progressed) and now - self._last < self._every_s:
            return
        self._last = now
        figures = asdict(event.figures)
        self._directory.write_session({"ended": isinstance(event, Ended), **figures})
        if isinstance(event, Started):
            self._directory.append_event({"event": "started", "options": self._options, "plan": event.plan, **figures})
        elif isinstance(event, Checkpointed):
            self._directory.append_event({"event": "checkpointed", "seconds": event.seconds, **figures})
        elif isinstance(event, Ended):
            compared = {"predicted": event.predicted, "measured": event.measured}
            self._directory.append_event({"event": "ended", "reason": event.reason, **compared, **figures})


def terminal_observer(*, as_json: bool, quiet: bool) -> tuple[Observer, ...]:
    """Return who watches a run of the command line: a bar on a terminal, else lines; JSON lines go to stdout."""
    observers: list[Observer] = [JsonLines(sys.stdout)] if as_json else []
    if not quiet:
        observers.append(ProgressBar(sys.stderr) if sys.stderr.isatty() else PlainLines(sys.stderr))
    return tuple(observers)
