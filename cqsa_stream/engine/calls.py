"""Kernel calls, and the merging of the tiles they give.

On CUDA two streams take turns at calls of the vendor's kernels: the last thread blocks of one leave multiprocessors
idle, which the first ones of the next fill. The tiles are merged on the current stream, one after another, so the order
of the arithmetic does not depend on which call ends first. Elsewhere a call is merged before the next begins.
"""

import torch
from torch import Tensor

from cqsa_stream.kernels.choose import Fold, Kernel
from cqsa_stream.kernels.fold import Partial
from cqsa_stream.machine.streams import mark, new_stream, waited_for
from cqsa_stream.machine.tracing import span
from cqsa_stream.schedulers.masks.bands import Call

__all__ = ["Calls"]


class Calls:
    """Attends with one kernel on one device. ``streams``: those on which it reads what it is given; none on the CPU."""

    def __init__(self, kernel: Kernel, fold: Fold, scale: float, device: torch.device) -> None:
        self._kernel, self._fold, self._scale = kernel, fold, scale
        self.streams: tuple[torch.cuda.Stream, ...] = ()
        if device.type == "cuda":
            alone = kernel.at_a_time == 1
            own = [new_stream(device) for _ in range(0 if alone else kernel.at_a_time)]
            self.streams = tuple(own) or (torch.cuda.current_stream(device),)
        self._merged: list[torch.cuda.Event | None] = [None] * len(self.streams)
        self._turn = 0

    def attend(self, partial: Partial, queries: Tensor, key: Tensor, value: Tensor, call: Call) -> None:
        """Merge ``queries`` over ``key`` and ``value`` into the partial of the same rows."""
        if len(self.streams) < 2:
            self._fold(partial.out, partial.lse, *self._tile(queries, key, value, call))
            return
        turn, stream = self._turn, self.streams[self._turn]
        if (merged := self._merged[turn]) is not None:
            stream.wait_event(merged)  # the memory of this stream's last tile is free again
        with torch.cuda.stream(stream), span("attend"):
            tile = self._tile(queries, key, value, call)
        waited_for(stream)
        with span("merge"):
            self._fold(partial.out, partial.lse, *tile)
        self._merged[turn] = mark()
        self._turn = (turn + 1) % len(self.streams)

    def _tile(self, queries: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Run the kernel; several tiles along the diagonal go in as so many heads, and come back as rows."""
        if call.tiles == 1:
            return self._kernel.attend(queries, key, value, call.mask, self._scale)
        heads, rows, n = *queries.shape[:2], call.tiles
        query, key, value = (
            x.reshape(x.shape[0], n, -1, x.shape[2]).transpose(0, 1).flatten(0, 1) for x in (queries, key, value)
        )
        out, lse = self._kernel.attend(query, key, value, call.mask, self._scale)
        out = out.reshape(n, heads, rows // n, -1).transpose(0, 1).reshape(heads, rows, -1)
        return out, lse.reshape(n, heads, rows // n).transpose(0, 1).reshape(heads, rows)
