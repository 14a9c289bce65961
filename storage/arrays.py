"""Opening anything that holds tokens: paths, URLs, zarr and TensorStore arrays, numpy arrays, torch tensors."""

import json
import math
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from cqsa_stream.storage.errors import ArrayError

__all__ = ["TokenArray", "open_array"]


class TokenArray(Protocol):
    """An array ``[batch, head, token, feature]`` that is read piece by piece.

    ``source`` is a path or URL, or ``"memory"``; ``stored_chunk`` the shape of what is stored, and hence fetched, whole
    (``(1, 1, 1, feature)`` where any range can be read), ``encoding`` what a reader has to do with it;
    ``staging_bytes`` the memory that a read holds besides the caller's buffer; ``bytes_read`` what was fetched so far.
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
    def staging_bytes(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        """Fill ``buffer [head, token, feature]``, of the array's dtype. Raises ArrayError where data is missing."""

    def check(self) -> None:
        """Raise ArrayError where a stored chunk is missing or short, as far as this can be told without decoding."""


def open_array(source: Any, *, fill_missing: bool = False) -> TokenArray:
    """Open for reading. Raises ArrayError saying what was found and what can be opened.

    ``fill_missing`` reads stored chunks that are missing as the array's fill value instead of refusing them.
    """
    if isinstance(source, str | Path):
        return _open_path(str(source), fill_missing)
    if isinstance(source, np.ndarray):
        return _in_memory(source)
    kind = f"{type(source).__module__.partition('.')[0]}.{type(source).__name__}"
    if kind.startswith("torch."):
        from cqsa_stream.storage.memory import MemoryArray

        return MemoryArray.of_tensor(source)
    if kind == "tensorstore.TensorStore":
        from cqsa_stream.storage.tensorstore_array import TensorStoreArray

        return TensorStoreArray.of_store(source, fill_missing)
    if kind == "zarr.Array":
        return _open_zarr_array(source, fill_missing)
    raise ArrayError(
        f"found a {kind}; expected a path or URL, a zarr.Array, a tensorstore.TensorStore, a numpy array or "
        "a torch tensor"
    )


def _in_memory(values: np.ndarray) -> TokenArray:
    from cqsa_stream.storage.memory import MemoryArray

    return MemoryArray(values)


def _open_zarr_array(array: Any, fill_missing: bool) -> TokenArray:
    root = getattr(array.store, "root", None)
    if isinstance(root, Path):
        return _open_path(str(root / array.path), fill_missing)
    return _in_memory(np.asarray(array[...]))


def _open_path(source: str, fill_missing: bool) -> TokenArray:
    from cqsa_stream.storage.raw import RawArray
    from cqsa_stream.storage.tensorstore_array import TensorStoreArray

    if "://" in source and not source.startswith("file://"):
        return TensorStoreArray.open(source, fill_missing)
    path = Path(source.removeprefix("file://")).absolute()
    if not path.exists():
        raise ArrayError(f"{path}: no such file or directory")
    if path.is_file():
        if path.suffix != ".npy":
            raise ArrayError(
                f"{path}: a file that is no .npy; expected a Zarr v2 or v3 array (a directory) or a .npy file"
            )
        return RawArray.of_npy(path)
    metadata = _zarr_metadata(path)
    raw = None if fill_missing else RawArray.of_zarr(path, metadata)
    if raw is not None and not raw.trailer:
        return raw
    return TensorStoreArray.open(str(path), fill_missing, raw)  # it checks the crc32c of what it reads


def _zarr_metadata(path: Path) -> dict[str, Any]:
    """Return what describes the array stored in a directory, checked so far as to be believed."""
    name = next((name for name in ("zarr.json", ".zarray") if (path / name).is_file()), None)
    if name is None and (path / ".zgroup").is_file():
        raise ArrayError(f"{path}: a Zarr group, not an array; name an array inside it")
    if name is None:
        raise ArrayError(f"{path}: no array (neither zarr.json nor .zarray inside); expected a Zarr v2 or v3 array")
    try:
        metadata = json.loads((path / name).read_bytes())
    except (ValueError, OSError) as error:
        raise ArrayError(f"{path / name}: unreadable ({error}); expected JSON that describes an array") from error
    if not isinstance(metadata, dict) or metadata.get("node_type", "array") != "array":
        raise ArrayError(f"{path}: a Zarr group, not an array; name an array inside it")
    shape = metadata.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ArrayError(f"{path / name}: shape {shape!r}; expected a list of lengths")
    if math.prod(shape) > 2**62:
        raise ArrayError(f"{path / name}: shape {shape} has over 2^62 elements")
    return metadata
