"""Opening anything that holds tokens: paths, URLs, zarr and TensorStore arrays, numpy arrays, torch tensors."""

import json
import math
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.locations import is_url, kvstore

__all__ = ["TokenArray", "open_array"]

_ZARR = ("zarr.json", ".zarray", ".zgroup")


class TokenArray(Protocol):
    """An array ``[batch, head, token, feature]`` that is read piece by piece.

    ``source`` is a path or URL, or ``"memory"``; ``stored_chunk`` the shape of what is stored, and hence fetched, whole
    (``(1, 1, 1, feature)`` where any range can be read), ``encoding`` what a reader has to do with it, ``leaf_bytes``
    the pieces in which it can be read from the second time on (0: always whole). Each piece of a read in flight holds
    up to ``staging_bytes`` besides the caller's buffer; ``kept_bytes`` are remembered. ``bytes_read``: what was fetched
    so far.
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
    def leaf_bytes(self) -> int: ...
    @property
    def kept_bytes(self) -> int: ...
    @property
    def staging_bytes(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...

    def begin(self, in_flight: int) -> None:
        """Read ``in_flight`` pieces at a time from now on; what was checked before is checked again."""

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        """Return how many bytes behind a page's start a buffer for these rows should begin to be filled fastest."""

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        """Fill ``buffer [head, token, feature]``, of the array's dtype. Raises ArrayError where data is missing."""

    def check(self) -> None:
        """Raise ArrayError where a stored chunk is missing or short, as far as this can be told without decoding."""


def open_array(source: Any, *, fill_missing: bool = False) -> TokenArray:
    """Open for reading. Raises ArrayError saying what was found and what can be opened.

    ``fill_missing`` reads stored chunks that are missing as the array's fill value instead of refusing them.
    """
    if isinstance(source, str | Path):
        return _open_named(str(source), fill_missing)
    if isinstance(source, np.ndarray):
        return _open_numpy(source)
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


def _open_numpy(values: np.ndarray) -> TokenArray:
    from cqsa_stream.storage.files import open_memmap
    from cqsa_stream.storage.memory import MemoryArray

    file = open_memmap(values) if isinstance(values, np.memmap) else None
    return file or MemoryArray(values)


def _open_zarr_array(array: Any, fill_missing: bool) -> TokenArray:
    root = getattr(array.store, "root", None)
    if isinstance(root, Path):
        return _open_path(root / array.path, fill_missing)
    from cqsa_stream.storage.zarr_array import ZarrArray

    return ZarrArray(array, fill_missing)


def _open_named(source: str, fill_missing: bool) -> TokenArray:
    """Open a path, a URL, or ``file#part``: a tensor of a .safetensors file, a plain file's dtype and shape."""
    from cqsa_stream.storage.files import open_plain, open_safetensors
    from cqsa_stream.storage.tensorstore_array import TensorStoreArray

    path = Path(source.removeprefix("file://")).absolute()
    if _exists(path):
        return _open_path(path, fill_missing)
    if is_url(source) and (not source.startswith("file://") or "|" in source):
        return TensorStoreArray.open(source, kvstore(source), fill_missing)
    pieces = str(path).split("#")  # either side may hold more of them
    for count in range(1, len(pieces)):
        file, part = Path("#".join(pieces[:count])), "#".join(pieces[count:])
        if file.is_file():
            return open_safetensors(file, part) if file.suffix == ".safetensors" else open_plain(file, part)
    raise ArrayError(f"{path}: no such file or directory")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise ArrayError(f"{path}: {error.strerror}") from error


def _open_path(path: Path, fill_missing: bool) -> TokenArray:
    from cqsa_stream.storage.files import open_npy, open_safetensors
    from cqsa_stream.storage.tensorstore_array import TensorStoreArray
    from cqsa_stream.storage.zarr_files import raw_zarr

    if path.is_file():
        if path.suffix == ".npy":
            return open_npy(path)
        if path.suffix == ".safetensors":
            return open_safetensors(path, "")
        if path.suffix == ".zip":
            base = {"driver": "file", "path": str(path)}
            return TensorStoreArray.open(str(path), {"driver": "zip", "base": base, "path": ""}, fill_missing)
        raise ArrayError(
            f"{path}: a file that is no .npy, .safetensors or .zip; expected one of them, a Zarr array (a directory), "
            f"or a plain file of numbers named with its dtype and shape, as {path.name}#bfloat16:1,8,4096,64"
        )
    files = {"driver": "file", "path": f"{path}/"}
    try:
        if not any((path / name).is_file() for name in _ZARR) and (path / "attributes.json").is_file():  # N5
            return TensorStoreArray.open(str(path), files, fill_missing)
        metadata = _zarr_metadata(path)
    except OSError as error:
        raise ArrayError(f"{path}: {error.strerror}") from error
    raw = None if fill_missing else raw_zarr(path, metadata)
    return raw or TensorStoreArray.open(str(path), files, fill_missing)


def _zarr_metadata(path: Path) -> dict[str, Any]:
    """Return what describes the array stored in a directory, checked so far as to be believed."""
    name = next((name for name in ("zarr.json", ".zarray") if (path / name).is_file()), None)
    if name is None and (path / ".zgroup").is_file():
        raise ArrayError(f"{path}: a Zarr group, not an array; name an array inside it")
    if name is None:
        raise ArrayError(f"{path}: no array (neither zarr.json nor .zarray inside); expected a Zarr v2 or v3 array")
    try:
        metadata = json.loads((path / name).read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise ArrayError(f"{path / name}: unreadable ({error}); expected JSON that describes an array") from error
    if not isinstance(metadata, dict) or metadata.get("node_type", "array") != "array":
        raise ArrayError(f"{path}: a Zarr group, not an array; name an array inside it")
    shape = metadata.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ArrayError(f"{path / name}: shape {shape!r}; expected a list of lengths")
    if math.prod(shape) > 2**62 or max(shape, default=0) > 2**62:
        raise ArrayError(f"{path / name}: shape {shape} has over 2^62 elements")
    return metadata
