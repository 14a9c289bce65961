"""Where finished chunks of sums go: tensors in memory, or durable Zarr arrays, one for each field of a sum."""

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import tensorstore as ts
import torch
from crc32c import crc32c

from cqsa_stream.engine.operation import Fields
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.output import chunk_is_whole, read, write_chunk
from cqsa_stream.storage.readers.memory import MemoryArray
from cqsa_stream.storage.readers.ranges import in_parallel

__all__ = ["LaneHeads", "MemorySink", "Sink", "Stored", "ZarrSink"]

LaneHeads = Callable[[int, int], tuple[int, range]]
"""The batch and the heads of a sum in a lane."""


class Sink(Protocol):
    """Takes each finished chunk once, whole."""

    bytes_written: int

    def write(self, sum_: int, lane: int, chunk: int, fields: Fields) -> int:
        """Keep the fields ``[heads, tokens, ...]`` of a chunk; return the CRC-32C of what was written."""


class MemorySink:
    """Collects fields in tensors ``[batch, head, token, ...]``; a field that nobody wants has none."""

    bytes_written = 0

    def __init__(
        self, tensors: Sequence[Sequence[torch.Tensor | None]], axes: Sequence[Axis], heads: LaneHeads
    ) -> None:
        """``tensors[n]`` are those of sum n, whose axis is ``axes[n]``."""
        self.tensors, self._axes, self._heads = tensors, axes, heads

    def write(self, sum_: int, lane: int, chunk: int, fields: Fields) -> int:
        batch, heads = self._heads(sum_, lane)
        span = self._axes[sum_].span(chunk)
        for target, field in zip(self.tensors[sum_], fields, strict=True):
            if target is not None:
                target[batch, heads.start : heads.stop, span.start : span.stop].copy_(field)
        return 0


@dataclass(frozen=True)
class Stored:
    """The array of a field, its dtype, and the tokens of its stored chunks, which divide those of the sum's chunks."""

    array: ts.TensorStore
    dtype: torch.dtype
    tokens: int


class ZarrSink:
    """Writes fields to disk; on return they survive a crash."""

    def __init__(
        self,
        arrays: Sequence[Sequence[Stored]],
        axes: Sequence[Axis],
        heads: LaneHeads,
        at_a_time: int = 1,
        guard: Callable[[], object] | None = None,
    ) -> None:
        """``arrays[n]`` are those of sum n, whose axis is ``axes[n]``. ``at_a_time``: files of a chunk to write;
        ``guard`` is called before any of them is seen, and raises where it must not be.
        """
        self._arrays, self._axes, self._heads, self._at_a_time, self._guard = arrays, axes, heads, at_a_time, guard
        self.bytes_written = 0
        self._counting = threading.Lock()  # several chunks may be written at a time

    def write(self, sum_: int, lane: int, chunk: int, fields: Fields) -> int:
        checksum, start = 0, self._axes[sum_].span(chunk).start
        first = self._heads(sum_, lane)[1].start
        parts = [
            (stored, cell, field[head - first, span.start - start : span.stop - start])
            for stored, field in zip(self._arrays[sum_], fields, strict=True)
            for cell, head, span in self._cells(stored, sum_, lane, chunk)
        ]
        for done in range(0, len(parts), self._at_a_time):
            pieces = [
                (stored.array, cell, MemoryArray.of_tensor(part.to(stored.dtype).cpu()).values)
                for stored, cell, part in parts[done : done + self._at_a_time]
            ]
            in_parallel(lambda piece: write_chunk(*piece, self._guard), pieces, self._at_a_time)
            for _, _, values in pieces:
                checksum = _checksum(values, checksum)
                with self._counting:
                    self.bytes_written += values.nbytes
        return checksum

    def holds(self, sum_: int, lane: int, chunk: int, checksum: int) -> bool:
        """Return whether what is stored of a chunk is what ``write`` returned this checksum for."""
        batch, _ = self._heads(sum_, lane)
        found = 0
        try:
            for stored in self._arrays[sum_]:
                for _, head, span in self._cells(stored, sum_, lane, chunk):
                    found = _checksum(read(stored.array[batch, head, span.start : span.stop]), found)
        except ArrayError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno != errno.ENOENT:
                raise cause from error  # it cannot be read now: that says nothing of what is there
            return False
        return found == checksum

    def is_there(self, sum_: int, lane: int, chunk: int) -> bool:
        """Return whether every stored chunk is there, and as long as it should be. Raises OSError."""
        return all(
            chunk_is_whole(stored.array, cell)
            for stored in self._arrays[sum_]
            for cell, _, _ in self._cells(stored, sum_, lane, chunk)
        )

    def _cells(self, stored: Stored, sum_: int, lane: int, chunk: int) -> Iterator[tuple[tuple[int, ...], int, range]]:
        """Yield (place in the array's grid, head, tokens) of each stored chunk of a field."""
        (batch, heads), span = self._heads(sum_, lane), self._axes[sum_].span(chunk)
        rest = (0,) * (stored.array.rank - 3)
        for head in heads:
            for start in range(span.start, span.stop, stored.tokens):
                yield (
                    (batch, head, start // stored.tokens, *rest),
                    head,
                    range(start, min(start + stored.tokens, span.stop)),
                )


def _checksum(values: np.ndarray, before: int) -> int:
    return crc32c(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, before)
