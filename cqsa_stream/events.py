"""What a run tells its observers. The engine emits these and never prints."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Checkpointed", "Ended", "Event", "Figures", "Observer", "Progressed", "Span", "Started"]


@dataclass(frozen=True)
class Figures:
    """Where a run stands. ``*_done`` of all sessions; seconds, bytes and ``session_flops`` of this one.

    ``kernel_s``, ``copy_s``, ``read_s`` and ``write_s``: how long this session's kernels, copies to the device, readers
    (all of them) and writers were busy, side by side.
    ``device_peak_bytes``: the growth of what torch's allocator holds; ``device_driver_peak_bytes``: the most that the
    driver said this process holds, when it was asked; ``device_reserved_bytes``: the most of it that was not torch's,
    but the context's and libraries'. Both 0 where the driver does not tell.
    """

    pairs_done: int
    pairs_total: int
    rows_done: int
    rows_total: int
    tokens_done: int
    flops_done: int
    flops_total: int
    session_s: float
    session_flops: int
    bytes_read: int
    bytes_written: int
    device_peak_bytes: int
    device_driver_peak_bytes: int
    device_reserved_bytes: int
    host_peak_bytes: int
    kernel_s: float = 0.0
    copy_s: float = 0.0
    read_s: float = 0.0
    write_s: float = 0.0

    @property
    def busy(self) -> dict[str, float]:
        """Which part of this session each stage was busy: the one near 1 is what limits."""
        stages = {"compute": self.kernel_s, "bus": self.copy_s, "disk reads": self.read_s, "disk writes": self.write_s}
        return {name: min(1.0, seconds / max(self.session_s, 1e-9)) for name, seconds in stages.items()}

    def measured(self) -> dict[str, float]:
        """Return what a plan predicts too."""
        return {
            "seconds": self.session_s,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "host_bytes": self.host_peak_bytes,
            "device_bytes": self.device_peak_bytes,
        }

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at this session's rate; None before there is one."""
        if self.flops_done >= self.flops_total:
            return 0.0
        if not self.session_flops:
            return None
        return (self.flops_total - self.flops_done) * self.session_s / self.session_flops


@dataclass(frozen=True)
class Started:
    """A session begins: ``problem`` in a line, ``plan`` as ``Plan.to_dict`` gives it, and what is ``predicted`` of this
    session: of what is left.
    """

    problem: str
    plan: dict[str, Any]
    figures: Figures
    predicted: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progressed:
    """Some pairs are computed (in memory, not on disk)."""

    figures: Figures


@dataclass(frozen=True)
class Checkpointed:
    """All that was computed is on disk; it took so many seconds."""

    seconds: float
    partials: int
    figures: Figures


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a thread or the device did: ``kind`` is "read", "wait", "copy", "kernel", "write" or
    "commit". Seconds from the session's first moment of computing on.
    """

    kind: str
    where: str
    start_s: float
    stop_s: float
    about: str = ""


@dataclass(frozen=True)
class Ended:
    """The session is over: ``"done"``, or why it stopped. ``predicted`` and ``measured``: of this session;
    ``spans``: what it did when, the first thousands of spans of threads and of the device.
    """

    reason: str
    figures: Figures
    predicted: dict[str, float]
    measured: dict[str, float]
    spans: tuple[Span, ...] = ()

    @property
    def why(self) -> str:
        """The reason as one tells it."""
        return self.reason.removeprefix("RunStopped: ").removeprefix("RunInterrupted: ")


Event = Started | Progressed | Checkpointed | Ended
Observer = Callable[[Event], None]
