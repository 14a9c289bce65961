"""Single files as token arrays: .npy, .safetensors, plain files of numbers, and memory maps of them."""

import json
import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from cqsa_stream.storage.dtypes import DTYPES, numpy_dtype
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.readers.plain import RawArray, WholeFiles

__all__ = ["open_memmap", "open_npy", "open_plain", "open_safetensors", "refuse_lengths"]

_MOST_HEADER_BYTES = 100 << 20
_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def open_npy(path: Path) -> RawArray:
    """Open a .npy file. Raises ArrayError where it is none, is short, or is in Fortran order."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            offset = file.tell()
        refuse_lengths(shape)
    except Exception as error:  # numpy's parser lets many kinds through
        raise ArrayError(f"{path}: not a readable .npy file ({error})") from error
    if fortran or not dtype.isnative:
        raise ArrayError(f"{path}: Fortran order or foreign byte order; expected C order, little-endian")
    if dtype.kind == "V":
        raise ArrayError(f"{path}: dtype {dtype.str}; .npy has no name for bfloat16: store it as Zarr v3")
    if dtype.name not in DTYPES:
        raise ArrayError(f"{path}: dtype {dtype.name}; expected one of {', '.join(DTYPES)}")
    return RawArray(str(path), shape, dtype.name, WholeFiles.one(path, shape, dtype.name, offset))


def open_safetensors(path: Path, key: str = "") -> RawArray:
    """Open one tensor of a .safetensors file. Raises ArrayError, naming the tensors that there are."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_MOST_HEADER_BYTES, path.stat().st_size - 8):
                raise ValueError(f"a header of {length} bytes, longer than the file or than it may be")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if key not in tensors:
            found = ", ".join(sorted(tensors)[:8])
            raise ArrayError(f"{path}#{key}: no tensor of this name; name one of its {len(tensors)}: {found}")
        entry = tensors[key]
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        dtype = _SAFETENSORS.get(entry["dtype"])
        if dtype is None:
            raise ArrayError(f"{path}#{key}: dtype {entry['dtype']}; expected one of {', '.join(_SAFETENSORS)}")
        for lengths in (shape, (start,), (stop,)):
            refuse_lengths(lengths)
        if stop - start != math.prod(shape) * numpy_dtype(dtype).itemsize:
            raise ValueError(f"{stop - start} bytes for shape {shape} of {dtype}")
    except (KeyError, TypeError, AttributeError, ValueError, OSError, RecursionError) as error:
        if isinstance(error, ArrayError):
            raise
        raise ArrayError(f"{path}: not a readable .safetensors file ({error})") from error
    return RawArray(f"{path}#{key}", shape, dtype, WholeFiles.one(path, shape, dtype, 8 + length + start))


def open_plain(path: Path, description: str) -> RawArray:
    """Open a plain file of numbers, described as ``dtype:1,8,4096,64``. Raises ArrayError."""
    dtype, colon, lengths = description.partition(":")
    parts = lengths.split(",")
    if dtype not in DTYPES or not colon or not all(n.isdecimal() and len(n) < 19 for n in parts):
        raise ArrayError(
            f"{path}#{description}: a plain file needs a dtype and a shape, as {path.name}#bfloat16:1,8,4096,64"
        )
    shape = tuple(map(int, parts))
    try:
        refuse_lengths(shape)
    except ValueError as error:
        raise ArrayError(f"{path}#{description}: {error}") from error
    return RawArray(f"{path}#{description}", shape, dtype, WholeFiles.one(path, shape, dtype, 0))


def open_memmap(values: np.memmap) -> RawArray | None:
    """Return the file behind a memory map, or a part of one, that is C-ordered and cannot differ from it.

    Raises ArrayError where the file has shrunk: reading the map would end the process.
    """
    base = values
    while isinstance(base.base, np.memmap):
        base = base.base
    _refuse_shrunk(base)
    plain = values.flags.c_contiguous and values.dtype.isnative and values.dtype.name in DTYPES
    if values.filename is None or values.mode == "c" or not plain:
        return None
    path, offset = Path(str(values.filename)), base.offset + values.ctypes.data - base.ctypes.data
    if not _maps(values.ctypes.data, path, offset):
        return None
    if path.suffix == ".npy":
        try:
            whole = open_npy(path)
        except ArrayError:
            return None  # a view as another dtype, say
        same = (whole.shape, whole.dtype, whole.files.locate(())[1]) == (values.shape, values.dtype.name, offset)
        return whole if same else None
    if offset or path.suffix in (".safetensors", ".zip"):
        return None  # it has no name by which a resumed run could open it
    return open_plain(path, f"{values.dtype.name}:{','.join(map(str, values.shape))}")


def _refuse_shrunk(base: np.memmap) -> None:
    mapped = base.base
    if not isinstance(mapped, mmap.mmap):
        return
    try:
        size = mapped.size()  # of the file that is mapped, whatever its name is by now
    except (OSError, ValueError):
        return
    expected = base.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY + len(mapped)
    if size < expected:
        raise ArrayError(
            f"{base.filename}: {size} bytes; expected {expected}: truncated since it was mapped; write it again, and "
            "map it again"
        )


def _maps(address: int, path: Path, offset: int) -> bool:
    """Return whether memory at an address maps a file, from an offset on, that still has this name."""
    try:
        inode, name = path.stat().st_ino, os.fsencode(os.path.realpath(path)).replace(b"\n", b"\\012")
        with Path("/proc/self/maps").open("rb") as lines:  # start-end permissions offset device inode path
            for line in lines:
                span, _, position, _, number, *rest = line.rstrip(b"\n").split(None, 5)
                start, stop = (int(n, 16) for n in span.split(b"-"))
                if start <= address < stop:  # the path of a file that was replaced or deleted ends in " (deleted)"
                    at = int(position, 16) + address - start
                    return (int(number), rest, at) == (inode, [name], offset)
    except (OSError, ValueError):
        pass
    return False


def refuse_lengths(lengths: Any) -> None:
    """Raise ValueError where these are no lengths of an array's axes."""
    listed = isinstance(lengths, list | tuple) and all(type(n) is int and 0 <= n <= 2**62 for n in lengths)
    if not listed or math.prod(lengths) > 2**62:
        raise ValueError(f"lengths {str(lengths)[:80]}; expected whole numbers, of at most 2^62 elements")
