"""Arrays that are already in memory: numpy arrays and torch tensors."""

from typing import Any, ClassVar, Literal

import numpy as np

from cqsa_stream.storage.dtypes import DTYPES, ML_DTYPES, numpy_dtype
from cqsa_stream.storage.errors import ArrayError

__all__ = ["MemoryArray", "copy_rows", "refuse_special"]


class MemoryArray:
    """A numpy array, memory-mapped or not, as a token array."""

    source = "memory"
    staging_bytes = 0
    kept_bytes = 0
    encoding: ClassVar[Literal["raw"]] = "raw"

    def __init__(self, values: np.ndarray, *, token_major: bool = False) -> None:
        """``token_major``: the axes are [batch, token, head, feature]."""
        refuse_special(values)
        if token_major and values.ndim == 4:
            values = values.swapaxes(1, 2)
        self.values = values
        self.shape = values.shape
        self.dtype = values.dtype.name
        self.stored_chunk = (1, 1, 1, values.shape[-1] if values.ndim else 1)
        self.bytes_read = 0

    @classmethod
    def of_tensor(cls, tensor: Any, *, token_major: bool = False) -> "MemoryArray":
        """Take a torch tensor, without a copy where it is on the CPU; bfloat16 and float8 become ml_dtypes' types.

        Raises ArrayError where its numbers are not all that it means, or cannot be had.
        """
        import torch

        name = str(tensor.dtype).removeprefix("torch.")
        _refuse_special_tensor(tensor, name)
        try:
            host = tensor.detach().resolve_neg().cpu()
            plain = {1: torch.uint8, 2: torch.uint16}
            same = name not in ML_DTYPES
            values = host.numpy() if same else host.view(plain[host.itemsize]).numpy().view(numpy_dtype(name))
        except Exception as error:  # each kind of tensor that has no numbers raises what it likes
            raise ArrayError(
                f"a tensor whose numbers cannot be had ({error}); expected a plain torch.Tensor"
            ) from error
        return cls(values, token_major=token_major)

    def begin(self, in_flight: int) -> None:
        """There is one way to read."""

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        return 0

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        copy_rows(buffer, self.values[batch, heads.start : heads.stop, tokens.start : tokens.stop])
        self.bytes_read += buffer.nbytes

    def cached_share(self) -> float:
        return 0.0

    def check(self) -> None:
        """Nothing is stored, nothing can be missing."""


def copy_rows(target: np.ndarray, source: np.ndarray) -> None:
    """Copy ``[head, token, feature]``, row by row where rows are whole: three times as fast where axes are swapped."""
    if (
        target.size
        and target.dtype == source.dtype
        and all(rows.strides[-1] == rows.itemsize for rows in (target, source))
    ):
        row = np.dtype(f"V{target.shape[-1] * target.itemsize}")
        target, source = target.view(row), source.view(row)
    np.copyto(target, source)


def refuse_special(values: np.ndarray) -> None:
    """Raise ArrayError where an array's plain numbers are not all that it means, or are no numbers."""
    kind = f"{type(values).__module__}.{type(values).__qualname__}"
    if isinstance(values, np.ma.MaskedArray):
        raise ArrayError(
            f"a masked array ({kind}), whose mask would be lost; fill it: array.filled(value). Keys that must not be "
            "seen can be left out, or given features that score -inf"
        )
    if type(values) not in (np.ndarray, np.memmap):
        raise ArrayError(f"a subclass of numpy.ndarray ({kind}); expected a plain one: numpy.asarray(array)")
    dtype = values.dtype
    if dtype.hasobject or dtype.names is not None or dtype.name.startswith(("void", "str", "bytes")):
        raise ArrayError(f"a numpy array of dtype {dtype}; expected one of {', '.join(DTYPES)}: convert the array")
    if not dtype.isnative:
        raise ArrayError(
            f"a numpy array of dtype {dtype.str}; expected the machine's own byte order: "
            "array.astype(array.dtype.newbyteorder('='))"
        )


def _refuse_special_tensor(tensor: Any, name: str) -> None:
    import torch

    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise ArrayError("a tensor inside torch.vmap or torch.func: its numbers are not there yet; call this outside")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise ArrayError(
            f"a subclass of torch.Tensor ({kind}), which may mean more than its numbers; expected a plain tensor, as "
            "nested.to_padded_tensor(0.0), masked.to_tensor(0.0), distributed.full_tensor() or "
            "other.as_subclass(torch.Tensor) give one"
        )
    if tensor.is_nested:
        raise ArrayError("a nested tensor; expected a plain one: pass one sequence, or nested.to_padded_tensor(0.0)")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ArrayError(f"a tensor of layout {tensor.layout} on {tensor.device}; expected a dense (strided) one")
    if tensor.is_quantized:
        raise ArrayError(f"a quantized tensor of dtype {name}; expected plain numbers: tensor.dequantize()")
    if name not in DTYPES and (name.startswith("float") or tensor.is_complex()):
        raise ArrayError(f"a tensor of dtype {name}; expected one of {', '.join(DTYPES)}")
