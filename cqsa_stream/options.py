"""How to run, as opposed to what: checked once, where it is named, and handed on as it is."""

from dataclasses import dataclass, replace

import torch

from cqsa_stream.errors import InputError
from cqsa_stream.kernels.choose import KERNELS, chosen
from cqsa_stream.kernels.contract import KernelChoice
from cqsa_stream.machine.budgets import free_budgets, parse_size
from cqsa_stream.machine.calibration import load
from cqsa_stream.machine.device import ALL, Device, device_of, devices_of
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers import units
from cqsa_stream.schedulers.quorums import quorum_size
from cqsa_stream.schedulers.schedules import AUTO, SCHEDULES
from cqsa_stream.schedulers.search import MOST_CHUNKS
from cqsa_stream.schedulers.shares import MOST_SHARES
from cqsa_stream.scores import is_finite, is_number

__all__ = ["Options"]

CHECKPOINT_EVERY_S = 60.0
EXECUTORS = ("local", "ray")
_LARGEST_CALL = 65_536
_MOST_WORKERS = 4_096
_SHARES_OF_A_WORKER = 4  # so that those who are done first can take what is left


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what: none of it changes the result beyond rounding. None: not named by the user.

    Sizes are bytes, or text as "4GiB", and times seconds, or text as "5m"; after the making they are numbers.
    ``workers`` and ``executor``: how many processes, and who places them; ``address`` of the cluster. Local workers
    share the memory of their machine: ``host_memory`` is that of all of them.
    """

    device: str | None = None
    device_memory: int | str | None = None
    host_memory: int | str | None = None
    schedule: str | None = None
    chunks: int | None = None
    checkpoint_every_s: float | str | None = None
    max_seconds: float | str | None = None
    kernel: str | None = None
    shares: int | None = None
    workers: int | None = None
    executor: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        """Raises InputError where a value cannot be, whatever the problem."""
        for name, known in (("kernel", KERNELS), ("schedule", (AUTO, *SCHEDULES)), ("executor", EXECUTORS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InputError(f"{name} {value!r}; expected one of {', '.join(known)}")
        if self.device is not None:
            self._set("device", str(self.device))
        for name, most in (("chunks", MOST_CHUNKS), ("shares", MOST_SHARES), ("workers", _MOST_WORKERS)):
            value = getattr(self, name)
            if value is not None:
                if not is_number(value) or value % 1 or not 0 < value <= most:
                    raise InputError(f"{name} {value!r}; expected a whole number, 1 to {most}")
                self._set(name, int(value))  # numpy's numbers are none of JSON's
        if self.shares == 1 and ((self.workers or 1) > 1 or self.executor == "ray"):
            raise InputError("shares 1: only one worker could compute; name a few for each worker, or none")
        if self.address is not None and self.executor != "ray":
            raise InputError(f'address {self.address!r}: only executor ray has one; expected executor="ray" with it')
        for name in ("checkpoint_every_s", "max_seconds"):
            self._set(name, _seconds(name, getattr(self, name)))
        for name in ("device_memory", "host_memory"):
            self._set(name, parse_size(getattr(self, name), name))

    @property
    def budgets(self) -> tuple[int | None, int | None]:
        """Bytes of the device's memory and of the host's, as far as they were named."""
        return parse_size(self.device_memory, "device_memory"), parse_size(self.host_memory, "host_memory")

    @property
    def devices(self) -> list[str]:
        """The device of each worker: all that are named, in turns where more workers are wanted."""
        several = (self.workers or 1) > 1 and self.device in (None, AUTO) and device_of(AUTO).habits.own_memory
        found = devices_of(ALL if several else self.device or AUTO)
        return [found[n % len(found)] for n in range(self.workers or len(found))]

    def in_one_process(self) -> "Options":
        """Return the options for inputs in memory, of which other processes know nothing: the first device is taken.

        Raises InputError where several workers are named.
        """
        if (self.workers or 1) > 1 or self.executor == "ray":
            raise InputError("inputs in memory with several workers: each opens them by name; name paths")
        return self if self.device is None else replace(self, device=devices_of(self.device)[0])

    @property
    def dealt(self) -> int:
        """Into how many shares a new run is dealt: a few for each worker, where there are several."""
        workers, several = len(self.devices), len(self.devices) > 1 or self.executor == "ray"
        return self.shares or (_SHARES_OF_A_WORKER * workers if several else 1)

    def of_a_worker(self) -> "Options":
        """Return the options of one of the workers: the first device, and its part of its memory and the machine's."""
        together = 1 if self.executor == "ray" else len(self.devices)
        host = parse_size(self.host_memory, "host_memory")
        if host is None and together > 1:
            host = free_budgets(device_of("cpu"))[1]
        device = self.device if self.device is None else self.devices[0]
        ours = device_of(device or AUTO).habits.host_reserved_bytes if together > 1 else 0  # who leads them holds it
        host = None if host is None else max(1, (host - ours) // together)
        on_one = 1 if self.executor == "ray" else max(map(self.devices.count, self.devices))
        own = parse_size(self.device_memory, "device_memory")
        if on_one > 1:
            own = free_budgets(device_of(device or AUTO))[0] if own is None else own
            own = None if own is None else max(1, own // on_one)
        return replace(self, device=device, workers=len(self.devices), host_memory=host, device_memory=own)

    def of_one_process(self) -> "Options":
        """Return the options of a run that one process computes, whatever was asked for."""
        device = self.device if self.device is None else self.devices[0]
        return replace(self, device=device, workers=None, executor=None, address=None)

    @property
    def interval_s(self) -> float:
        """Seconds between checkpoints."""
        return CHECKPOINT_EVERY_S if self.checkpoint_every_s is None else float(self.checkpoint_every_s)

    @property
    def limit_s(self) -> float | None:
        """Seconds after which a run stops; None: it does not for the time."""
        return None if self.max_seconds is None else float(self.max_seconds)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def check(self, problem: Problem) -> None:
        """Raises InputError where a value cannot be, for this problem on this machine."""
        self.kernel_choice(device_of(self.device or "auto"), problem)
        if self.chunks is not None and problem.same_positions:
            try:
                quorum_size(self.chunks)
            except ValueError as error:
                raise InputError(str(error)) from error

    def kernel_choice(self, device: Device, problem: Problem) -> KernelChoice:
        """Return what computes the problem on a device. Raises InputError where there is none."""
        rows, columns = (min(tokens, _LARGEST_CALL) for tokens in (problem.queries, problem.keys))
        width, stored = max(problem.head_dim, problem.value_dim), getattr(torch, problem.dtype)
        terms = problem.terms.of_kernels
        return chosen(device.torch, stored, self.kernel, load(device), problem.group * rows, columns, width, terms)


def _seconds(name: str, value: float | str | None) -> float | None:
    """Return seconds from a number or from "90", "5m", "1h". Raises InputError."""
    try:
        value = units.parse_duration(value) if isinstance(value, str) else value
    except ValueError as error:
        raise InputError(f"{name} {value!r}: {error}") from error
    if value is not None and not (is_finite(value) and value >= 0):
        raise InputError(f'{name} {value!r}; expected seconds, at least 0, or text as "5m" or "1h"')
    return None if value is None else float(value)
