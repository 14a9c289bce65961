"""The partials on the device: those of the task's rows, and as many more as the plan allows.

Among those that no row of the task needs, the partial goes whose next use is farthest (Belady's rule: the schedule is
known): to host memory, as far as the plan has places there, and from memory only by a durable commit. Copies between
the two go on in the order of the current stream, on which tiles are merged.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cqsa_stream.engine.arena import PageLock, in_pages, pages
from cqsa_stream.kernels.fold import Partial
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.model.memory import Layout
from cqsa_stream.storage.partials import PartialStore

__all__ = ["HeldRows"]

_LINE = 64


@dataclass
class _Resident:
    partial: Partial
    slot: int
    dirty: bool = False


class HeldRows:
    """Partials of one lane at a time; a context manager. ``store`` is None where they never leave memory."""

    def __init__(
        self,
        problem: Problem,
        grid: Grid,
        layout: Layout,
        device: torch.device,
        store: PartialStore | None,
    ) -> None:
        self._problem, self._grid, self._store, self._device = problem, grid, store, device
        rows = problem.group * grid.rows.chunk_tokens
        places = layout.resident_rows
        numbers = getattr(torch, problem.partial_dtype)
        out_bytes, size = _bytes(rows * problem.value_dim, rows, numbers)
        on_device = torch.empty(places, size, dtype=torch.uint8, device=device)
        self._out, self._lse = on_device[:, :out_bytes].view(numbers), on_device[:, out_bytes:].view(torch.float64)
        self._free = list(range(places))
        self._until: dict[int, torch.cuda.Event | None] = {}
        self._resident: dict[int, _Resident] = {}
        parked = pages(layout.parked_rows * in_pages(size)).view(layout.parked_rows, in_pages(size))
        self._host_out = parked[:, :out_bytes].view(numbers)
        self._host_lse = parked[:, out_bytes:size].view(torch.float64)
        self._host_free = list(range(layout.parked_rows))[::-1]  # the first is locked first
        self._lock = PageLock(parked, device)
        self._parked: dict[int, _Resident] = {}
        self.lane = -1

    def __enter__(self) -> "HeldRows":
        self._lock.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.__exit__(*error)

    def begin_lane(self, lane: int) -> None:
        """Start with no partial in memory; those of the lane before must be finished or committed."""
        assert not {**self._resident, **self._parked}, "partials of the lane before are still in memory"
        self.lane = lane

    def partial(self, row: int, keep: tuple[int, ...], next_use: Callable[[int], int]) -> Partial:
        """Return the row's partial, from memory, from the store, or the empty one; ``keep``: rows that must stay."""
        if row not in self._resident:
            if not self._free:
                self._evict(max((r for r in self._resident if r not in keep), key=next_use), next_use)
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

    def free(self, slot: int, until: torch.cuda.Event | None = None) -> None:
        """Say that a place can be used again, on CUDA once the event has happened: its stream waits for that."""
        self._until[slot] = until
        self._free.append(slot)

    def commit(self) -> int:
        """Store every partial that changed; return how many."""
        held = {**self._resident, **self._parked}
        changed = [row for row, resident in held.items() if resident.dirty]
        for row in changed:
            self._commit(row, held[row])
        return len(changed)

    def end_lane(self) -> None:
        """Commit what is not finished and forget it."""
        self.commit()
        for resident in self._resident.values():
            self.free(resident.slot)
        for parked in self._parked.values():
            self._host_free.append(parked.slot)
        self._resident, self._parked = {}, {}

    def _evict(self, row: int, next_use: Callable[[int], int]) -> None:
        """Take a partial off the device: park it, or store whichever is used again last of it and those parked."""
        leaving = self._resident.pop(row)
        if not self._host_free:
            out = max((row, *self._parked), key=next_use)
            stored = leaving if out == row else self._parked.pop(out)
            if stored.dirty:
                self._commit(out, stored)
            if out != row:
                self._host_free.append(stored.slot)
        if self._host_free:
            slot = self._host_free.pop()
            self._lock.wait(slot)
            partial = self._place(row, self._host_out[slot], self._host_lse[slot])
            _move(leaving.partial, partial)
            self._parked[row] = _Resident(partial, slot, leaving.dirty)
        self.free(leaving.slot)

    def _commit(self, row: int, resident: _Resident) -> None:
        if self._store is None:
            raise AssertionError("a plan without a run directory never lets a partial go")
        partial = resident.partial
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # it may be on its way to where it is parked
        self._store.commit(self.lane, row, partial.cover, partial.lse.cpu().numpy(), partial.out.cpu().numpy())
        resident.dirty = False

    def _place(self, row: int, out: Tensor, lse: Tensor) -> Partial:
        """Return a row's part of a place for partials, with an empty cover."""
        shape = (self._problem.group, len(self._grid.rows.span(row)))
        count = shape[0] * shape[1]
        dim = self._problem.value_dim
        return Partial(out[: count * dim].view(*shape, dim), lse[:count].view(shape))

    def _load(self, row: int, slot: int) -> _Resident:
        partial = self._place(row, self._out[slot], self._lse[slot])
        if (until := self._until.pop(slot, None)) is not None:
            torch.cuda.current_stream(self._device).wait_event(until)
        if (parked := self._parked.pop(row, None)) is not None:
            _move(parked.partial, partial)
            self._host_free.append(parked.slot)
            return _Resident(partial, slot, parked.dirty)
        if self._store is not None:
            host_lse, host_out = (
                t if t.device.type == "cpu" else torch.empty_like(t, device="cpu") for t in (partial.lse, partial.out)
            )
            partial.cover = self._store.load_into(self.lane, row, _array(host_lse), _array(host_out))
            if partial.cover and host_out is not partial.out:
                partial.lse.copy_(host_lse)
                partial.out.copy_(host_out)
        if not partial.cover:
            partial.lse.fill_(-torch.inf)
            partial.out.zero_()
        return _Resident(partial, slot)


def _bytes(numbers: int, rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of a place's numbers, and of the place with its lse, in whole lines of a processor's cache."""
    out_bytes = -(-numbers * dtype.itemsize // _LINE) * _LINE
    return out_bytes, out_bytes + -(-8 * rows // _LINE) * _LINE


def _move(partial: Partial, to: Partial) -> None:
    to.out.copy_(partial.out, non_blocking=True)
    to.lse.copy_(partial.lse, non_blocking=True)
    to.cover = partial.cover


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return array
