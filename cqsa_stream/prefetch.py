"""Reading ahead: a thread walks the schedule before the engine and fills a bounded ring of host buffers.

The buffers are allocated once, at their exact size; for a CUDA device they are page-locked, so that copies to the
device run beside the compute. A buffer is filled again only when its last reader has let go of it.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cqsa_stream.storage.arrays import TokenArray
from cqsa_stream.storage.raw import numpy_dtype

__all__ = ["Loaded", "Prefetcher", "Read"]


@dataclass(frozen=True)
class Read:
    """One piece to be read: some tokens of some heads of one array."""

    array: Literal["query", "key", "value"]
    batch: int
    heads: range
    tokens: range


@dataclass
class _Slot:
    bytes: np.ndarray
    in_use_until: torch.cuda.Event | None = None


@dataclass
class Loaded:
    """A piece in host memory, ``values [head, token, feature]``; release it when its last reader is done."""

    read: Read
    values: Tensor
    _slot: _Slot = field(repr=False)
    _free: "queue.SimpleQueue[_Slot | None]" = field(repr=False)

    def release(self, until: torch.cuda.Event | None = None) -> None:
        """Give the buffer back; it is filled again once the event has happened."""
        self._slot.in_use_until = until
        self._free.put(self._slot)


class Prefetcher:
    """Yields the pieces of ``reads`` in order, read by a thread of its own; a context manager."""

    def __init__(
        self, reads: Iterator[Read], arrays: dict[str, TokenArray], slots: int, slot_bytes: int, device: torch.device
    ) -> None:
        self._reads = reads
        self._arrays = arrays
        self._memory = torch.empty(slots * slot_bytes, dtype=torch.uint8)
        self._pinned = device.type == "cuda"
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Loaded | BaseException | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        whole = self._memory.numpy()
        for index in range(slots):
            self._free.put(_Slot(whole[index * slot_bytes : (index + 1) * slot_bytes]))
        self._thread = threading.Thread(target=self._fill, name="cqsa-prefetch", daemon=True)

    def __enter__(self) -> "Prefetcher":
        if self._pinned and self._memory.numel():
            _check(_cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.numel(), 0))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._free.put(None)
        self._thread.join()
        if self._pinned and self._memory.numel():
            torch.cuda.synchronize()
            _check(_cudart().cudaHostUnregister(self._memory.data_ptr()))

    def __next__(self) -> Loaded:
        """Return the next piece, waiting for it. Raises what reading it raised."""
        loaded = self._ready.get()
        if loaded is None:
            raise StopIteration
        if isinstance(loaded, BaseException):
            raise loaded
        return loaded

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def _fill(self) -> None:
        try:
            for read in self._reads:
                slot = self._free.get()
                if slot is None or self._closing.is_set():
                    return
                if slot.in_use_until is not None:
                    slot.in_use_until.synchronize()
                self._ready.put(self._load(read, slot))
            self._ready.put(None)
        except BaseException as error:  # handed to the thread that waits for this piece
            self._ready.put(error)

    def _load(self, read: Read, slot: _Slot) -> Loaded:
        array = self._arrays[read.array]
        dtype = numpy_dtype(array.dtype)
        shape = (len(read.heads), len(read.tokens), array.shape[3])
        used = slot.bytes[: int(np.prod(shape)) * dtype.itemsize]
        array.read_into(read.batch, read.heads, read.tokens, used.view(dtype).reshape(shape))
        values = torch.from_numpy(used).view(getattr(torch, array.dtype)).reshape(shape)
        return Loaded(read, values, slot, self._free)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(status: Any) -> None:
    code = int(status)
    if code != 0:
        raise RuntimeError(f"page-locking host memory failed (CUDA error {code}); take a smaller host_memory")
