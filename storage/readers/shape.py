"""An array that is not there yet: a shape and a dtype, to plan by."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from cqsa_stream.storage.dtypes import DTYPES
from cqsa_stream.storage.errors import ArrayError

__all__ = ["Shape"]


@dataclass(frozen=True)
class Shape:
    """The shape ``[batch, head, token, feature]`` and dtype of an array that is not there yet, to plan by.

    It counts as stored on a local disk as plain numbers, a head at a time. Raises ArrayError where it is no shape.
    """

    shape: tuple[int, ...]
    dtype: str = "bfloat16"

    source: ClassVar[str] = "nowhere"
    encoding: ClassVar[Literal["raw"]] = "raw"
    kept_bytes: ClassVar[int] = 0
    staging_bytes: ClassVar[int] = 0
    bytes_read: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ArrayError(f"dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if len(self.shape) != 4 or any(type(n) is not int or not 0 < n < 2**62 for n in self.shape):
            raise ArrayError(f"shape {self.shape!r}; expected 4 whole numbers: batch, heads, tokens, head dim")

    @property
    def stored_chunk(self) -> tuple[int, ...]:
        return (1, 1, 1, self.shape[3])

    def begin(self, in_flight: int) -> None:
        """There is nothing to read."""

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        return 0

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        self.check()

    def cached_share(self) -> float:
        return 0.0

    def check(self) -> None:
        raise ArrayError(f"a shape {self.shape}, not an array: it can be planned, and not computed; name an array")
