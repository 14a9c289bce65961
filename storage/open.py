"""Opening anything that holds tokens: paths, URLs, zarr and TensorStore arrays, numpy arrays, torch tensors."""

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from cqsa_stream.storage.contract import LAYOUTS, TokenArray
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.readers.locations import is_url, kvstore, local_name, without_secrets
from cqsa_stream.storage.readers.memory import MemoryArray, refuse_special
from cqsa_stream.storage.readers.plain import RawArray
from cqsa_stream.storage.readers.shape import Shape
from cqsa_stream.storage.readers.single_files import open_memmap, open_npy, open_plain, open_safetensors, refuse_lengths
from cqsa_stream.storage.readers.token_major import token_major
from cqsa_stream.storage.readers.zarr_plain import raw_zarr

__all__ = ["LAYOUTS", "TokenArray", "open_array"]

_ZARR = ("zarr.json", ".zarray", ".zgroup")
_log = logging.getLogger(__name__)


def open_array(source: Any, *, fill_missing: bool = False, layout: str = "bhtd") -> TokenArray:
    """Open for reading. Raises ArrayError saying what was found and what can be opened.

    ``fill_missing`` reads stored chunks that are missing as the array's fill value instead of refusing them.
    ``layout``: the order of the source's axes; "bthd" is [batch, token, head, feature]. What is returned is always
    [batch, head, token, feature].
    """
    if layout not in LAYOUTS:
        raise ArrayError(f"layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
    how = _How(fill_missing=fill_missing, token_major=layout == "bthd")
    if isinstance(source, Shape):
        batch, heads, tokens, features = source.shape
        return Shape((batch, tokens, heads, features), source.dtype) if how["token_major"] else source
    if isinstance(source, str | os.PathLike):
        return _open_named(str(source) if isinstance(source, str | Path) else os.fsdecode(source), how)
    if isinstance(source, np.ndarray):
        refuse_special(source)
        file = open_memmap(source) if isinstance(source, np.memmap) else None
        return MemoryArray(source, token_major=how["token_major"]) if file is None else _presented(file, how)
    if _is_a(source, "torch", "Tensor"):
        return MemoryArray.of_tensor(source, token_major=how["token_major"])
    if _is_a(source, "tensorstore", "TensorStore"):
        from cqsa_stream.storage.readers.tensorstore import TensorStoreArray

        return TensorStoreArray.of_store(source, **how)
    if _is_a(source, "zarr", "Array"):
        from cqsa_stream.storage.readers.zarr_array import ZarrArray, folder_of

        folder = folder_of(source)
        return ZarrArray(source, **how) if folder is None else _open_path(folder, how)
    raise ArrayError(
        f"found a {type(source).__module__.partition('.')[0]}.{type(source).__name__}; expected a path or URL, a "
        "zarr.Array, a tensorstore.TensorStore, a numpy array or a torch tensor"
    )


class _How(TypedDict):
    """How an array is to be opened."""

    fill_missing: bool
    token_major: bool


def _is_a(source: Any, package: str, name: str) -> bool:
    """Return whether a source is of a package's class or one derived from it, without importing the package."""
    return any(kind.__name__ == name and kind.__module__.partition(".")[0] == package for kind in type(source).__mro__)


def _presented(file: RawArray, how: _How) -> TokenArray:
    return token_major(file) if how["token_major"] else file


def _open_named(source: str, how: _How) -> TokenArray:
    """Open a path, a URL, or ``file#part``: a tensor of a .safetensors file, a plain file's dtype and shape."""
    from cqsa_stream.storage.readers.tensorstore import TensorStoreArray

    literal = local_name(source)
    home = [os.path.expanduser(literal)] if literal.startswith("~") else []  # noqa: PTH111 - Path raises for some
    paths = [Path(name).absolute() for name in (literal, *home)]
    for path in paths:
        if _is(path, Path.exists):
            return _open_path(path, how)
    for path in paths:
        pieces = str(path).split("#")  # either side may hold more of them
        for count in range(1, len(pieces)):
            file, part = Path("#".join(pieces[:count])), "#".join(pieces[count:])
            if _is(file, Path.is_file):
                opened = open_safetensors(file, part) if file.suffix == ".safetensors" else open_plain(file, part)
                return _presented(opened, how)
    if is_url(literal) and not literal.startswith("/"):
        name = without_secrets(source)
        if name != source:
            _log.warning("%s: the credentials in the URL are not kept; give it with them whenever it is read", name)
        return TensorStoreArray.open(name, kvstore(source), **how)
    raise ArrayError(f"{paths[-1]}: no such file or directory")


def _is(path: Path, what: Callable[[Path], bool]) -> bool:
    try:
        return what(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False  # no file has such a name; a URL may
        raise ArrayError(f"{path}: {error.strerror}") from error


def _open_path(path: Path, how: _How) -> TokenArray:
    from cqsa_stream.storage.readers.tensorstore import TensorStoreArray

    if path.is_file():
        if path.suffix in (".npy", ".safetensors"):
            return _presented(open_npy(path) if path.suffix == ".npy" else open_safetensors(path), how)
        if path.suffix == ".zip":
            base = {"driver": "file", "path": str(path)}
            return TensorStoreArray.open(str(path), {"driver": "zip", "base": base, "path": ""}, **how)
        raise ArrayError(
            f"{path}: a file that is no .npy, .safetensors or .zip; expected one of them, a Zarr array (a directory), "
            f"or a plain file of numbers named with its dtype and shape, as {path.name}#bfloat16:1,8,4096,64"
        )
    files = {"driver": "file", "path": f"{path}/"}
    try:
        if not any((path / name).is_file() for name in _ZARR) and (path / "attributes.json").is_file():  # N5
            return TensorStoreArray.open(str(path), files, **how)
        metadata = _zarr_metadata(path)
    except OSError as error:
        raise ArrayError(f"{path}: {error.strerror}") from error
    raw = None if how["fill_missing"] or how["token_major"] else raw_zarr(path, metadata)
    both = all((path / name).is_file() for name in _ZARR[:2])  # then zarr-python too takes the newer format
    return raw or TensorStoreArray.open(str(path), files, **how, driver="zarr3" if both else "auto")


def _zarr_metadata(path: Path) -> dict[str, Any]:
    """Return what describes the array stored in a directory, checked so far as to be believed."""
    name = next((name for name in _ZARR if (path / name).is_file()), None)
    if name is None:
        raise ArrayError(f"{path}: no array (neither zarr.json nor .zarray inside); expected a Zarr v2 or v3 array")
    try:
        metadata = json.loads((path / name).read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise ArrayError(f"{path / name}: unreadable ({error}); expected JSON that describes an array") from error
    if not isinstance(metadata, dict) or metadata.get("node_type", "array") != "array" or name == ".zgroup":
        raise ArrayError(f"{path}: a Zarr group, not an array; name an array inside it")
    try:
        refuse_lengths(metadata.get("shape"))
    except ValueError as error:
        raise ArrayError(f"{path / name}: {error}") from error
    return metadata
