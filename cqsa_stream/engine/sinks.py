"""Where finished rows go: a tensor in memory, or durable Zarr arrays."""

import errno
import threading
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import tensorstore as ts
import torch
from crc32c import crc32c
from torch import Tensor

from cqsa_stream.problem import Problem, dtype_bytes
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.output import chunk_is_whole, read, write_chunk
from cqsa_stream.storage.readers.memory import MemoryArray

__all__ = ["MemorySink", "Sink", "ZarrSink"]


class Sink(Protocol):
    """Takes each finished row chunk once, whole."""

    bytes_written: int

    def write(self, lane: int, row: int, out: Tensor, lse: Tensor) -> int:
        """Keep ``out [heads, rows, dv]`` and ``lse [heads, rows]``; return the CRC-32C of what was written."""


class MemorySink:
    """Collects the output and lse in tensors of the caller's."""

    def __init__(self, problem: Problem, rows: Axis, *, with_lse: bool) -> None:
        self._problem, self._rows = problem, rows
        self.out = torch.empty(problem.out_shape, dtype=getattr(torch, problem.out_dtype))
        self.lse = torch.empty(problem.out_shape[:3], dtype=torch.float32) if with_lse else None
        self.bytes_written = 0

    def write(self, lane: int, row: int, out: Tensor, lse: Tensor) -> int:
        batch, heads, _ = self._problem.lane_heads(lane)
        rows = self._rows.span(row)
        where = (batch, slice(heads.start, heads.stop), slice(rows.start, rows.stop))
        self.out[where].copy_(out)
        if self.lse is not None:
            self.lse[where].copy_(lse)
        return 0


class ZarrSink:
    """Writes both to disk; on return they survive a crash."""

    def __init__(self, problem: Problem, out: ts.TensorStore, lse: ts.TensorStore, rows: Axis, out_tokens: int) -> None:
        self._problem, self._rows = problem, rows
        self._out, self._lse, self._out_tokens = out, lse, out_tokens
        self._dtype = getattr(torch, problem.out_dtype)
        self.bytes_written = 0
        self._counting = threading.Lock()  # several rows may be written at a time

    def write(self, lane: int, row: int, out: Tensor, lse: Tensor) -> int:
        checksum, start = 0, self._rows.span(row).start
        batch, heads, _ = self._problem.lane_heads(lane)
        for head, span in self._pieces(lane, row):
            piece = out[head - heads.start, span.start - start : span.stop - start].to(self._dtype).cpu()
            values = MemoryArray.of_tensor(piece).values
            checksum = self._put(self._out, (batch, head, span.start // self._out_tokens, 0), values, checksum)
        numbers = lse.float().cpu().numpy()
        for head in heads:
            checksum = self._put(self._lse, (batch, head, row), numbers[head - heads.start], checksum)
        return checksum

    def holds(self, lane: int, row: int, checksum: int) -> bool:
        """Return whether what is stored of a row is what ``write`` returned this checksum for."""
        batch, _, _ = self._problem.lane_heads(lane)
        found = 0
        try:
            for head, span in self._pieces(lane, row):
                found = _checksum(read(self._out[batch, head, span.start : span.stop]), found)
            return _checksum(read(self._lse[self._lse_place(lane, row)]), found) == checksum
        except ArrayError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno != errno.ENOENT:
                raise cause from error  # it cannot be read now: that says nothing of what is there
            return False

    def is_there(self, lane: int, row: int) -> bool:
        """Return whether every stored chunk of a row is there, and as long as it should be. Raises OSError."""
        batch, heads, _ = self._problem.lane_heads(lane)
        pieces = ((batch, head, span.start // self._out_tokens, 0) for head, span in self._pieces(lane, row))
        return all(chunk_is_whole(self._out, cell) for cell in pieces) and all(
            chunk_is_whole(self._lse, (batch, head, row)) for head in heads
        )

    def row_bytes(self, row: int) -> int:
        """Return the size of what is written of a row."""
        numbers = self._problem.group * len(self._rows.span(row))
        return numbers * (self._problem.value_dim * dtype_bytes(self._problem.out_dtype) + 4)

    def _pieces(self, lane: int, row: int) -> Iterator[tuple[int, range]]:
        """Yield (head, query rows) of each stored chunk of a row chunk's output."""
        span = self._rows.span(row)
        for head in self._problem.lane_heads(lane)[1]:
            for start in range(span.start, span.stop, self._out_tokens):
                yield head, range(start, min(start + self._out_tokens, span.stop))

    def _lse_place(self, lane: int, row: int) -> tuple[int, slice, slice]:
        batch, heads, _ = self._problem.lane_heads(lane)
        span = self._rows.span(row)
        return batch, slice(heads.start, heads.stop), slice(span.start, span.stop)

    def _put(self, array: ts.TensorStore, cell: tuple[int, ...], values: np.ndarray, checksum: int) -> int:
        write_chunk(array, cell, values)
        with self._counting:
            self.bytes_written += values.nbytes
        return _checksum(values, checksum)


def _checksum(values: np.ndarray, before: int) -> int:
    return crc32c(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, before)
