"""Complete rows on their way from a CUDA device to disk: copied to page-locked memory on a stream of their own.

A row's place on the device is free for the next as soon as the copy is done; the stream that computes waits for that
moment, this process does not. On the CPU rows leave from where they are, and there is no outbox.
"""

from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor

from cqsa_stream.partial import Partial
from cqsa_stream.pinned import page_locked, pages

__all__ = ["Outbox"]


class Outbox:
    """Places in page-locked memory for rows that leave; a context manager."""

    def __init__(self, device: torch.device, places: int, numbers: int, rows: int, dtype: torch.dtype) -> None:
        """Make places for ``rows`` rows of ``numbers`` numbers in all, and their lse in float64."""
        out_bytes, lse_bytes = numbers * dtype.itemsize, 8 * rows
        self._device = device
        self._memory = pages(places * (out_bytes + lse_bytes))
        outs, lses = self._memory[: places * out_bytes], self._memory[places * out_bytes :]
        self._out, self._lse = outs.view(dtype).view(places, -1), lses.view(torch.float64).view(places, -1)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free = list(range(places))
        self._locked = ExitStack()

    def __enter__(self) -> "Outbox":
        self._locked.enter_context(page_locked(self._memory, self._device))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._locked.close()

    @property
    def full(self) -> bool:
        return not self._free

    def take(self, partial: Partial) -> tuple[int, Partial, torch.cuda.Event]:
        """Begin to copy a row as the current stream leaves it; return its place, the copy, and when that is whole."""
        place = self._free.pop()
        host = Partial(_like(self._out[place], partial.out), _like(self._lse[place], partial.lse), partial.cover)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.out.copy_(partial.out, non_blocking=True)
            host.lse.copy_(partial.lse, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return place, host, copied

    def free(self, place: int) -> None:
        """Say that a place's row is written."""
        self._free.append(place)


def _like(memory: Tensor, values: Tensor) -> Tensor:
    return memory[: values.numel()].view(values.shape)
