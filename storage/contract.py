"""What every array that holds tokens can do. A new format is a reader with these methods, and a branch in ``open``."""

from typing import Literal, Protocol

import numpy as np

__all__ = ["LAYOUTS", "TokenArray"]

LAYOUTS = ("bhtd", "bthd")


class TokenArray(Protocol):
    """An array ``[batch, head, token, feature]`` that is read piece by piece.

    ``source`` is a path or URL, or ``"memory"``; ``stored_chunk`` the shape of what is stored, and hence fetched, whole
    (``(1, 1, 1, feature)`` where any range can be read), ``encoding`` what a reader has to do with it: a "checked" one
    is fetched whole only the first time in a session. Each piece of a read in flight holds up to ``staging_bytes``
    besides the caller's buffer; ``kept_bytes`` are remembered. ``bytes_read``: what was fetched so far.
    """

    @property
    def source(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def stored_chunk(self) -> tuple[int, ...]: ...
    @property
    def encoding(self) -> Literal["raw", "checked", "compressed"]: ...
    @property
    def kept_bytes(self) -> int: ...
    @property
    def staging_bytes(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...

    def begin(self, in_flight: int) -> None:
        """Begin a session: read ``in_flight`` pieces at a time; what was checked in the one before is checked again."""

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        """Return how many bytes behind a page's start a buffer for these rows should begin to be filled fastest."""

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        """Fill ``buffer [head, token, feature]``, of the array's dtype. Raises ArrayError where data is missing.

        Several threads may read at a time.
        """

    def cached_share(self) -> float:
        """Return which share of it is in the page cache now, by a look at some of it; 0 where none can tell."""

    def check(self) -> None:
        """Raise ArrayError where a stored chunk is missing or short, as far as this can be told without decoding."""
