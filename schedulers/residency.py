"""What stands in memory: blocks that a run will fetch in slots, and partials in places on the device and on the host.

The order of all uses is known before the run, so the slot whose content is needed again farthest in the future is the
one to fill (L. A. Belady, "A study of replacement algorithms", IBM Systems Journal 5, 1966). The planner runs the same
parts dry that the engine runs for real: what it counts is what will be moved.
"""

from collections import deque
from collections.abc import Collection, Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from cqsa_stream.schedulers.tasks import NEVER

__all__ = ["Placed", "Residency", "Standing", "pieces"]

_FEW = 8  # slots that are looked through faster than kept in order


def pieces(span: range, length: int) -> Iterator[range]:
    """Cut a range into pieces of a length; the last may be shorter."""
    return (range(start, min(start + length, span.stop)) for start in range(span.start, span.stop, length))


class Placed(NamedTuple):
    """A content's slot, whether it stood there already, and what it took the place of."""

    slot: int
    present: bool
    evicted: Hashable = None
    evicted_use: int = NEVER


class Residency:
    """Slots and their contents. The last ``window`` slots handed out are never refilled: they may still be read."""

    def __init__(self, slots: int, window: int = 0) -> None:
        assert 0 <= window <= max(0, slots - 1), f"a window of {window} of {slots} slots leaves none to fill"
        self._empty = list(range(slots - 1, -1, -1))
        self._slot: dict[Hashable, int] = {}
        self._content: list[Hashable] = [None] * slots
        self._next_use = [0] * slots
        self._recent: deque[int] = deque(maxlen=window)
        self._heap: list[tuple[int, int]] = []  # (-next use, slot); entries that no longer hold stay in it

    def __contains__(self, content: Hashable) -> bool:
        return content in self._slot

    @property
    def full(self) -> bool:
        """Whether no slot is empty."""
        return not self._empty

    def place(self, content: Hashable, next_use: int, keep: Collection[Hashable] = ()) -> Placed:
        """Return the slot for a content that is used now. What is in ``keep`` is not evicted for it."""
        slot = self._slot.get(content)
        present, evicted, use = slot is not None, None, NEVER
        if slot is None:
            slot = self._empty.pop() if self._empty else self._farthest(keep)
            evicted, use = self._content[slot], self._next_use[slot]
            self._slot.pop(evicted, None)
            self._slot[content], self._content[slot] = slot, content
        self._next_use[slot] = next_use
        self._recent.append(slot)
        if len(self._content) > _FEW:
            heappush(self._heap, (-next_use, slot))
            if len(self._heap) > 4 * len(self._content):
                self._rebuild()
        return Placed(slot, present, evicted, use)

    def remove(self, content: Hashable) -> int:
        """Take a content out and return its slot, which stays taken until ``free``."""
        slot = self._slot.pop(content)
        self._content[slot], self._next_use[slot] = None, -1
        return slot

    def free(self, slot: int) -> None:
        """Let a slot that ``remove`` returned be filled again."""
        self._empty.append(slot)

    def forget(self) -> None:
        """Begin anew: nothing that stands in a slot will be used again."""
        self._slot.clear()
        self._next_use = [NEVER] * len(self._content)
        self._content = [None] * len(self._content)
        self._empty = []
        self._rebuild()

    def farthest_use(self) -> int:
        """Return when the content is used again that is used last."""
        return max(self._next_use, default=-1)

    def _farthest(self, keep: Collection[Hashable]) -> int:
        """Return the slot whose content is used again last, of those that may be refilled."""
        if len(self._content) <= _FEW:
            slots = range(len(self._content))
            others = (s for s in slots if s not in self._recent and self._next_use[s] >= 0)
            return max((s for s in others if self._content[s] not in keep), key=self._next_use.__getitem__)
        passed = []
        while True:
            entry = heappop(self._heap)
            slot = entry[1]
            if -entry[0] != self._next_use[slot]:
                continue
            if slot not in self._recent and self._content[slot] not in keep:
                break
            passed.append(entry)
        for entry in passed:
            heappush(self._heap, entry)
        return slot

    def _rebuild(self) -> None:
        self._heap = [(-use, slot) for slot, use in enumerate(self._next_use) if use >= 0]
        heapify(self._heap)


class Brought(NamedTuple):
    """How a partial comes to its place on the device: what must leave before, and where it comes from.

    ``evicted`` leaves ``slot`` for the host's place ``parked_at`` or, where that is None, for disk; ``stored`` is what
    goes to disk. ``parked``: the host's place from which the partial comes; None where it comes from disk, or is new.
    """

    slot: int
    present: bool
    evicted: int | None = None
    parked_at: int | None = None
    stored: int | None = None
    parked: int | None = None


class Standing:
    """Where the partials of chunks stand: on the device, parked in host memory, or on disk.

    Of those on the device that no row of the task needs, the partial leaves whose next use is farthest: to host memory,
    as far as there are places, where again the farthest goes to disk.
    """

    def __init__(self, resident: int, parked: int) -> None:
        self.device, self.host = Residency(resident), Residency(parked)

    def bring(self, chunk: int, next_use: int, keep: Collection[int]) -> Brought:
        """Bring a chunk's partial to the device; those in ``keep`` stay there."""
        slot, present, evicted, use = self.device.place(chunk, next_use, keep)
        assert evicted is None or isinstance(evicted, int)
        parked_at = stored = parked = None
        if evicted is not None:
            parked_at, stored = self._park(evicted, use)
        if not present and chunk in self.host:
            parked = self.host.remove(chunk)
            self.host.free(parked)
        return Brought(slot, present, evicted, parked_at, stored, parked)

    def _park(self, chunk: int, next_use: int) -> tuple[int | None, int | None]:
        """Return the host's place for a partial that leaves the device, and what goes to disk for it."""
        if self.host.full and next_use >= self.host.farthest_use():
            return None, chunk
        slot, _, evicted, _ = self.host.place(chunk, next_use)
        assert evicted is None or isinstance(evicted, int)
        return slot, evicted
