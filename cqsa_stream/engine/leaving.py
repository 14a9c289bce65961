"""Complete rows on their way from a CUDA device to disk: rounded to the output's dtype, and copied to page-locked
memory on a stream of their own.

A row's place on the device is free for the next as soon as it is rounded; the stream that computes waits for that
moment, this process does not. On the CPU rows leave from where they are, and there is no outbox.
"""

from collections import deque

import torch
from torch import Tensor

from cqsa_stream.engine.arena import PageLock, in_pages, pages
from cqsa_stream.kernels.fold import Partial
from cqsa_stream.machine.streams import mark, new_stream

__all__ = ["Outbox"]


class Outbox:
    """Places in page-locked memory for rows that leave; a context manager."""

    def __init__(self, device: torch.device, places: int, numbers: int, rows: int, dtype: torch.dtype) -> None:
        """Make places for ``rows`` rows of ``numbers`` numbers of the output's dtype in all, and their lse, float32."""
        size = in_pages(numbers * dtype.itemsize) + in_pages(4 * rows)
        memory = pages(places * size).view(places, size)
        self._host = [_parts(place, numbers, dtype) for place in memory]
        self._rounded = _parts(torch.empty(size, dtype=torch.uint8, device=device), numbers, dtype)
        self._device, self._stream = device, new_stream(device)
        self._free = deque(range(places))
        self._lock = PageLock(memory, device)

    def __enter__(self) -> "Outbox":
        self._lock.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.__exit__(*error)

    @property
    def full(self) -> bool:
        return not self._free

    def take(self, partial: Partial) -> tuple[int, Partial, torch.cuda.Event, torch.cuda.Event]:
        """Begin to copy a row as the current stream leaves it.

        Return its place, the copy, when its place on the device is free, and when the copy is whole.
        """
        place = self._free.popleft()
        self._lock.wait(place)
        host, rounded = (
            Partial(_like(it[0], partial.out), _like(it[1], partial.lse)) for it in (self._host[place], self._rounded)
        )
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            rounded.out.copy_(partial.out)
            rounded.lse.copy_(partial.lse)
            left = mark()
            host.out.copy_(rounded.out, non_blocking=True)
            host.lse.copy_(rounded.lse, non_blocking=True)
            copied = mark()
        return place, host, left, copied

    def free(self, place: int) -> None:
        """Say that a place's row is written."""
        self._free.append(place)


def _parts(place: Tensor, numbers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the output's numbers and the lse of a place."""
    out_bytes = in_pages(numbers * dtype.itemsize)
    return place[:out_bytes].view(dtype), place[out_bytes:].view(torch.float32)


def _like(memory: Tensor, values: Tensor) -> Tensor:
    return memory[: values.numel()].view(values.shape)
