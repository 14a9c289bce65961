"""Fingerprints: a word for an array's identity, from its shape, dtype and content: all of it, or a sample of it."""

import hashlib
import math
import random
from itertools import pairwise

import numpy as np

from cqsa_stream.storage.arrays import TokenArray
from cqsa_stream.storage.dtypes import numpy_dtype

__all__ = ["fingerprint"]

_READ_BYTES = 32 << 20  # about so much is read at most
_CELL_BYTES = 256 << 10
_LONG_CELL_BYTES = 4 << 20  # where a stored chunk has to be decoded whole
_LEAST_SAMPLES = 18


def fingerprint(array: TokenArray) -> str:
    """Hash shape, dtype and content: all of up to 32 MiB; of more, 18 to 128 cells spread evenly over it.

    A cell has 256 KiB, where stored chunks are compressed up to 4 MiB. Raises ArrayError where one cannot be read.
    """
    array.begin(in_flight=1)  # it is little, and memory is not planned yet
    batch, heads, tokens, features = array.shape
    row_bytes = features * numpy_dtype(array.dtype).itemsize
    stored_bytes = math.prod(array.stored_chunk) * numpy_dtype(array.dtype).itemsize
    cell_bytes = max(_CELL_BYTES, min(stored_bytes, _LONG_CELL_BYTES)) if _decoded(array) else _CELL_BYTES
    step = min(tokens, max(1, cell_bytes // row_bytes))
    pieces = -(-tokens // step)
    digest = hashlib.blake2b(f"{array.shape} {array.dtype}".encode(), digest_size=16)
    buffer = np.empty((1, step, features), numpy_dtype(array.dtype))
    for cell in _sample(batch * heads * pieces, _READ_BYTES // max(step * row_bytes, _fetched_bytes(array))):
        lane, piece = divmod(cell, pieces)
        span = range(piece * step, min((piece + 1) * step, tokens))
        head = lane % heads
        place = buffer[:, : len(span)]
        array.read_into(lane // heads, range(head, head + 1), span, place)
        digest.update(place.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _decoded(array: TokenArray) -> bool:
    return array.encoding == "compressed"


def _fetched_bytes(array: TokenArray) -> int:
    """Return what reading a cell somewhere fetches at least."""
    whole = math.prod(array.stored_chunk) * numpy_dtype(array.dtype).itemsize
    total = math.prod(array.shape) * numpy_dtype(array.dtype).itemsize
    return 0 if array.encoding == "raw" or total <= _READ_BYTES else whole


def _sample(cells: int, most: int) -> list[int]:
    """Return all cells, or one of each of ``most`` equal parts: the first of the first, the last of the last."""
    most = max(most, _LEAST_SAMPLES)
    if cells <= most:
        return list(range(cells))
    chance = random.Random(cells)
    bounds = [cells * part // most for part in range(most + 1)]
    inner = [chance.randrange(a, b) for a, b in pairwise(bounds[1:-1])]
    return [0, *inner, cells - 1]
