"""What stands in host memory: the blocks that a run will fetch, in order, and a fixed number of slots to hold them.

The order of all fetches is known before the run, so the slot whose content is needed again farthest in the future is
the one to fill (L. A. Belady, "A study of replacement algorithms", IBM Systems Journal 5, 1966). The planner runs the
same two parts dry that the prefetcher runs for real: what it counts is what will be read.
"""

from collections import deque
from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Literal, NamedTuple

from cqsa_stream.schedulers.model.memory import Layout
from cqsa_stream.schedulers.schedules import NEVER, Schedule, Task

__all__ = ["Fetch", "Residency", "fetches", "pieces"]

_FEW = 8  # slots that are looked through faster than kept in order


class Fetch(NamedTuple):
    """Some tokens of a lane, of the query rows or of the keys; ``next_use`` is larger the later they are used again."""

    array: Literal["query", "key", "value"]
    tokens: range
    next_use: int


def pieces(span: range, length: int) -> Iterator[range]:
    """Cut a range into pieces of a length; the last may be shorter."""
    return (range(start, min(start + length, span.stop)) for start in range(span.start, span.stop, length))


def fetches(schedule: Schedule, number: int, task: Task, layout: Layout) -> Iterator[Fetch]:
    """Yield what task ``number`` of a lane uses, in that order: its rows' queries, then keys and values by blocks."""
    rows, columns = schedule.grid.rows, schedule.grid.columns
    per_row, per_column = -(-rows.chunk_tokens // layout.query_tokens), -(-columns.chunk_tokens // layout.block_tokens)
    first_block = rows.chunks * per_row
    period = first_block + 2 * columns.chunks * per_column  # places in a task, those of all chunks
    for row in task.rows:
        later = schedule.next_row(row, number)
        for index, tokens in enumerate(pieces(rows.span(row), layout.query_tokens)):
            yield Fetch("query", tokens, later if later == NEVER else later * period + row * per_row + index)
    for column in task.columns:
        later = schedule.next_column(column, number)
        for index, tokens in enumerate(pieces(columns.span(column), layout.block_tokens)):
            place = later if later == NEVER else later * period + first_block + 2 * (column * per_column + index)
            yield Fetch("key", tokens, place)
            yield Fetch("value", tokens, place + 1)


class Residency:
    """Slots and their contents. The last ``window`` slots handed out are never refilled: they may still be read."""

    def __init__(self, slots: int, window: int) -> None:
        assert 0 <= window < slots, f"a window of {window} of {slots} slots leaves none to fill"
        self._empty = list(range(slots - 1, -1, -1))
        self._slot: dict[Hashable, int] = {}
        self._content: list[Hashable] = [None] * slots
        self._next_use = [0] * slots
        self._recent: deque[int] = deque(maxlen=window)
        self._heap: list[tuple[int, int]] = []  # (-next use, slot); entries that no longer hold stay in it

    def place(self, content: Hashable, next_use: int) -> tuple[int, bool]:
        """Return the slot for a content that is used now, and whether it stands there already."""
        slot = self._slot.get(content)
        present = slot is not None
        if slot is None:
            slot = self._empty.pop() if self._empty else self._farthest()
            self._slot.pop(self._content[slot], None)
            self._slot[content], self._content[slot] = slot, content
        self._next_use[slot] = next_use
        self._recent.append(slot)
        if len(self._content) > _FEW:
            heappush(self._heap, (-next_use, slot))
            if len(self._heap) > 4 * len(self._content):
                self._rebuild()
        return slot, present

    def forget(self) -> None:
        """Begin anew: nothing that stands in a slot will be used again."""
        self._slot.clear()
        self._next_use = [NEVER] * len(self._content)
        self._content = [None] * len(self._content)
        self._empty = []
        self._rebuild()

    def _farthest(self) -> int:
        """Return the slot whose content is used again last, of those that may be refilled."""
        if len(self._content) <= _FEW:
            others = (slot for slot in range(len(self._content)) if slot not in self._recent)
            return max(others, key=self._next_use.__getitem__)
        kept = []
        while True:
            entry = heappop(self._heap)
            slot = entry[1]
            if -entry[0] != self._next_use[slot]:
                continue
            if slot not in self._recent:
                break
            kept.append(entry)
        for entry in kept:
            heappush(self._heap, entry)
        return slot

    def _rebuild(self) -> None:
        self._heap = [(-use, slot) for slot, use in enumerate(self._next_use)]
        heapify(self._heap)
