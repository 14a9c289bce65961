"""Fingerprints: a cheap word for an array's identity, from its shape, dtype and a sample of its content."""

import hashlib
import random

import numpy as np

from cqsa_stream.storage.arrays import TokenArray
from cqsa_stream.storage.dtypes import numpy_dtype

__all__ = ["fingerprint"]

_SAMPLES = 18
_CELL_BYTES = 256 << 10


def fingerprint(array: TokenArray) -> str:
    """Hash shape, dtype and 18 cells of at most 256 KiB: first, last and 16 at random; all, where there are less.

    Raises ArrayError where one cannot be read.
    """
    array.begin(in_flight=1)  # it is little, and memory is not planned yet
    batch, heads, tokens, features = array.shape
    row_bytes = features * numpy_dtype(array.dtype).itemsize
    step = min(tokens, max(1, _CELL_BYTES // row_bytes))
    pieces = -(-tokens // step)
    digest = hashlib.blake2b(f"{array.shape} {array.dtype}".encode(), digest_size=16)
    buffer = np.empty((1, step, features), numpy_dtype(array.dtype))
    for cell in _sample(batch * heads * pieces):
        lane, piece = divmod(cell, pieces)
        span = range(piece * step, min((piece + 1) * step, tokens))
        head = lane % heads
        place = buffer[:, : len(span)]
        array.read_into(lane // heads, range(head, head + 1), span, place)
        digest.update(place.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _sample(cells: int) -> list[int]:
    if cells <= _SAMPLES:
        return list(range(cells))
    inner = random.Random(cells).sample(range(1, cells - 1), _SAMPLES - 2)
    return [0, *sorted(inner), cells - 1]
