"""The row chunks on the device: the queries of the task's rows, and as many rows' partials as the plan allows.

A partial leaves only by a durable commit; among those that no row of the task needs, the one goes whose next use is
farthest (Belady's rule: the schedule is known).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cqsa_stream.partial import Partial
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.memory import Layout
from cqsa_stream.storage.partials import PartialStore

__all__ = ["HeldRows"]


@dataclass
class _Resident:
    partial: Partial
    slot: int
    dirty: bool = False


class HeldRows:
    """Queries and partials of one lane at a time. ``store`` is None where partials never leave memory."""

    def __init__(
        self,
        problem: Problem,
        grid: Grid,
        layout: Layout,
        device: torch.device,
        dtype: torch.dtype,
        store: PartialStore | None,
    ) -> None:
        self._problem, self._grid, self._store, self._device = problem, grid, store, device
        rows = problem.group * grid.rows.chunk_tokens
        filled = min(layout.resident_rows, -(-grid.rows.tokens // grid.rows.chunk_tokens))
        held = min(layout.rows_per_task, filled)
        self._queries = torch.empty(held, rows * problem.head_dim, dtype=dtype, device=device)
        self._out = torch.empty(filled, rows * problem.value_dim, dtype=torch.float32, device=device)
        self._lse = torch.empty(filled, rows, dtype=torch.float64, device=device)
        self._free = list(range(filled))
        self._resident: dict[int, _Resident] = {}
        self.lane = -1

    def begin_lane(self, lane: int) -> None:
        """Start with no partial in memory; those of the lane before must be finished or committed."""
        assert not self._resident, "partials of the lane before are still in memory"
        self.lane = lane

    def queries(self, place: int, row: int) -> Tensor:
        """Return the buffer ``[heads, rows, head_dim]`` for the queries of the task's row number ``place``."""
        count = len(self._grid.rows.span(row))
        shape = (self._problem.group, count, self._problem.head_dim)
        return self._queries[place][: shape[0] * count * shape[2]].view(shape)

    def partial(self, row: int, keep: tuple[int, ...], next_use: Callable[[int], int]) -> Partial:
        """Return the row's partial, from memory, from the store, or the empty one; ``keep``: rows that must stay."""
        if row not in self._resident:
            if not self._free:
                self._evict(max((r for r in self._resident if r not in keep), key=next_use))
            self._resident[row] = self._load(row, self._free.pop())
        return self._resident[row].partial

    def add(self, row: int, column: int) -> int:
        """Note that a column chunk is merged into the row; return the row's cover."""
        resident = self._resident[row]
        assert not resident.partial.cover >> column & 1, f"pair ({row}, {column}) computed twice"
        resident.partial.cover |= 1 << column
        resident.dirty = True
        return resident.partial.cover

    @property
    def full(self) -> bool:
        """Whether taking another row's partial means letting one go."""
        return not self._free

    def retire(self, row: int) -> tuple[Partial, int]:
        """Take a complete row out; its place is free for another when ``free`` says so."""
        resident = self._resident.pop(row)
        return resident.partial, resident.slot

    def free(self, slot: int) -> None:
        self._free.append(slot)

    def commit(self) -> int:
        """Store every partial that changed; return how many."""
        changed = [row for row, resident in self._resident.items() if resident.dirty]
        for row in changed:
            self._commit(row)
        return len(changed)

    def end_lane(self) -> None:
        """Commit what is not finished and forget it."""
        for row in list(self._resident):
            self._evict(row)

    def _evict(self, row: int) -> None:
        if self._resident[row].dirty:
            self._commit(row)
        self.free(self._resident.pop(row).slot)

    def _commit(self, row: int) -> None:
        resident = self._resident[row]
        if self._store is None:
            raise AssertionError("a plan without a run directory never lets a partial go")
        partial = resident.partial
        self._store.commit(self.lane, row, partial.cover, partial.lse.cpu().numpy(), partial.out.cpu().numpy())
        resident.dirty = False

    def _load(self, row: int, slot: int) -> _Resident:
        count = self._problem.group * len(self._grid.rows.span(row))
        shape = (self._problem.group, len(self._grid.rows.span(row)))
        lse = self._lse[slot][:count].view(shape)
        out = self._out[slot][: count * self._problem.value_dim].view(*shape, self._problem.value_dim)
        cover = 0
        if self._store is not None:
            host_lse, host_out = (
                t if t.device.type == "cpu" else torch.empty_like(t, device="cpu") for t in (lse, out)
            )
            cover = self._store.load_into(self.lane, row, _array(host_lse), _array(host_out))
            if cover and host_out is not out:
                lse.copy_(host_lse)
                out.copy_(host_out)
        if not cover:
            lse.fill_(-torch.inf)
            out.zero_()
        return _Resident(Partial(out, lse, cover), slot)


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return array
