"""Where partials go that leave memory: what the engine asks of a store, and a store that keeps nothing."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

__all__ = ["NoStore", "Store"]


class Store(Protocol):
    """The partials of one share, on disk. ``keeps``: whether there is a disk at all. Sums are known by number."""

    keeps: bool

    @property
    def bytes_written(self) -> int: ...

    @property
    def bytes_read(self) -> int: ...

    def commit(self, sum_: int, lane: int, chunk: int, cover: int, fields: Sequence[np.ndarray]) -> None:
        """Store a partial durably."""

    def load_into(self, sum_: int, lane: int, chunk: int, fields: Sequence[np.ndarray]) -> int:
        """Fill the fields with a stored partial and return its cover; 0 where there is none."""

    def finish(self, sum_: int, lane: int, chunk: int, checksum: int) -> None:
        """Note that the output of a chunk is written."""

    def shares(self, sum_: int, lane: int, chunk: int) -> list[int]:
        """Return the shares that hold a partial of a chunk, in ascending order."""

    def of(self, share: int) -> "Store":
        """Return the store of another share of the same run."""

    def covers(self, sum_: int = 0) -> list[dict[int, int | None]]:
        """Return, for each lane, the covers of all shares' partials by chunk; None where the chunk is finished."""


class NoStore:
    """Of a run in memory: its plan lets no partial leave memory before it is finished."""

    keeps = False
    bytes_written = bytes_read = 0

    def __init__(self, sums: int, lanes: int) -> None:
        self._covers: list[list[dict[int, int | None]]] = [[{} for _ in range(lanes)] for _ in range(sums)]

    def commit(self, sum_: int, lane: int, chunk: int, cover: int, fields: Sequence[np.ndarray]) -> None:
        raise AssertionError("a plan without a run directory never lets a partial leave memory")

    def load_into(self, sum_: int, lane: int, chunk: int, fields: Sequence[np.ndarray]) -> int:
        return 0

    def finish(self, sum_: int, lane: int, chunk: int, checksum: int) -> None:
        self._covers[sum_][lane][chunk] = None

    def shares(self, sum_: int, lane: int, chunk: int) -> list[int]:
        return []

    def of(self, share: int) -> "NoStore":
        return self

    def covers(self, sum_: int = 0) -> list[dict[int, int | None]]:
        return self._covers[sum_]
