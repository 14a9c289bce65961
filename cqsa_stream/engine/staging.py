"""From the ring of host buffers to where the kernel reads: an alias, an upcast, or a copy to the device.

On the CPU, tiles of the kernel's own dtype are read where the prefetcher put them and others are upcast into one reused
buffer. On CUDA all is copied on a stream of its own: blocks of keys and values into two buffers that take turns,
queries into places of which there are more than a task has rows, so that the next task's come while this one computes.
What is to be upcast is copied as it is and upcast there. Nothing here waits for the device: events order the streams.
"""

from collections import deque
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from cqsa_stream.engine.prefetch import Loaded
from cqsa_stream.machine.streams import mark, new_stream
from cqsa_stream.machine.tracing import span
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.model.memory import Layout

__all__ = ["Stage"]


class Stage:
    """Brings blocks of keys and values, and row chunks of queries, to the device in the kernel's dtype."""

    def __init__(
        self,
        problem: Problem,
        rows: Axis,
        layout: Layout,
        device: torch.device,
        compute: torch.dtype,
        sign: float,
        readers: tuple[torch.cuda.Stream, ...],
    ) -> None:
        """``sign`` is what queries are multiplied by; ``readers``: the streams of the kernels."""
        stored = getattr(torch, problem.dtype)
        self._group, self._head_dim, self._sign, self._readers = problem.group, problem.head_dim, sign, readers
        self._cuda = device.type == "cuda"
        self._aliases = not self._cuda and stored == compute
        self._held: list[Loaded] = []
        self._turn = 0
        turns = 0 if self._aliases else 2 if self._cuda else 1
        widths = (problem.head_dim, problem.value_dim)
        blocks = torch.empty(turns, layout.block_tokens * sum(widths), dtype=compute, device=device)
        self._blocks = [block.split([layout.block_tokens * width for width in widths]) for block in blocks]
        size = layout.slot_bytes // stored.itemsize if self._cuda and stored != compute else 0
        self._narrow = torch.empty(size, dtype=stored, device=device)
        self._queries = torch.empty(
            layout.query_places, problem.group * rows.chunk_tokens * problem.head_dim, dtype=compute, device=device
        )
        self._places: deque[tuple[int, torch.cuda.Event | None]] = deque((i, None) for i in range(layout.query_places))
        self._place_of: dict[int, int] = {}
        self._stream = new_stream(device) if self._cuda else None
        self._free: list[torch.cuda.Event | None] = [None] * turns

    def begin_row(self, row: int, tokens: int) -> Tensor:
        """Return the place ``[heads, tokens, head_dim]`` of a row chunk's queries, to be filled by ``queries``."""
        self._place_of[row], free = self._places.popleft()
        if self._stream is not None and free is not None:
            self._stream.wait_event(free)
        place: Tensor = self._queries[self._place_of[row]]
        return place[: self._group * tokens * self._head_dim].view(self._group, tokens, self._head_dim)

    def queries(self, loaded: Loaded, target: Tensor) -> None:
        """Copy query rows to their place; kernels that read a block afterwards find them there."""
        with self._copying(), span("queries"):
            self._upload(loaded, target)
            if self._sign != 1.0:
                target.mul_(self._sign)

    def end_row(self, row: int) -> None:
        """Say that the last kernel which reads a row's queries has been issued, and merged."""
        self._places.append((self._place_of.pop(row), mark() if self._cuda else None))

    def block(self, key: Loaded, value: Loaded) -> tuple[Tensor, Tensor]:
        """Return keys and values on the device; they stay there until ``done``."""
        if self._aliases:
            self._held = [key, value]
            return key.values, value.values
        with self._copying(), span("block"):
            if self._stream is not None and (free := self._free[self._turn]) is not None:
                self._stream.wait_event(free)
            staged = [self._copy(loaded, n) for n, loaded in enumerate((key, value))]
        for reader in self._readers:
            assert self._stream is not None
            reader.wait_stream(self._stream)
        return staged[0], staged[1]

    def done(self) -> None:
        """Say that the last kernel which reads the block has been issued, and merged."""
        for loaded in self._held:
            loaded.release()
        self._held = []
        if self._blocks:
            self._free[self._turn] = mark() if self._cuda else None
            self._turn = (self._turn + 1) % len(self._blocks)

    def _copying(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

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
        loaded.release(mark() if self._cuda else None)
