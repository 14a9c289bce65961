"""Attention, forward: each row chunk sums up (lse, out) over the column chunks that it sees.

A sink is a key of a given score and no value that every row sees. It joins when a row is complete and leaves, never
before: a stored partial does not know of it, so whoever completes the row counts it once.
"""

from dataclasses import replace

import torch

from cqsa_stream.engine.calls import Calls
from cqsa_stream.engine.operation import Fields, Side
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.kernels.choose import fold_for
from cqsa_stream.kernels.contract import Fold, Kernel, Scores
from cqsa_stream.machine.device import Device
from cqsa_stream.operations.sums import forward_sums
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.masks.calls import Tile, calls
from cqsa_stream.schedulers.operands import STREAMS

__all__ = ["Forward"]


class Forward:
    """Attention of a problem by one kernel, cut into calls of at most a tile."""

    streams = STREAMS

    def __init__(
        self, problem: Problem, tile: Tile, kernel: Kernel, fold: Fold, device: Device, timeline: Timeline
    ) -> None:
        self._problem, scale = problem, problem.scale
        # kernels mask before they scale: only a positive scale keeps -inf
        self.row_factor, scale = (1.0, scale) if scale > 0 else (-1.0, -scale) if scale < 0 else (0.0, 1.0)
        self.compute_dtype = kernel.abilities.compute_dtype(getattr(torch, problem.dtype))
        self.sums = forward_sums(problem)
        self._mask, self._tile = problem.visible, tile
        self._first = problem.q_start + problem.first_query
        slopes, sinks = (
            None if of_heads is None else torch.tensor(of_heads, dtype=torch.float64, device=device.torch)
            for of_heads in (problem.terms.alibi_slopes, problem.terms.sinks)
        )
        self._scores, self._sinks = Scores(scale, problem.terms.soft_cap, slopes), sinks
        self._calls = Calls(kernel, fold, device, timeline)
        self.readers = self._calls.streams

    def add(self, lane: int, rows: Side, columns: Side) -> None:
        (queries,), (key, value), (held,) = rows.streams, columns.streams, rows.sums
        assert held is not None
        lse, out = held
        scores = self._scores
        if scores.slopes is not None:
            scores = replace(scores, slopes=scores.slopes[self._heads(lane)])
        for call in calls(self._mask, rows.tokens, columns.tokens, self._tile):
            part = slice(call.rows.start - rows.tokens.start, call.rows.stop - rows.tokens.start)
            reach, first = call.reach, columns.tokens.start
            keys = slice(reach.start - first, reach.stop - first)
            ahead = reach.start - (self._first + call.rows.start)
            partial = out[:, part], lse[:, part]
            self._calls.attend(partial, queries[:, part], key[:, keys], value[:, keys], call, scores, ahead)

    def leave(self, number: int, lane: int, fields: Fields) -> None:
        if self._sinks is None:
            return
        lse, out = fields
        sinks = self._sinks[self._heads(lane)].to(lse.device).unsqueeze(1)
        share = torch.sigmoid(lse - sinks).to(out.dtype).unsqueeze(2)  # exp(lse) / (exp(lse) + exp(sink))
        out.mul_(share).masked_fill_(share == 0, 0.0)  # a value of no weight changes nothing, whatever it is
        torch.logaddexp(lse, sinks, out=lse)

    def _heads(self, lane: int) -> slice:
        heads = self._problem.lane_heads(lane)[1]
        return slice(heads.start, heads.stop)

    def merge(self, number: int, into: Fields, other: Fields) -> None:
        (lse, out), (other_lse, other_out) = into, other
        fold_for(lse.device)(out, lse, other_out, other_lse)
