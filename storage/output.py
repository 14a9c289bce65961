"""Writing arrays that every Zarr reader opens: Zarr v3, crc32c, named dimensions, every chunk stored and fsynced."""

import errno
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from crc32c import crc32c

from cqsa_stream.storage.atomic import make_directory, replace_file, sweep
from cqsa_stream.storage.errors import ArrayError, FullDiskError
from cqsa_stream.storage.readers.tensorstore import clean_message, context, system_error
from cqsa_stream.storage.retrying import retrying

__all__ = [
    "DIMENSIONS",
    "METADATA",
    "chunk_is_whole",
    "create_array",
    "described",
    "holds_array",
    "open_output",
    "read",
    "write",
    "write_chunk",
]

METADATA = "zarr.json"
_CHECKSUM_BYTES = 4
DIMENSIONS = ("batch", "head", "token", "feature")
_CODECS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "crc32c": [{"name": "crc32c"}],
    "zstd": [{"name": "zstd", "configuration": {"level": 1}}, {"name": "crc32c"}],
}


def create_array(
    path: Path,
    shape: tuple[int, ...],
    dtype: str,
    chunk: tuple[int, ...],
    codec: str = "crc32c",
    inner: tuple[int, ...] | None = None,
) -> ts.TensorStore:
    """Create an array of 3 or 4 of the named dimensions, its chunks being shards where an ``inner`` chunk is given.

    Raises ArrayError where something stands there already.
    """
    spec = _spec(shape, dtype, chunk, codec, inner)
    return _open({**spec, "kvstore": {"driver": "file", "path": f"{path}/"}}, path, create=True)


def described(shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]) -> dict[str, Any]:
    """Return what ``create_array`` writes into zarr.json, with checksums."""
    whole = {"zarr_format": 3, "node_type": "array", "chunk_key_encoding": {"name": "default"}}
    found: dict[str, Any] = {**whole, **_spec(shape, dtype, chunk, "crc32c", None)["metadata"]}
    return found


def _spec(
    shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...], codec: str, inner: tuple[int, ...] | None
) -> dict[str, Any]:
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, *_CODECS[codec]]
    if inner is not None:
        settings = {"chunk_shape": list(inner), "codecs": codecs}
        codecs = [{"name": "sharding_indexed", "configuration": settings}]
    return {
        "driver": "zarr3",
        "metadata": {
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "codecs": codecs,
            "dimension_names": list(DIMENSIONS[: len(shape)]),
            "fill_value": 0.0,
        },
        "store_data_equal_to_fill_value": True,
    }


def open_output(path: Path) -> ts.TensorStore:
    """Open an array made by ``create_array``, for reading: ``write_chunk`` goes past the handle. Raises ArrayError."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    return _open(spec, path, create=False)


def write(target: ts.TensorStore, values: np.ndarray) -> None:
    """Write whole chunks durably: on return they are fsynced. Raises OSError naming the file, or FullDiskError."""
    try:
        target.write(ts.array(values, copy=False), can_reference_source_data_indefinitely=True).result()
    except (ValueError, OSError) as error:
        raise _fault(error, f"{values.nbytes} bytes needed") or OSError(clean_message(error)) from error


@retrying
def read(target: ts.TensorStore) -> np.ndarray:
    """Read a slice. Raises ArrayError where a chunk is missing or damaged."""
    try:
        found: np.ndarray = target.read().result()
    except (ValueError, OSError) as error:
        raise ArrayError(clean_message(error)) from (system_error(error) or error)
    return found


def write_chunk(
    array: ts.TensorStore, cell: tuple[int, ...], values: np.ndarray, guard: Callable[[], object] | None = None
) -> None:
    """Store one chunk of an array with crc32c durably, itself and the directories to it: a chunk is seen whole or not.

    The last chunk of an axis is padded with zeros. ``guard`` is that of ``replace_file``. Raises OSError naming the
    file, or FullDiskError.
    """
    chunk = array.chunk_layout.write_chunk.shape
    assert chunk is not None
    values = values.reshape((1,) * (len(chunk) - values.ndim) + values.shape)
    if values.shape != tuple(chunk):
        values = np.pad(values, [(0, n - m) for n, m in zip(chunk, values.shape, strict=True)])
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    root, path = _chunk_path(array, cell)
    if not path.parent.resolve().is_relative_to(root.resolve()):
        raise OSError(errno.ELOOP, "a link leads out of the array; expected its own folder", str(path.parent))
    make_directory(path.parent)
    sweep(path.parent)
    replace_file(path, [data, crc32c(data).to_bytes(_CHECKSUM_BYTES, "little")], guard)


def chunk_is_whole(array: ts.TensorStore, cell: tuple[int, ...]) -> bool:
    """Return whether a chunk that ``write_chunk`` stored is there, as long as it was; its content is not read."""
    chunk = array.chunk_layout.write_chunk.shape
    assert chunk is not None
    try:
        found = _chunk_path(array, cell)[1].lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    wanted = math.prod(n or 0 for n in chunk) * array.dtype.numpy_dtype.itemsize + _CHECKSUM_BYTES
    return stat.S_ISREG(found.st_mode) and found.st_size == wanted


def _chunk_path(array: ts.TensorStore, cell: tuple[int, ...]) -> tuple[Path, Path]:
    """Return the folder of an array on disk, and the file of one of its chunks."""
    assert array.kvstore is not None
    root = Path(array.kvstore.path)
    return root, root.joinpath("c", *map(str, cell))


def holds_array(path: Path) -> bool:
    """Return whether an array was created here; a directory alone may be what a crash left of creating one."""
    return (path / METADATA).exists()


def _open(spec: dict[str, Any], path: Path, *, create: bool) -> ts.TensorStore:
    try:
        return ts.open(spec, context=context(), create=create, open=not create, read=True, write=create).result()
    except (ValueError, OSError) as error:
        raise _fault(error, str(path)) or ArrayError(f"{path}: {clean_message(error)}") from error


def _fault(error: Exception, what: str) -> OSError | None:
    """Return the system's error behind one of TensorStore's, FullDiskError where the disk is full."""
    found = system_error(error)
    full = found is not None and found.errno in (errno.ENOSPC, errno.EDQUOT)
    return FullDiskError(found.errno, f"disk full; {what}: {found.strerror}") if found and full else found
