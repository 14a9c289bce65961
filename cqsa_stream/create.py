"""Writing inputs piece by piece: Q, K and V as they come from a model, any number of tokens at a time."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tensorstore as ts

from cqsa_stream.errors import InputError
from cqsa_stream.inputs import naming
from cqsa_stream.machine.places import local_path
from cqsa_stream.problem import DTYPES, refuse_misfits
from cqsa_stream.storage.atomic import make_directory
from cqsa_stream.storage.contract import LAYOUTS
from cqsa_stream.storage.dtypes import numpy_dtype
from cqsa_stream.storage.output import create_array, write
from cqsa_stream.storage.readers.memory import MemoryArray
from cqsa_stream.storage.readers.shape import Shape

__all__ = ["InputWriter", "create_inputs"]

_NAMES = ("query", "key", "value")
_CHUNK_BYTES, _HELD_BYTES = 4 << 20, 64 << 20


def create_inputs(
    directory: str | os.PathLike[str],
    shape: Sequence[int],
    dtype: Any = "bfloat16",
    layout: str = "bhtd",
    *,
    kv_heads: int | None = None,
    value_dim: int | None = None,
) -> "InputWriter":
    """Create q.zarr, k.zarr and v.zarr in a directory; return what appends tokens to them, a context manager.

    ``shape``: that of the whole query, ``[batch, head, token, feature]``; with ``layout="bthd"`` it may be ``[batch,
    token, head, feature]``, as what is appended is. Keys and values have the same shape but for ``kv_heads`` and
    ``value_dim``; ``dtype`` is a name, or torch's. What is stored is ``[batch, head, token, feature]`` in either case.
    Raises InputError; nothing is overwritten.
    """
    return InputWriter(local_path(directory), shape, dtype, layout, kv_heads=kv_heads, value_dim=value_dim)


class InputWriter:
    """Appends tokens to the three arrays. ``paths``: where they are, as query, key and value.

    A stored chunk is written when it is whole: up to 64 MiB of each array wait in memory.
    """

    def __init__(
        self,
        directory: Path,
        shape: Sequence[int],
        dtype: Any,
        layout: str,
        *,
        kv_heads: int | None,
        value_dim: int | None,
    ) -> None:
        if layout not in LAYOUTS:
            raise InputError(f"layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
        self.paths: tuple[Path, Path, Path] = (directory / "q.zarr", directory / "k.zarr", directory / "v.zarr")
        for path in self.paths:
            if path.exists():
                raise InputError(f"{path} exists; name another directory")
        self._dtype = str(dtype).removeprefix("torch.")
        self._named = tuple(Shape(tuple(map(_axis_length, shape)), self._dtype).shape)
        self._kv_heads, self._value_dim, self._token_major = kv_heads, value_dim, layout == "bthd"
        self._shapes: list[tuple[int, ...]] = []
        self._arrays: list[_Growing] = []
        self._failed = False

    @property
    def tokens(self) -> int:
        """How many tokens were appended so far."""
        return self._arrays[0].tokens if self._arrays else 0

    def append(self, query: Any, key: Any, value: Any) -> None:
        """Append the next tokens: numpy arrays or torch tensors, of the same number of tokens, batch by batch.

        Raises InputError or ArrayError where they do not fit; then nothing of them is written. Where writing fails,
        what is there is not whole, and the writer takes no more.
        """
        if self._failed:
            raise InputError("an earlier piece could not be written; remove the directory, and begin anew")
        pieces = []
        for name, source in zip(_NAMES, (query, key, value), strict=True):
            with naming(name):
                pieces.append(_values(source, token_major=self._token_major))
        shapes = self._shapes or self._whole_shapes(pieces[0].shape)
        for name, shape, piece in zip(_NAMES, shapes, pieces, strict=True):
            self._refuse_misfit(name, shape, piece, pieces[0].shape[2])
        if not self._arrays:
            self._create(shapes)
        self._failed = True
        for array, piece in zip(self._arrays, pieces, strict=True):
            array.append(piece)
        self._failed = False

    def close(self) -> None:
        """End the writing. Raises InputError where tokens are missing, or could not be written."""
        if self._failed:
            raise InputError("a piece could not be written; remove the directory, and begin anew")
        if not self._arrays or self._arrays[0].missing:
            total = self._shapes[0][2] if self._shapes else "any"
            raise InputError(f"{self.tokens} of {total} tokens were appended; append the rest before close")

    def __enter__(self) -> "InputWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()

    def __repr__(self) -> str:
        return f"<InputWriter {self.paths[0].parent}: {self.tokens} tokens of {self._named}, {self._dtype}>"

    def _whole_shapes(self, piece: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the shapes of the arrays; the first piece says which of the named axes are the heads."""
        batch, heads, tokens, dim = self._named
        if self._token_major and piece[1] != heads:
            heads, tokens = tokens, heads
        kv_heads = heads if self._kv_heads is None else self._kv_heads
        value_dim = dim if self._value_dim is None else self._value_dim
        return [(batch, heads, tokens, dim), (batch, kv_heads, tokens, dim), (batch, kv_heads, tokens, value_dim)]

    def _refuse_misfit(self, name: str, shape: tuple[int, ...], piece: np.ndarray, tokens: int) -> None:
        """Raise InputError where a piece is not the next so many tokens of an array."""
        expected = (*shape[:2], tokens, shape[3])
        if piece.shape != expected:
            raise InputError(
                f"{name}: a piece of {list(piece.shape)}; expected {list(expected)}: batch, heads, the tokens of the "
                "piece, features"
            )
        if self.tokens + tokens > shape[2]:
            raise InputError(f"{name}: {self.tokens + tokens} tokens; the array has {shape[2]}")
        if piece.dtype != numpy_dtype(self._dtype):
            raise InputError(f"{name}: a piece of {piece.dtype}; expected {self._dtype}: convert it")

    def _create(self, shapes: list[tuple[int, ...]]) -> None:
        refuse_misfits(*(Shape(shape, self._dtype) for shape in shapes))
        make_directory(self.paths[0].parent)
        self._shapes = shapes
        self._arrays = [_Growing(path, shape, self._dtype) for path, shape in zip(self.paths, shapes, strict=True)]


class _Growing:
    """An array that is written token by token, a whole stored chunk of all heads at a time."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        batch, heads, tokens, dim = self.shape = shape
        row_bytes = dim * DTYPES[dtype]
        chunk_bytes = min(_CHUNK_BYTES, _HELD_BYTES // (batch * heads))
        self._chunk = min(tokens, max(1, chunk_bytes // row_bytes))
        self._held = np.empty((batch, heads, self._chunk, dim), numpy_dtype(dtype))
        self._target: ts.TensorStore = create_array(path, shape, dtype, (1, 1, self._chunk, dim), "none")
        self.tokens = 0

    @property
    def missing(self) -> int:
        return self.shape[2] - self.tokens

    def append(self, piece: np.ndarray) -> None:
        taken = 0
        while taken < piece.shape[2]:
            at = self.tokens % self._chunk
            count = min(self._chunk - at, piece.shape[2] - taken)
            self._held[:, :, at : at + count] = piece[:, :, taken : taken + count]
            taken, self.tokens = taken + count, self.tokens + count
            if self.tokens % self._chunk == 0 or not self.missing:
                self._write()

    def _write(self) -> None:
        first = (self.tokens - 1) // self._chunk * self._chunk
        whole = self._held[:, :, : self.tokens - first]
        write(self._target[:, :, first : self.tokens], np.ascontiguousarray(whole))


def _values(source: Any, *, token_major: bool) -> np.ndarray:
    """Return the numbers of a piece as ``[batch, head, token, feature]``. Raises ArrayError."""
    if isinstance(source, np.ndarray):
        found = MemoryArray(source, token_major=token_major).values
    elif hasattr(source, "detach"):
        found = MemoryArray.of_tensor(source, token_major=token_major).values
    else:
        raise InputError(f"found a {type(source).__name__}; expected a numpy array or a torch tensor")
    if found.ndim != 4:
        raise InputError(f"a piece of shape {found.shape}; expected 4 axes")
    return found


def _axis_length(number: int) -> int:
    """Return a whole number; -1, which no shape takes, of anything else."""
    try:
        return int(number) if math.floor(number) == number else -1
    except (TypeError, ValueError, OverflowError):
        return -1
