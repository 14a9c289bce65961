"""Arrays that are already in memory: numpy arrays and torch tensors."""

from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np

from cqsa_stream.storage.dtypes import FLOATS, numpy_dtype
from cqsa_stream.storage.errors import ArrayError

__all__ = ["MemoryArray"]


class MemoryArray:
    """A numpy array, memory-mapped or not, as a token array."""

    source = "memory"
    staging_bytes = 0
    leaf_bytes = kept_bytes = 0
    encoding: ClassVar[Literal["raw"]] = "raw"

    def __init__(self, values: np.ndarray) -> None:
        if not values.dtype.isnative:
            raise ArrayError(f"a numpy array of dtype {values.dtype.str}; expected the machine's own byte order")
        self.values = values
        self.shape = values.shape
        self.dtype = values.dtype.name
        self.stored_chunk = (1, 1, 1, values.shape[-1] if values.ndim else 1)
        self.bytes_read = 0

    @classmethod
    def of_tensor(cls, tensor: Any) -> "MemoryArray":
        """Take a torch tensor, without a copy where it is on the CPU; bfloat16 and float8 become ml_dtypes' types."""
        import torch

        name = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ArrayError(f"a tensor of layout {tensor.layout} on {tensor.device}; expected a dense (strided) one")
        if name.startswith("float") and name not in FLOATS:
            raise ArrayError(f"a tensor of dtype {name}; expected one of {', '.join(FLOATS)}")
        host = tensor.detach().cpu()
        if hasattr(ml_dtypes, name) and name in FLOATS:
            plain = {1: torch.uint8, 2: torch.uint16}[host.itemsize]
            return cls(host.view(plain).numpy().view(numpy_dtype(name)))
        return cls(host.numpy())

    def begin(self, in_flight: int) -> None:
        """There is one way to read."""

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        return 0

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        np.copyto(buffer, self.values[batch, heads.start : heads.stop, tokens.start : tokens.stop])
        self.bytes_read += buffer.nbytes

    def check(self) -> None:
        """Nothing is stored, nothing can be missing."""
