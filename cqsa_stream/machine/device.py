"""Devices: what an engine asks of the one that it computes on. Nobody else asks which kind that is.

Work that is issued on a CUDA device goes on by itself: events order its streams, and whoever issues work says what it
waits for; nobody here waits. Work on a host is done when the call returns: its streams and events are all ``DONE``.
"""

import platform
import re
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import cuda, get_num_threads
from torch import device as TorchDevice

from cqsa_stream.errors import InputError
from cqsa_stream.machine.driver import process_bytes
from cqsa_stream.machine.habits import CUDA, HOST
from cqsa_stream.schedulers.model.habits import Habits

__all__ = ["ALL", "DONE", "Cuda", "Device", "Event", "Host", "Stream", "Tick", "device_of", "devices_of"]


class Event(Protocol):
    """Something that was issued, and happens some time."""

    def synchronize(self) -> None:
        """Wait for it, in this thread."""


Tick = Any
"""A moment that a device remembers."""


class Stream(Protocol):
    """Work that a device does in order."""

    def wait_event(self, event: Any) -> None:
        """Let what is issued on this stream from now on wait for an event."""

    def wait_stream(self, stream: Any) -> None:
        """Let what is issued on this stream from now on wait for what was issued on another."""

    def synchronize(self) -> None:
        """Wait for all that was issued on it, in this thread."""


class _Done:
    """A stream whose work is all done, and the event of that."""

    def wait(self, stream: Any) -> None:
        pass

    wait_event = wait_stream = wait

    def synchronize(self) -> None:
        pass


DONE = _Done()
_CPU = TorchDevice("cpu")


@dataclass(frozen=True)
class Host:
    """The processor and host memory. What is asked of it is what is asked of every device; most of it is nothing."""

    torch: TorchDevice = _CPU
    habits: Habits = HOST

    def __str__(self) -> str:
        return str(self.torch)

    @property
    def model(self) -> str:
        """Its maker's name of it."""
        return platform.machine()

    @property
    def threads(self) -> int:
        """How many threads of this process compute; 0 on a device of its own."""
        return get_num_threads()

    @property
    def processors(self) -> int:
        """Among how many the rows of a kernel call are dealt: threads here, multiprocessors on a device of its own."""
        return self.threads

    def current(self) -> AbstractContextManager[object]:
        """Make it current."""
        return nullcontext()

    def new_stream(self) -> Stream:
        """Return a stream whose work begins after all that was issued on the current one."""
        return DONE

    def current_stream(self) -> Stream:
        """Return the stream on which this thread issues work."""
        return DONE

    def on(self, stream: Any) -> AbstractContextManager[object]:
        """Issue work on a stream."""
        return nullcontext()

    def mark(self) -> Event:
        """Return the event that all work issued on the current stream so far is done."""
        return DONE

    def tick(self) -> Tick:
        """Return the moment at which the work issued on the current stream so far is done, to be read later."""
        return time.monotonic()

    def has_passed(self, tick: Tick) -> bool:
        """Return whether such a moment is past, without waiting for it."""
        return True

    def between_s(self, first: Tick, last: Tick) -> float:
        """Return the seconds from one such moment to another; both are past."""
        return float(last - first)

    def synchronize(self) -> None:
        """Wait for all work, in this thread."""

    def lock(self, address: int, size: int) -> int:
        """Page-lock host memory, from which copies then run beside the compute; return an error code, 0 for none."""
        return 0

    def unlock(self, address: int) -> None:
        """Undo that."""

    def free_bytes(self) -> int | None:
        """Return what is free of its own memory, what torch holds without using it included; None where it has none."""
        return None

    def held_bytes(self) -> int:
        """Return what torch holds of its own memory, used or not."""
        return 0

    def peak_bytes(self) -> int:
        """Return the most that torch has held since ``forget_peak``."""
        return 0

    def forget_peak(self) -> None:
        """Give back what torch holds without using it, and count anew."""

    def process_bytes(self) -> int | None:
        """Return what this process holds of its own memory, as the driver sees it; None where that is not known."""
        return None


@dataclass(frozen=True)
class Cuda:
    """A CUDA device; the methods are those of ``Host``."""

    torch: TorchDevice
    habits: Habits = CUDA

    def __str__(self) -> str:
        return str(self.torch)

    @property
    def model(self) -> str:
        return cuda.get_device_name(self.torch)

    @property
    def threads(self) -> int:
        return 0

    @property
    def processors(self) -> int:
        return int(cuda.get_device_properties(self.torch).multi_processor_count)

    def current(self) -> AbstractContextManager[object]:
        return cuda.device(self.torch)

    def new_stream(self) -> Stream:
        stream: Stream = cuda.Stream(self.torch)  # type: ignore[no-untyped-call]
        stream.wait_stream(self.current_stream())
        return stream

    def current_stream(self) -> Stream:
        return cuda.current_stream(self.torch)

    def on(self, stream: Any) -> AbstractContextManager[object]:
        return cuda.stream(stream)

    def mark(self) -> Event:
        event = cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def tick(self) -> Tick:
        event = cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def has_passed(self, tick: Tick) -> bool:
        return bool(tick.query())

    def between_s(self, first: Tick, last: Tick) -> float:
        return float(first.elapsed_time(last)) / 1e3

    def synchronize(self) -> None:
        cuda.synchronize(self.torch)

    def lock(self, address: int, size: int) -> int:
        return int(cuda.cudart().cudaHostRegister(address, size, 0))  # type: ignore[no-untyped-call]

    def unlock(self, address: int) -> None:
        cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

    def free_bytes(self) -> int | None:
        return cuda.mem_get_info(self.torch)[0] + cuda.memory_reserved(self.torch) - cuda.memory_allocated(self.torch)

    def held_bytes(self) -> int:
        return cuda.memory_reserved(self.torch)

    def peak_bytes(self) -> int:
        return cuda.max_memory_reserved(self.torch)

    def forget_peak(self) -> None:
        cuda.empty_cache()
        cuda.reset_peak_memory_stats(self.torch)

    def process_bytes(self) -> int | None:
        return process_bytes(self.torch)


Device = Host | Cuda


ALL = "cuda"
"""The name of all devices of their own that this machine has."""


def devices_of(name: str) -> list[str]:
    """Return the devices of "cuda", which are all of this machine, or of "cuda:0,2"; another name is one device's.

    Raises InputError where a device is named twice.
    """
    if name == ALL:
        return [f"cuda:{number}" for number in range(cuda.device_count() if cuda.is_available() else 0)] or [name]
    if re.fullmatch(r"cuda:\d+(?:,\d+)+", name) is None:
        return [name]
    numbers = [int(number) for number in name.removeprefix("cuda:").split(",")]
    if len(set(numbers)) < len(numbers):
        raise InputError(f"device {name!r}: a device is named twice; expected each once, as cuda:0,2")
    return [f"cuda:{number}" for number in numbers]


def device_of(name: str) -> Device:
    """Return the device of "auto", "cpu", "cuda" or "cuda:1". Raises InputError where there is none such."""
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise InputError(f"device {name!r}; expected auto, cpu, cuda, cuda:<number> or cuda:<number>,<number>")
    if name == "cpu" or (name == "auto" and not cuda.is_available()):
        return Host()
    count, index = cuda.device_count() if cuda.is_available() else 0, int(match[1] or 0)
    if index >= count:
        raise InputError(f'device {name!r}: this machine has {count} CUDA devices; take device="cpu"')
    return Cuda(TorchDevice("cuda", index))
