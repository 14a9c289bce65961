"""Packed bands as flash attention takes them: sequences of rows that follow one another, each with keys of its own."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cqsa_stream.schedulers.masks.arrays import Bands64, band_at

__all__ = ["Sequences", "sequences"]


class Sequences(NamedTuple):
    """Where the rows of each sequence begin (and the last ends), where its keys begin, and how many are used; the most
    rows and keys of one; and how far every row sees to both sides, counted from the last row and key of its sequence.
    """

    rows: Tensor
    keys: Tensor
    used: Tensor
    most_rows: int
    most_keys: int
    left: int | None
    right: int | None


def sequences(bands: Bands64, rows: int, device: torch.device) -> Sequences:
    """Return the bands of so many rows as sequences; rows between bands are sequences without keys."""
    r0, r1, c0, c1, *_ = bands
    edges = np.unique(np.concatenate([[0, rows], r0, r1]))
    starts, lengths = np.zeros(len(edges), np.int64), np.zeros(len(edges) - 1, np.int64)
    place = np.searchsorted(edges, r0)
    starts[place], lengths[place] = c0, c1 - c0
    last = band_at(bands, bands.shape[1] - 1)  # all see equally far
    left = None if last.lo is None else last.c1 - last.r1 - last.lo
    right = None if last.hi is None else last.hi + last.r1 - last.c1
    its_rows, keys, used = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (edges, starts, lengths))
    return Sequences(its_rows, keys, used, int(np.diff(edges).max()), int(lengths.max()), left, right)
