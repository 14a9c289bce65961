"""Complete chunks of sums on their way from a device with memory of its own to disk.

They are rounded to the output's dtypes, and copied to page-locked memory on a stream of their own.

A chunk's place on the device is free for the next as soon as it is rounded; the stream that computes waits for that
moment, this process does not. Where the host's memory is the device's, chunks leave from where they are.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cqsa_stream.engine.arena import PageLock, in_pages, pages
from cqsa_stream.engine.operation import Fields
from cqsa_stream.machine.device import DONE, Device, Event
from cqsa_stream.schedulers.operands import Sum

__all__ = ["Left", "Outbox", "outbox_for"]

Free = Callable[[Event], None]
"""Lets a place on the device be filled again once an event has happened."""


@dataclass(frozen=True)
class Left:
    """A chunk that left: its fields in host memory, whole once ``copied``; ``release`` when they are written."""

    fields: Fields
    copied: Event
    release: Callable[[], None]


class Outbox(Protocol):
    """Takes complete chunks; a context manager. ``in_place``: they keep their places until they are written."""

    in_place: bool

    @property
    def full(self) -> bool:
        """Whether a chunk must be released before the next can be taken."""

    def take(self, fields: Fields, sum_: Sum, free: Free) -> Left:
        """Begin to copy a chunk as the current stream leaves it."""

    def __enter__(self) -> "Outbox": ...
    def __exit__(self, *error: object) -> None: ...


def outbox_for(device: Device, sum_: Sum, tokens: int, places: int) -> Outbox:
    """Return the outbox for chunks of so many tokens of a sum."""
    return _Copying(device, sum_, tokens, places) if device.habits.own_memory else _InPlace()


class _InPlace:
    """Chunks leave from where they are."""

    in_place, full = True, False

    def take(self, fields: Fields, sum_: Sum, free: Free) -> Left:
        return Left(fields, DONE, lambda: free(DONE))

    def __enter__(self) -> "_InPlace":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is held."""


class _Copying:
    """Places in page-locked memory."""

    in_place = False

    def __init__(self, device: Device, sum_: Sum, tokens: int, places: int) -> None:
        self._sizes = [in_pages(field.numbers * tokens * field.left_itemsize) for field in sum_.fields]
        size = sum(self._sizes)
        self._host = pages(places * size).view(places, size)
        self._rounded = torch.empty(size, dtype=torch.uint8, device=device.torch)
        self._device, self._stream = device, device.new_stream()
        self._free = deque(range(places))
        self._lock = PageLock(self._host, device)

    def __enter__(self) -> "_Copying":
        self._lock.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._device.synchronize()
        self._lock.__exit__(*error)

    @property
    def full(self) -> bool:
        return not self._free

    def take(self, fields: Fields, sum_: Sum, free: Free) -> Left:
        place = self._free.popleft()
        self._lock.wait(place)
        host, rounded = (self._fields(memory, fields, sum_) for memory in (self._host[place], self._rounded))
        self._stream.wait_stream(self._device.current_stream())
        with self._device.on(self._stream):
            for target, source in zip(rounded, fields, strict=True):
                target.copy_(source)
            left = self._device.mark()
            for target, source in zip(host, rounded, strict=True):
                target.copy_(source, non_blocking=True)
            copied = self._device.mark()
        free(left)
        return Left(host, copied, lambda: self._free.append(place))

    def _fields(self, memory: Tensor, like: Fields, sum_: Sum) -> Fields:
        """Return the fields of a place, in the output's dtypes."""
        parts = memory.split(self._sizes)  # type: ignore[no-untyped-call]
        return tuple(
            part.view(getattr(torch, field.left_dtype))[: math.prod(it.shape)].view(it.shape)
            for part, field, it in zip(parts, sum_.fields, like, strict=True)
        )
