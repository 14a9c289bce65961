"""Kernel calls, and the merging of the tiles they give.

A kernel that merges does all of it in one launch, one after another on the current stream. Of other vendor kernels two
streams take turns on CUDA: the last thread blocks of one call leave multiprocessors idle, which the first ones of the
next fill. Their tiles are merged on the current stream, one after another, so the order of the arithmetic does not
depend on which call ends first.
"""

from typing import cast

from torch import Tensor

from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.kernels.contract import Fold, Kernel, Merging, Partial, Scores
from cqsa_stream.machine.device import DONE, Device, Event
from cqsa_stream.schedulers.masks.calls import Call, Packed

__all__ = ["Calls"]


class Calls:
    """Attends with one kernel on one device. ``streams``: those on which it reads what it is given."""

    def __init__(self, kernel: Kernel, fold: Fold, device: Device, timeline: Timeline) -> None:
        self._kernel, self._fold, self._device, self._timeline = kernel, fold, device, timeline
        count = kernel.abilities.calls_at_a_time
        alone = (device.current_stream(),)
        self.streams = alone if count == 1 else tuple(device.new_stream() for _ in range(count))
        self._merged: list[Event] = [DONE] * count
        self._turn = 0

    def attend(
        self,
        partial: Partial,
        queries: Tensor,
        key: Tensor,
        value: Tensor,
        call: Call | Packed,
        scores: Scores,
        ahead: int = 0,
    ) -> None:
        """Merge ``queries`` over ``key`` and ``value``, those of the call's reach, into the partial of their rows.

        ``ahead``: by how much the first key stands after the first query.
        """
        if self._kernel.abilities.merging(key.shape[2], value.shape[2]):
            with self._timeline.on_device("kernel"):
                cast("Merging", self._kernel).merge(partial, queries, key, value, call, scores, ahead)
            return
        turn, stream = self._turn, self.streams[self._turn]
        stream.wait_event(self._merged[turn])  # the memory of this stream's last tile is free again
        with self._device.on(stream), self._timeline.on_device("kernel"):
            if isinstance(call, Packed):
                tile = self._kernel.attend_packed(queries, key, value, call.here, scores, ahead)
            else:
                tile = self._tile(queries, key, value, call, scores, ahead)
        self._device.current_stream().wait_stream(stream)
        self._fold(*partial, *tile)
        self._merged[turn] = self._device.mark()
        self._turn = (turn + 1) % len(self.streams)

    def _tile(
        self, queries: Tensor, key: Tensor, value: Tensor, call: Call, scores: Scores, ahead: int
    ) -> tuple[Tensor, Tensor]:
        """Run the kernel; several tiles go in as so many heads, and come back as rows.

        Keys and values of one K/V head are not copied for it: they are views, which overlap where tiles share keys. So
        what a kernel would pad is padded before.
        """
        if call.tiles == 1:
            return self._kernel.attend(queries, key, value, call.left, call.right, scores, ahead)
        heads, rows, n, value_dim = *queries.shape[:2], call.tiles, value.shape[2]
        queries, key, value = self._kernel.abilities.padded(queries, key, value)
        query = queries.reshape(heads, n, rows // n, -1).transpose(0, 1).flatten(0, 1)
        key, value = (x.unfold(1, len(call.columns), rows // n).permute(1, 0, 3, 2).flatten(0, 1) for x in (key, value))
        out, lse = self._kernel.attend(query, key, value, call.left, call.right, scores.of_tiles(n), ahead)
        out = out[:, :, :value_dim].reshape(n, heads, rows // n, -1).transpose(0, 1).reshape(heads, rows, -1)
        return out, lse.reshape(n, heads, rows // n).transpose(0, 1).reshape(heads, rows)
