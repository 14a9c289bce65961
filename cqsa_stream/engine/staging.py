"""From the ring of host buffers to where the kernel reads: an alias, an upcast, or a copy to the device.

On a host, tiles of the kernel's own dtype are read where the prefetcher put them and others are upcast into one reused
buffer. On CUDA all is copied on a stream of its own: blocks of keys and values into two buffers that take turns,
queries into places of which there are more than a task has rows, so that the next task's come while this one computes.
What is to be upcast is copied as it is and upcast there. Nothing here waits for the device: events order the streams.
"""

from collections import deque

import torch
from torch import Tensor

from cqsa_stream.engine.operation import Operation
from cqsa_stream.engine.prefetch import Loaded
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.machine.device import DONE, Device, Event
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.model.memory import Layout, in_lines

__all__ = ["Stage"]


class Stage:
    """Brings blocks of keys and values, and row chunks of queries, to the device in the kernel's dtype."""

    def __init__(
        self,
        problem: Problem,
        rows: Axis,
        layout: Layout,
        device: Device,
        operation: Operation,
        timeline: Timeline,
    ) -> None:
        stored, compute = getattr(torch, problem.dtype), operation.compute_dtype
        self._group, self._head_dim = problem.group, problem.head_dim
        self._factor, self._readers = operation.row_factor, operation.readers
        self._device, place, copies = device, device.torch, device.habits.own_memory
        self._timeline = timeline
        self._aliases = not copies and stored == compute
        self._held: list[Loaded] = []
        self._turn = 0
        turns = 0 if self._aliases else device.habits.block_buffers

        def places(count: int, numbers: int) -> Tensor:  # bits must not depend on which of them is free
            size = in_lines(numbers * compute.itemsize) // compute.itemsize
            return torch.empty(count, size, dtype=compute, device=place)

        numbers = [layout.block_tokens * width for width in (problem.head_dim, problem.value_dim)]
        self._blocks = [block[: sum(numbers)].split(numbers) for block in places(turns, sum(numbers))]
        size = layout.slot_bytes // stored.itemsize if copies and stored != compute else 0
        self._narrow = torch.empty(size, dtype=stored, device=place)
        self._queries = places(layout.query_places, problem.group * rows.chunk_tokens * problem.head_dim)
        self._places: deque[tuple[int, Event]] = deque((i, DONE) for i in range(layout.query_places))
        self._place_of: dict[int, int] = {}
        self._stream = device.new_stream()  # after what was allocated: memory used before may still be read
        self._free: list[Event] = [DONE] * turns

    def begin_row(self, row: int, tokens: int) -> Tensor:
        """Return the place ``[heads, tokens, head_dim]`` of a row chunk's queries, to be filled by ``queries``."""
        self._place_of[row], free = self._places.popleft()
        self._stream.wait_event(free)
        place: Tensor = self._queries[self._place_of[row]]
        return place[: self._group * tokens * self._head_dim].view(self._group, tokens, self._head_dim)

    def queries(self, loaded: Loaded, target: Tensor) -> None:
        """Copy query rows to their place; kernels that are issued afterwards find them there."""
        with self._device.on(self._stream), self._timeline.on_device("copy", "query"):
            self._upload(loaded, target)
            if self._factor != 1.0:
                target.mul_(self._factor)
        self._await_copies()

    def end_row(self, row: int) -> None:
        """Note that the last kernel which reads a row's queries has been issued, and merged."""
        self._places.append((self._place_of.pop(row), self._device.mark()))

    def block(self, key: Loaded, value: Loaded) -> tuple[Tensor, Tensor]:
        """Return keys and values on the device; they stay there until ``done``."""
        if self._aliases:
            self._held = [key, value]
            return key.values, value.values
        with self._device.on(self._stream):
            self._stream.wait_event(self._free[self._turn])
            with self._timeline.on_device("copy", "block"):
                staged = [self._copy(loaded, n) for n, loaded in enumerate((key, value))]
        self._await_copies()
        return staged[0], staged[1]

    def done(self) -> None:
        """Note that the last kernel which reads the block has been issued, and merged."""
        for loaded in self._held:
            loaded.release()
        self._held = []
        if self._blocks:
            self._free[self._turn] = self._device.mark()
            self._turn = (self._turn + 1) % len(self._blocks)

    def _await_copies(self) -> None:
        for reader in self._readers:
            reader.wait_stream(self._stream)

    def _copy(self, loaded: Loaded, which: int) -> Tensor:
        target: Tensor = self._blocks[self._turn][which][: loaded.values.numel()].view(loaded.values.shape)
        self._upload(loaded, target)
        return target

    def _upload(self, loaded: Loaded, target: Tensor) -> None:
        """Copy to the device and to the target's dtype, in the order of the current stream."""
        if self._narrow.numel():
            narrow = self._narrow[: loaded.values.numel()].view(loaded.values.shape)
            narrow.copy_(loaded.values, non_blocking=True)
            target.copy_(narrow)
        else:  # head by head: a part of each would first be copied to memory of its own
            for place, values in zip(target, loaded.values, strict=True):
                place.copy_(values, non_blocking=True)
        loaded.release(self._device.mark())
