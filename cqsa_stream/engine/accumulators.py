"""The accumulators of one sum: partials of the chunks that a task adds to, and as many more as the plan allows.

Where they stand, ``Standing`` decides, as the planner has counted: a partial that leaves the device goes to host memory
or, by a durable commit alone, to disk. Copies between the two go on in the order of the current stream, on which tiles
are merged.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cqsa_stream.engine.arena import PageLock, in_pages, pages
from cqsa_stream.engine.operation import Fields
from cqsa_stream.engine.stores import Store
from cqsa_stream.machine.device import DONE, Device, Event
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.model.memory import in_lines
from cqsa_stream.schedulers.operands import Sum
from cqsa_stream.schedulers.residency import Standing

__all__ = ["Accumulator", "Accumulators", "fields_in", "place_bytes"]


@dataclass
class Accumulator:
    """The partial of a chunk: its fields, and the chunks of the other axis that are in it, as bits."""

    fields: Fields
    cover: int = 0
    dirty: bool = False
    slot: int = field(default=-1)


class Accumulators:
    """Partials of sum ``number``, of one lane at a time; a context manager."""

    def __init__(
        self, number: int, sum_: Sum, axis: Axis, places: tuple[int, int], device: Device, store: Store
    ) -> None:
        """``places``: of partials on the device, and parked in host memory."""
        self.number, self.sum, self.axis = number, sum_, axis
        self._device, self._store = device, store
        resident, parked = places
        size = place_bytes(sum_, axis.chunk_tokens)
        self._places = torch.empty(resident, size, dtype=torch.uint8, device=device.torch)
        self._host = pages(parked * in_pages(size)).view(parked, in_pages(size))
        self._lock = PageLock(self._host, device)
        self._standing = Standing(resident, parked)
        self._held: dict[int, Accumulator] = {}
        self._parked: dict[int, Accumulator] = {}
        self._until: dict[int, Event] = {}
        self.lane = -1

    def __enter__(self) -> "Accumulators":
        self._lock.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._device.synchronize()
        self._lock.__exit__(*error)

    def __getitem__(self, chunk: int) -> Accumulator:
        """Return a partial that was brought to the device."""
        return self._held[chunk]

    def begin_lane(self, lane: int) -> None:
        """Start with no partial in memory; those of the lane before must be finished or committed."""
        assert not {**self._held, **self._parked}, "partials of the lane before are still in memory"
        self.lane = lane

    def bring(self, chunk: int, next_use: int, keep: Collection[int] = ()) -> Accumulator:
        """Return a chunk's partial, from memory, from the store, or the identity; those in ``keep`` stay here."""
        brought = self._standing.bring(chunk, next_use, keep)
        if brought.present:
            return self._held[chunk]
        if brought.stored is not None and brought.stored != brought.evicted:
            self._commit(brought.stored, self._parked.pop(brought.stored))
        if brought.evicted is not None:
            leaving = self._held.pop(brought.evicted)
            if brought.parked_at is None:
                self._commit(brought.evicted, leaving)
            else:
                self._lock.wait(brought.parked_at)
                self._parked[brought.evicted] = self._moved(leaving, self._host[brought.parked_at], brought.evicted)
        self._device.current_stream().wait_event(self._until.pop(brought.slot, DONE))
        place = self._places[brought.slot]
        if brought.parked is not None:
            found = self._moved(self._parked.pop(chunk), place, chunk)
        else:
            found = self._loaded(chunk, place)
        found.slot = brought.slot
        self._held[chunk] = found
        return found

    def add(self, chunk: int, other: int) -> int:
        """Note that a chunk of the other axis is in a partial now; return the partial's cover."""
        held = self._held[chunk]
        assert not held.cover >> other & 1, f"pair ({chunk}, {other}) computed twice"
        held.cover |= 1 << other
        held.dirty = True
        return held.cover

    @property
    def full(self) -> bool:
        """Whether bringing another partial means that one leaves."""
        return self._standing.device.full

    def retire(self, chunk: int) -> Accumulator:
        """Take a partial out; its place is filled again when ``free`` says so."""
        self._standing.device.remove(chunk)
        return self._held.pop(chunk)

    def free(self, slot: int, until: Event = DONE) -> None:
        """Let a place be filled again, once the event has happened."""
        self._until[slot] = until
        self._standing.device.free(slot)

    def commit(self) -> int:
        """Store every partial that changed; return how many."""
        changed = [(chunk, held) for chunk, held in {**self._held, **self._parked}.items() if held.dirty]
        for chunk, held in changed:
            self._commit(chunk, held)
        return len(changed)

    def end_lane(self) -> None:
        """Commit what is not finished and forget it."""
        self.commit()
        for chunk in list(self._held):
            self.free(self.retire(chunk).slot)
        for chunk in list(self._parked):
            self._standing.host.free(self._standing.host.remove(chunk))
        self._parked = {}

    def _commit(self, chunk: int, held: Accumulator) -> None:
        if held.dirty:
            self._device.current_stream().synchronize()  # it may be on its way to where it is parked
            numbers = [_array(tensor.cpu()) for tensor in held.fields]
            self._store.commit(self.number, self.lane, chunk, held.cover, numbers)
            held.dirty = False

    def _moved(self, held: Accumulator, place: Tensor, chunk: int) -> Accumulator:
        """Begin to copy a partial to another place, and return it there."""
        fields = self._fields(chunk, place)
        for target, source in zip(fields, held.fields, strict=True):
            target.copy_(source, non_blocking=True)
        return Accumulator(fields, held.cover, held.dirty)

    def _loaded(self, chunk: int, place: Tensor) -> Accumulator:
        """Return a chunk's partial as it is stored, or the identity."""
        fields = self._fields(chunk, place)
        host = [torch.empty_like(it, device="cpu") for it in fields] if self._device.habits.own_memory else list(fields)
        cover = self._store.load_into(self.number, self.lane, chunk, [_array(tensor) for tensor in host])
        for tensor, loaded, about in zip(fields, host, self.sum.fields, strict=True):
            if not cover:
                tensor.fill_(about.identity)
            elif loaded is not tensor:
                tensor.copy_(loaded)
        return Accumulator(fields, cover)

    def _fields(self, chunk: int, place: Tensor) -> Fields:
        return fields_in(place, self.sum, len(self.axis.span(chunk)), self.axis.chunk_tokens)


def place_bytes(sum_: Sum, tokens: int) -> int:
    """Return the bytes of a place for a partial of so many tokens, each field in whole lines of a processor's cache."""
    return sum(in_lines(field.numbers * tokens * field.itemsize) for field in sum_.fields)


def fields_in(place: Tensor, sum_: Sum, tokens: int, most: int) -> Fields:
    """Return the fields of so many tokens in a place that was made for ``most``."""
    found, start = [], 0
    for about in sum_.fields:
        size = in_lines(about.numbers * most * about.itemsize)
        shape = about.shape(tokens)
        numbers = place[start : start + size].view(getattr(torch, about.dtype))
        found.append(numbers[: math.prod(shape)].view(shape))
        start += size
    return tuple(found)


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return array
