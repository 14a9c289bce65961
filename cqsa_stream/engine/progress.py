"""How much of a run is done, by the covers of its rows: pairs, rows, tokens and floating-point operations."""

from collections.abc import Iterable, Mapping

from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.grid import Grid

__all__ = ["Progress"]


class Progress:
    """How much of a run is done, by the covers of its rows."""

    def __init__(self, problem: Problem, grid: Grid, covers: Iterable[Mapping[int, int | None]]) -> None:
        """``covers``: for each lane, by row chunk; None where the row is finished."""
        self._problem, self._grid = problem, grid
        self.pairs_total = grid.pairs * problem.lanes
        self.rows_total = grid.rows.filled * problem.lanes
        self.pairs_done = self.rows_done = self.tokens_done = self.flops_done = 0
        for lane in covers:
            for row, cover in lane.items():
                self._count(row, cover)

    def _count(self, row: int, cover: int | None) -> None:
        needed = self._grid.needed(row)
        if cover is None:
            self.row_finished(row)
        if cover is None or cover == needed.bits:
            self.pairs_done += len(needed)
            self.flops_done += self._flops(row, self._grid.columns.all)
            return
        for column in (column for column in needed if cover >> column & 1):
            self.pair_computed(row, column)

    def pair_computed(self, row: int, column: int) -> int:
        """Count a pair; return its floating-point operations."""
        flops = self._flops(row, self._grid.columns.span(column))
        self.pairs_done += 1
        self.flops_done += flops
        return flops

    def row_finished(self, row: int) -> None:
        self.rows_done += 1
        self.tokens_done += self._problem.group * len(self._grid.rows.span(row))

    def _flops(self, row: int, keys: range) -> int:
        """Return the floating-point operations of a row chunk against some keys, in one lane."""
        scores = self._grid.mask.scores(self._grid.rows.span(row), keys)
        return 2 * (self._problem.head_dim + self._problem.value_dim) * self._problem.group * scores
