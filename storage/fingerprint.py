"""Fingerprints: a word for an array's identity, from its shape, dtype and content: all of it, or a sample of it.

Cells are read by several threads, and a CRC-32C of each goes into the hash: what is told apart are other inputs by
mistake, not by intent, and a hash of the content itself took longer than reading it.
"""

import hashlib
import math
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numpy as np
from crc32c import crc32c

from cqsa_stream.storage.contract import TokenArray
from cqsa_stream.storage.dtypes import numpy_dtype

__all__ = ["SMALL_BYTES", "fingerprint"]

_CELL_BYTES, _MOST_CELLS = 256 << 10, 128
_READ_BYTES = _CELL_BYTES * _MOST_CELLS  # so much is read, and all of an array that is no larger
SMALL_BYTES = 1 << 20  # what a read holds besides its place, where reading needs no planning
_THREADS = 4
_Cell = tuple[int, range, range]  # batch, heads, tokens


def fingerprint(array: TokenArray) -> str:
    """Hash shape, dtype and checksums of the content: all of up to 32 MiB; of more, 128 cells of 256 KiB spread evenly
    over it.

    Which cells, depends on shape and dtype alone: the same numbers stored in another way have the same fingerprint.
    Raises ArrayError where a cell cannot be read.
    """
    cells = list(_cells(array))
    threads = min(_THREADS, os.cpu_count() or 1)
    if array.encoding != "raw" or len(cells) > _MOST_CELLS:  # they would hold what they decode, or have little to do
        threads = 1
    array.begin(in_flight=1)  # of each thread: memory is not planned yet
    digest = hashlib.blake2b(f"{array.shape} {array.dtype}".encode(), digest_size=16)
    with ThreadPoolExecutor(threads, "cqsa-fingerprint") as pool:
        each = map if threads == 1 else pool.map
        for found in each(partial(_checksum, array, _Place()), cells):
            digest.update(found.to_bytes(4, "little"))
    return digest.hexdigest()


def _cells(array: TokenArray) -> Iterator[_Cell]:
    """Yield the cells that are hashed."""
    batch, heads, tokens, features = array.shape
    row_bytes = features * numpy_dtype(array.dtype).itemsize
    all_bytes = batch * heads * tokens * row_bytes
    pieces = min(tokens, -(-tokens * row_bytes // _CELL_BYTES))  # of one head
    together = 1 if pieces > 1 else max(1, min(heads, _CELL_BYTES // (tokens * row_bytes)))  # heads of a cell
    groups = -(-heads // together)
    for cell in _sample(batch * groups * pieces, None if all_bytes <= _READ_BYTES else _MOST_CELLS):
        lane, piece = divmod(cell, pieces)
        first = lane % groups * together
        span = range(tokens * piece // pieces, tokens * (piece + 1) // pieces)
        yield lane // groups, range(first, min(first + together, heads)), span


class _Place(threading.local):
    """A thread's memory for a cell: new pages for each would take longer than reading it."""

    bytes = np.empty(0, np.uint8)


def _checksum(array: TokenArray, own: _Place, cell: _Cell) -> int:
    batch, heads, tokens = cell
    shape, dtype = (len(heads), len(tokens), array.shape[3]), numpy_dtype(array.dtype)
    size = math.prod(shape) * dtype.itemsize
    if len(own.bytes) < size:
        own.bytes = np.empty(size, np.uint8)
    used = own.bytes[:size]
    array.read_into(batch, heads, tokens, used.view(dtype).reshape(shape))
    return crc32c(used.data)


def _sample(cells: int, most: int | None) -> list[int]:
    """Return all cells, or one of each of ``most`` equal parts: the first of the first, the last of the last."""
    if most is None or cells <= most:
        return list(range(cells))
    chance = random.Random(cells)
    bounds = [cells * part // most for part in range(most + 1)]
    inner = [chance.randrange(a, b) for a, b in pairwise(bounds[1:-1])]
    return [0, *inner, cells - 1]
