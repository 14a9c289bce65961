"""A toy operation with two sums at once: of the keys' values by rows, and of the queries by columns.

Row chunk a sums up ``v_k`` over the keys that its queries see; column chunk b sums up ``q_q`` over the queries that see
its keys. Whole numbers in float64 sum up exactly, in any order.
"""

from typing import Any

import torch

from cqsa_stream.engine.operation import Fields, Side
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.operands import STREAMS, Field, Sum

__all__ = ["TwoSums", "expected"]


class TwoSums:
    """Two sums, one along each axis, as the backward pass has; it reads query, key and value only."""

    compute_dtype = torch.float64
    row_factor = 1.0
    readers: tuple[Any, ...] = ()
    streams = STREAMS

    def __init__(self, problem: Problem) -> None:
        self._mask = problem.visible
        sizes = "float64", 8, "float64", 8, 0.0
        self.sums = (
            Sum("rows", (Field("values", problem.group, problem.value_dim, *sizes),)),
            Sum("columns", (Field("queries", 1, problem.head_dim, *sizes), Field("count", 1, 0, *sizes))),
        )

    def add(self, lane: int, rows: Side, columns: Side) -> None:
        (query,), (_, value), (by_rows,), (by_columns,) = rows.streams, columns.streams, rows.sums, columns.sums
        seen = torch.zeros(len(rows.tokens), len(columns.tokens), dtype=torch.float64)
        for band in self._mask.restricted(rows.tokens, columns.tokens):
            for q in band.rows:
                keys = [k for k in band.columns if band.cut(range(q, q + 1), range(k, k + 1))]
                seen[q - rows.tokens.start, [k - columns.tokens.start for k in keys]] = 1.0
        if by_rows is not None:
            by_rows[0].add_(seen @ value)
        if by_columns is not None:
            by_columns[0].add_((seen.T @ query).sum(0, keepdim=True))
            by_columns[1].add_(seen.sum(0) * len(query))

    def leave(self, number: int, lane: int, fields: Fields) -> None:
        """Nothing is done to complete chunks."""

    def merge(self, number: int, into: Fields, other: Fields) -> None:
        for target, source in zip(into, other, strict=True):
            target.add_(source)


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sums: ``[batch, heads, rows, dv]``; ``[batch, kv_heads, keys, d]`` and ``[batch, kv_heads, keys]``."""
    group = q.shape[1] // k.shape[1]
    seen = seen.double()
    by_rows = seen @ v.double().repeat_interleave(group, 1)
    grouped = q.double().reshape(q.shape[0], k.shape[1], group, *q.shape[2:]).sum(2)
    return by_rows, seen.T @ grouped, (seen.sum(0) * group).expand(*k.shape[:2], -1)
