"""The event log of a run directory: news for ``status``."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from cqsa_stream.events import Checkpointed, Ended, Event, Progressed, Span, Started

__all__ = ["EventLog"]

_APART = 1.1  # each sample of a session's progress is so much later than the last: a week has 140


class News(Protocol):
    """What the event log needs of a run directory."""

    def write_session(self, figures: dict[str, Any]) -> None:
        """Replace the latest figures."""

    def append_event(self, event: dict[str, Any]) -> None:
        """Append one line to the event log."""

    def write_timeline(self, spans: Sequence[Span]) -> None:
        """Replace the spans of the last session."""


class EventLog:
    """Keeps a run directory's event log and its latest figures: news, not state."""

    def __init__(
        self, directory: News, options: dict[str, object], every_s: float = 1.0, *, leads: bool = False
    ) -> None:
        """``leads``: the figures are those of workers, which keep logs of their own."""
        self._directory, self._options, self._every_s, self._leads = directory, options, every_s, leads
        self._last = self._next_sample_s = 0.0

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Progressed) and now - self._last < self._every_s:
            return
        self._last = now
        figures = asdict(event.figures)
        self._directory.write_session({"ended": isinstance(event, Ended), **figures})
        if isinstance(event, Progressed) and event.figures.session_s >= self._next_sample_s:
            self._next_sample_s = event.figures.session_s * _APART
            self._directory.append_event({"event": "progressed", **figures})
        if isinstance(event, Started):
            self._directory.write_timeline(())
            about = {"options": self._options, "plan": event.plan, "leads": self._leads, "predicted": event.predicted}
            self._directory.append_event({"event": "started", **about, **figures})
        elif isinstance(event, Checkpointed):
            self._directory.append_event({"event": "checkpointed", "seconds": event.seconds, **figures})
        elif isinstance(event, Ended):
            compared = {"predicted": event.predicted, "measured": event.measured}
            self._directory.append_event({"event": "ended", "reason": event.reason, **compared, **figures})
            self._directory.write_timeline(event.spans)
