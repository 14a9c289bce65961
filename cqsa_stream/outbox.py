"""Complete rows on their way from a CUDA device to disk: rounded to the output's dtype, and copied to page-locked
memory on a stream of their own.

A row's place on the device is free for the next as soon as it is rounded; the stream that computes waits for that
moment, this process does not. On the CPU rows leave from where they are, and there is no outbox.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cqsa_stream.partial import Partial
from cqsa_stream.pinned import PageLock, in_pages, pages
from cqsa_stream.streams import mark, new_stream

__all__ = ["Outbox"]


class Outbox:
    """Places in page-locked memory for rows that leave; a context manager."""

    def __init__(self, device: torch.device, places: int, numbers: int, rows: int, dtype: torch.dtype) -> None:
        """Make places for ``rows`` rows of ``numbers`` numbers of the output's dtype in all, and their lse, float32."""
        out_bytes, lse_bytes = in_pages(numbers * dtype.itemsize), in_pages(4 * rows)
        self._memory = pages(places * (out_bytes + lse_bytes)).view(places, out_bytes + lse_bytes)
        self._out, self._lse = self._memory[:, :out_bytes].view(dtype), self._memory[:, out_bytes:].view(torch.float32)
        self._device = device
        self._rounded = torch.empty(numbers, dtype=dtype, device=device)
        self._rounded_lse = torch.empty(rows, dtype=torch.float32, device=device)
        self._stream = new_stream(device)
        self._free = deque(range(places))
        self._locks = PageLock(device)
        self._locker = ThreadPoolExecutor(1, "cqsa-lock")  # long before the first row is complete
        self._ready = [self._locker.submit(self._lock, place) for place in range(places)]

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(self, *error: object) -> None:
        self._locker.shutdown(cancel_futures=True)
        self._locks.__exit__(*error)

    @property
    def full(self) -> bool:
        return not self._free

    def take(self, partial: Partial) -> tuple[int, Partial, torch.cuda.Event, torch.cuda.Event]:
        """Begin to copy a row as the current stream leaves it.

        Return its place, the copy, when its place on the device is free, and when the copy is whole.
        """
        place = self._free.popleft()
        self._ready[place].result()
        host = Partial(_like(self._out[place], partial.out), _like(self._lse[place], partial.lse), partial.cover)
        rounded, lse = _like(self._rounded, partial.out), _like(self._rounded_lse, partial.lse)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            rounded.copy_(partial.out)
            lse.copy_(partial.lse)
            left = mark()
            host.out.copy_(rounded, non_blocking=True)
            host.lse.copy_(lse, non_blocking=True)
            copied = mark()
        return place, host, left, copied

    def free(self, place: int) -> None:
        """Say that a place's row is written."""
        self._free.append(place)

    def _lock(self, place: int) -> None:
        memory = self._memory[place]
        memory.fill_(0)  # pages that are there are locked in a tenth of the time, in which no kernel can be launched
        self._locks.lock(memory)


def _like(memory: Tensor, values: Tensor) -> Tensor:
    return memory[: values.numel()].view(values.shape)
