"""All that an engine works with."""

from collections.abc import Callable
from dataclasses import dataclass, field

from cqsa_stream.engine.meter import Meter
from cqsa_stream.engine.operation import Operation
from cqsa_stream.engine.sinks import Sink
from cqsa_stream.engine.stores import Store
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.events import Observer
from cqsa_stream.machine.device import Device
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.schedulers.shares import Share
from cqsa_stream.storage.contract import TokenArray

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """What a session has one engine do: the tasks of a share.

    ``stop(early_s)`` gives the reason to stop at this safe point, or None; a time limit less than ``early_s`` away
    counts as reached.
    """

    problem: Problem
    plan: Plan
    operation: Operation
    arrays: dict[str, TokenArray]
    sink: Sink
    store: Store
    device: Device
    stop: Callable[[float], str | None]
    observer: Observer
    meter: Meter
    checkpoint_every_s: float
    timeline: Timeline
    share: Share = field(default_factory=Share)
