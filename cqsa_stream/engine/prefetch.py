"""Reading ahead: a thread walks the schedule before the engine and fills host buffers with what is not there yet.

The buffers are allocated once, as whole pages, so that files can be read straight into them; for a device with memory
of its own they are page-locked, so that copies to it run beside the compute. What stands in a buffer and will be used
again stays, as far as there are buffers (``Residency``: the planner has counted the reads in the same way). A buffer is
filled anew only when its last reader has released it.
"""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cqsa_stream.engine.arena import PageLock, pages
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.machine.device import DONE, Device, Event
from cqsa_stream.schedulers.model.memory import Layout
from cqsa_stream.schedulers.residency import Residency
from cqsa_stream.storage.dtypes import numpy_dtype
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.open import TokenArray

__all__ = ["Loaded", "Prefetcher", "Read"]


@dataclass(frozen=True)
class Read:
    """One piece to be read: some tokens of a lane's heads; ``next_use``: larger, the later it is used again in it."""

    lane: int
    array: Literal["query", "key", "value"]
    batch: int
    heads: range
    tokens: range
    next_use: int


@dataclass
class _Slot:
    number: int
    bytes: np.ndarray
    released: "queue.SimpleQueue[None]" = field(default_factory=queue.SimpleQueue)
    readers: int = 0
    in_use_until: Event = DONE


@dataclass
class Loaded:
    """A piece in host memory, ``values [head, token, feature]``; release it when its reader is done."""

    read: Read
    values: Tensor
    _slot: _Slot = field(repr=False)
    _turns: "queue.SimpleQueue[None]" = field(repr=False)

    def release(self, until: Event = DONE) -> None:
        """Release the buffer; it may be filled again once the event has happened."""
        self._slot.in_use_until = until
        self._slot.released.put(None)
        self._turns.put(None)


class Prefetcher:
    """Yields the pieces of ``reads`` in order, read by a thread of its own; a context manager."""

    def __init__(
        self,
        reads: Iterator[Read],
        arrays: dict[str, TokenArray],
        layout: Layout,
        device: Device,
        timeline: Timeline,
    ) -> None:
        self._reads, self._timeline = reads, timeline
        self._arrays, self._device = arrays, device
        memory = pages(layout.slots * layout.slot_bytes).view(layout.slots, -1)
        self._slots = [_Slot(number, part) for number, part in enumerate(memory.numpy())]
        self._lock = PageLock(memory, device)
        self._residency = Residency(layout.slots, layout.ring_slots - 1)
        self._turns: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each piece that may yet be made ready
        for _ in self._slots:
            self._turns.put(None)
        self._ready: queue.SimpleQueue[Future[Loaded] | BaseException | None] = queue.SimpleQueue()
        reads_at_a_time = min(device.habits.reads_at_a_time, layout.in_flight)
        self._loaders = ThreadPoolExecutor(reads_at_a_time, "cqsa-load")
        for array in arrays.values():
            array.begin(layout.in_flight // reads_at_a_time)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="cqsa-prefetch", daemon=True)

    def __enter__(self) -> "Prefetcher":
        self._lock.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._turns.put(None)
        for slot in self._slots:
            for _i in range(slot.readers):
                slot.released.put(None)
        self._thread.join()
        self._loaders.shutdown()
        for array in self._arrays.values():
            array.begin(in_flight=1)  # so that it discards what it holds to read with
        try:
            if error[0] is not None:  # a copy may have begun without its event
                self._device.synchronize()
            for slot in self._slots:
                slot.in_use_until.synchronize()
        finally:
            self._lock.__exit__(*error)  # while the last kernels compute

    def __next__(self) -> Loaded:
        """Return the next piece, waiting for it. Raises what reading it raised."""
        with self._timeline.span("wait"):
            loading = self._ready.get()
            if loading is None:
                raise StopIteration
            if isinstance(loading, BaseException):
                raise loading
            return loading.result()

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def _fill(self) -> None:
        try:
            lane = 0
            for read in self._reads:
                self._turns.get()
                if read.lane != lane:
                    lane = read.lane
                    self._residency.forget()
                index, present, *_ = self._residency.place((read.array, read.tokens), read.next_use)
                slot = self._slots[index]
                if not present:
                    self._wait_for_readers(slot)
                if self._closing.is_set():
                    return
                slot.readers += 1
                self._ready.put(self._loaders.submit(self._load, read, slot, present=present))
            self._ready.put(None)
        except BaseException as error:  # handed to the thread that waits for this piece
            self._ready.put(error)

    def _wait_for_readers(self, slot: _Slot) -> None:
        for _ in range(slot.readers):
            slot.released.get()
        slot.readers = 0
        slot.in_use_until.synchronize()

    def _load(self, read: Read, slot: _Slot, *, present: bool) -> Loaded:
        """Read a piece into its slot. One that is present may still be on its way: that read is handed out before."""
        array = self._arrays[read.array]
        dtype = numpy_dtype(array.dtype)
        shape = (len(read.heads), len(read.tokens), array.shape[3])
        try:
            lead = array.lead(read.batch, read.heads, read.tokens)
            used = slot.bytes[lead : lead + int(np.prod(shape)) * dtype.itemsize]
            if not present:
                with self._timeline.span("read", read.array):
                    array.read_into(read.batch, read.heads, read.tokens, used.view(dtype).reshape(shape))
                self._lock.wait(slot.number)
        except ArrayError as error:
            raise ArrayError(f"{read.array}: {error}") from error
        values = torch.from_numpy(used).view(getattr(torch, array.dtype)).reshape(shape)
        return Loaded(read, values, slot, self._turns)
