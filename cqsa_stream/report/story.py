"""What a report tells of a run: plain values, from its directory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cqsa_stream.events import Span

__all__ = ["Sample", "Story", "samples_of"]

Map = Sequence[Sequence[float | None]]
_STAGES = {"compute": "kernel_s", "bus": "copy_s", "disk reads": "read_s", "disk writes": "write_s"}


@dataclass(frozen=True)
class Sample:
    """A moment of a session: seconds since it began, rates since the sample before, and the peak of host memory.

    ``busy``: which part of the time since then each stage was busy.
    """

    seconds: float
    flops_per_s: float
    bytes_per_s: float
    host_bytes: float
    busy: dict[str, float]


@dataclass(frozen=True)
class Story:
    """``status`` and ``plan`` as their commands print them; ``samples`` and ``spans`` are of the last session.

    ``made``: when, and where the run was computed. ``verification``: its figures, or why there are none.
    """

    name: str
    problem: str
    made: str
    status: dict[str, Any]
    plan: dict[str, Any]
    pairs: Map
    samples: Sequence[Sample]
    spans: Sequence[Span]
    verification: dict[str, Any] | str


def samples_of(figures: Iterable[dict[str, Any]]) -> list[Sample]:
    """Return the samples of a session from the figures it logged, which only grow."""
    found: list[Sample] = []
    names = ("session_s", "session_flops", "bytes_read", *_STAGES.values())
    before: dict[str, float] = {}
    for now in figures:
        before = before or {name: now.get(name, 0.0) for name in names}
        passed = now["session_s"] - before["session_s"]
        if passed <= 0:
            continue
        grown = {name: max(0.0, now.get(name, 0.0) - before[name]) / passed for name in names}
        busy = {stage: min(1.0, grown[name]) for stage, name in _STAGES.items()}
        host = now.get("host_peak_bytes", 0.0)
        found.append(Sample(now["session_s"], grown["session_flops"], grown["bytes_read"], host, busy))
        before = {name: now.get(name, 0.0) for name in names}
    return found
