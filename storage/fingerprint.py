"""Fingerprints: a word for an array's identity, from its shape, dtype and content: all of it, or a sample of it."""

import hashlib
import random
from itertools import pairwise

import numpy as np

from cqsa_stream.storage.contract import TokenArray
from cqsa_stream.storage.dtypes import numpy_dtype

__all__ = ["fingerprint"]

_READ_BYTES = 32 << 20  # so much is read, and all of an array that is no larger
_CELL_BYTES = 256 << 10


def fingerprint(array: TokenArray) -> str:
    """Hash shape, dtype and content: all of up to 32 MiB; of more, 128 cells of 256 KiB spread evenly over it.

    Which cells, depends on shape and dtype alone: the same numbers stored in another way have the same fingerprint.
    Raises ArrayError where a cell cannot be read.
    """
    array.begin(in_flight=1)  # it is little, and memory is not planned yet
    batch, heads, tokens, features = array.shape
    dtype = numpy_dtype(array.dtype)
    row_bytes = features * dtype.itemsize
    all_bytes = batch * heads * tokens * row_bytes
    pieces = min(tokens, -(-tokens * row_bytes // _CELL_BYTES))  # of one head
    together = 1 if pieces > 1 else max(1, min(heads, _CELL_BYTES // (tokens * row_bytes)))  # heads of a cell
    groups = -(-heads // together)
    digest = hashlib.blake2b(f"{array.shape} {array.dtype}".encode(), digest_size=16)
    for cell in _sample(batch * groups * pieces, None if all_bytes <= _READ_BYTES else _READ_BYTES // _CELL_BYTES):
        lane, piece = divmod(cell, pieces)
        first = lane % groups * together
        chosen = range(first, min(first + together, heads))
        span = range(tokens * piece // pieces, tokens * (piece + 1) // pieces)
        place = np.empty((len(chosen), len(span), features), dtype)
        array.read_into(lane // groups, chosen, span, place)
        digest.update(place.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _sample(cells: int, most: int | None) -> list[int]:
    """Return all cells, or one of each of ``most`` equal parts: the first of the first, the last of the last."""
    if most is None or cells <= most:
        return list(range(cells))
    chance = random.Random(cells)
    bounds = [cells * part // most for part in range(most + 1)]
    inner = [chance.randrange(a, b) for a, b in pairwise(bounds[1:-1])]
    return [0, *inner, cells - 1]
