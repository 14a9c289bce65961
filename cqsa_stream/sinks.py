"""Where finished rows go: a tensor in memory, or durable Zarr arrays."""

from typing import Protocol

import numpy as np
import tensorstore as ts
import torch
from crc32c import crc32c
from torch import Tensor

from cqsa_stream.problem import Problem
from cqsa_stream.storage.memory import MemoryArray
from cqsa_stream.storage.output import write

__all__ = ["MemorySink", "Sink", "ZarrSink"]


class Sink(Protocol):
    """Takes each finished row chunk once, whole."""

    bytes_written: int

    def write(self, lane: int, rows: range, out: Tensor, lse: Tensor) -> int:
        """Keep ``out [heads, rows, dv]`` and ``lse [heads, rows]``; return the CRC-32C of what was written."""


class MemorySink:
    """Collects the output and lse in tensors of the caller's."""

    def __init__(self, problem: Problem, *, with_lse: bool) -> None:
        self._problem = problem
        self.out = torch.empty(problem.out_shape, dtype=getattr(torch, problem.out_dtype))
        self.lse = torch.empty(problem.out_shape[:3], dtype=torch.float32) if with_lse else None
        self.bytes_written = 0

    def write(self, lane: int, rows: range, out: Tensor, lse: Tensor) -> int:
        batch, heads, _ = self._problem.lane_heads(lane)
        where = (batch, slice(heads.start, heads.stop), slice(rows.start, rows.stop))
        self.out[where].copy_(out)
        if self.lse is not None:
            self.lse[where].copy_(lse)
        return 0


class ZarrSink:
    """Writes both to disk; on return they survive a crash."""

    def __init__(self, problem: Problem, out: ts.TensorStore, lse: ts.TensorStore, out_tokens: int) -> None:
        self._problem = problem
        self._out, self._lse, self._out_tokens = out, lse, out_tokens
        self._dtype = getattr(torch, problem.out_dtype)
        self.bytes_written = 0

    def write(self, lane: int, rows: range, out: Tensor, lse: Tensor) -> int:
        batch, heads, _ = self._problem.lane_heads(lane)
        checksum = 0
        for index, head in enumerate(heads):
            for start in range(rows.start, rows.stop, self._out_tokens):
                stop = min(start + self._out_tokens, rows.stop)
                piece = out[index, start - rows.start : stop - rows.start].to(self._dtype).cpu()
                values = MemoryArray.of_tensor(piece).values
                checksum = self._put(self._out[batch, head, start:stop], values, checksum)
        values = lse.float().cpu().numpy()
        return self._put(self._lse[batch, heads.start : heads.stop, rows.start : rows.stop], values, checksum)

    def _put(self, target: ts.TensorStore, values: np.ndarray, checksum: int) -> int:
        write(target, values)
        self.bytes_written += values.nbytes
        return crc32c(values.reshape(-1).view(np.uint8).data, checksum)
