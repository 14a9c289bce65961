"""Writing arrays that every Zarr reader opens: Zarr v3, crc32c, named dimensions, every chunk stored and fsynced."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from cqsa_stream.storage.errors import ArrayError, FullDiskError
from cqsa_stream.storage.tensorstore_array import clean_message, context

__all__ = ["DIMENSIONS", "create_array", "holds_array", "open_for_writing", "write"]

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
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, *_CODECS[codec]]
    if inner is not None:
        settings = {"chunk_shape": list(inner), "codecs": codecs}
        codecs = [{"name": "sharding_indexed", "configuration": settings}]
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
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
    return _open(spec, path, create=True)


def open_for_writing(path: Path) -> ts.TensorStore:
    """Open an array made by ``create_array``. Raises ArrayError."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    return _open(spec, path, create=False)


def write(target: ts.TensorStore, values: np.ndarray) -> None:
    """Write a whole slice durably: on return it is fsynced. Raises FullDiskError or OSError."""
    try:
        target.write(ts.array(values, copy=False), can_reference_source_data_indefinitely=True).result()
    except (ValueError, OSError) as error:
        message = clean_message(error)
        if "No space left" in message or "quota" in message.lower():
            raise FullDiskError(errno.ENOSPC, f"disk full; {values.nbytes} bytes more are needed: {message}") from error
        raise OSError(message) from error


def holds_array(path: Path) -> bool:
    """Return whether an array was created here; a directory alone may be what a crash left of creating one."""
    return (path / "zarr.json").exists()


def _open(spec: dict[str, Any], path: Path, *, create: bool) -> ts.TensorStore:
    try:
        return ts.open(spec, context=context(), create=create, open=not create, read=True, write=True).result()
    except (ValueError, OSError) as error:
        message = clean_message(error)
        if "No space left" in message:
            raise FullDiskError(errno.ENOSPC, f"disk full: {message}") from error
        raise ArrayError(f"{path}: {message}") from error
