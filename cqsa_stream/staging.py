"""From the ring of host buffers to where the kernel reads: an alias, an upcast, or a copy to the device.

On the CPU, tiles of the kernel's own dtype are read where the prefetcher put them and others are upcast into one reused
buffer. On CUDA, two buffers take turns, filled on a copy stream while the compute stream works on the other; what is to
be upcast is copied as it is and upcast there. Nothing here waits for the device: events order the streams both ways.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from cqsa_stream.prefetch import Loaded
from cqsa_stream.schedulers.memory import Layout

__all__ = ["Stage"]


class Stage:
    """Brings blocks of keys and values, and queries, to the device in the kernel's dtype."""

    def __init__(
        self, device: torch.device, stored: torch.dtype, compute: torch.dtype, layout: Layout, widths: dict[str, int]
    ) -> None:
        self._cuda = device.type == "cuda"
        self._aliases = not self._cuda and stored == compute
        self._held: list[Loaded] = []
        self._turn = 0
        turns = 0 if self._aliases else 2 if self._cuda else 1
        self._buffers = [
            {
                name: torch.empty(layout.block_tokens * width, dtype=compute, device=device)
                for name, width in widths.items()
            }
            for _ in range(turns)
        ]
        size = layout.slot_bytes // stored.itemsize if self._cuda and stored != compute else 0
        self._narrow = {name: torch.empty(size, dtype=stored, device=device) for name in ("block", "queries")}
        self._stream = _new_stream(device) if self._cuda else None
        self._free: list[torch.cuda.Event | None] = [None] * turns

    def block(self, key: Loaded, value: Loaded) -> tuple[Tensor, Tensor]:
        """Return keys and values on the device; they stay there until ``done``."""
        if self._aliases:
            self._held = [key, value]
            return key.values, value.values
        with self._copying():
            if self._stream is not None and (free := self._free[self._turn]) is not None:
                self._stream.wait_event(free)
            staged = [self._copy(key, "key"), self._copy(value, "value")]
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        return staged[0], staged[1]

    def done(self) -> None:
        """Say that the last kernel which reads the block has been issued."""
        for loaded in self._held:
            loaded.release()
        self._held = []
        if self._buffers:
            self._free[self._turn] = _mark() if self._cuda else None
            self._turn = (self._turn + 1) % len(self._buffers)

    def queries(self, loaded: Loaded, target: Tensor) -> None:
        """Copy query rows to their place on the device, in the order of the compute stream."""
        self._upload(loaded, target, "queries")

    def _copying(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _copy(self, loaded: Loaded, name: str) -> Tensor:
        target = self._buffers[self._turn][name][: loaded.values.numel()].view(loaded.values.shape)
        self._upload(loaded, target, "block")
        return target

    def _upload(self, loaded: Loaded, target: Tensor, kind: str) -> None:
        """Copy to the device and to the target's dtype, in the order of the current stream."""
        if self._narrow[kind].numel():
            narrow = self._narrow[kind][: loaded.values.numel()].view(loaded.values.shape)
            narrow.copy_(loaded.values, non_blocking=True)
            target.copy_(narrow)
        else:
            target.copy_(loaded.values, non_blocking=True)
        loaded.release(_mark() if self._cuda else None)


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
