"""What masks and scores mean, in float64, pair by pair: written from their definitions, without bands or kernels.

Queries and keys are given by position: i is a query's, ``[q, 1]``, and j a key's, ``[k]``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cqsa_stream.scores import Terms

__all__ = ["lowered", "scored", "seen", "with_sinks"]

_LEAST, _MOST = -(2**63), 2**63 - 1


def seen(parts: list[dict[str, Any]], i: Tensor, j: Tensor) -> Tensor:
    """Return which keys queries see, ``[q, k]``, where a mask is joined of these parts."""
    found = torch.ones(len(i), len(j), dtype=torch.bool)
    for part in parts:
        found &= _DEFINITIONS[part["kind"]](part, i, j)
    return found


def nearest(i: Tensor, keys: int) -> Tensor:
    """Return the key, of so many, that is nearest to each query."""
    return i.clamp(0, keys - 1)


def scored(products: Tensor, terms: Terms, heads: Tensor, i: Tensor, j: Tensor, keys: int) -> Tensor:
    """Return the scores of scaled products ``[q, k]`` of queries of these heads, distances counted from that of the
    nearest of so many keys: far from all of them, float64 has no digits left for the differences.
    """
    scores = products
    if terms.soft_cap is not None:
        scores = terms.soft_cap * torch.tanh(scores / terms.soft_cap)
    if terms.alibi_slopes is not None:
        slopes = torch.tensor(terms.alibi_slopes, dtype=torch.float64)[heads]
        scores = scores - slopes[:, None] * ((i - j).abs() - (i - nearest(i, keys)).abs())
    return scores


def lowered(lse: Tensor, terms: Terms, heads: Tensor, i: Tensor, keys: int) -> Tensor:
    """Return the log-sum-exp of scores as they are, of that of scores from the nearest key on."""
    if terms.alibi_slopes is None:
        return lse
    slopes = torch.tensor(terms.alibi_slopes, dtype=torch.float64)[heads]
    return lse - slopes * (i - nearest(i, keys)).abs()[:, 0]


def with_sinks(lse: Tensor, terms: Terms, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp with the sinks of these heads, and by what the output is multiplied."""
    if terms.sinks is None:
        return lse, torch.ones_like(lse)
    whole = torch.logaddexp(lse, torch.tensor(terms.sinks, dtype=torch.float64)[heads])
    return whole, torch.exp(lse - whole)


def _documents(part: Mapping[str, Any], i: Tensor, j: Tensor) -> Tensor:
    starts = torch.tensor(part["cu_seqlens"])

    def number(position: Tensor) -> Tensor:
        """How many documents, empty ones too, begin at a position or before it."""
        return torch.searchsorted(starts, position.contiguous(), right=True)

    return (number(i) == number(j)) & (j >= starts[0]) & (j < starts[-1])


def _bands(part: Mapping[str, Any], i: Tensor, j: Tensor) -> Tensor:
    found = torch.zeros(len(i), len(j), dtype=torch.bool)
    bands = torch.tensor(part["bands"]).reshape(-1, 6)
    near = (bands[:, 0] <= i.max()) & (bands[:, 1] > i.min()) & (bands[:, 2] <= j.max()) & (bands[:, 3] > j.min())
    for r0, r1, c0, c1, lo, hi in bands[near].tolist():
        inside = (i >= r0) & (i < r1) & (j >= c0) & (j < c1)
        inside &= True if lo == _LEAST else j - i >= lo
        inside &= True if hi == _MOST else j - i <= hi
        found |= inside
    return found


def _blocks(part: Mapping[str, Any], i: Tensor, j: Tensor) -> Tensor:
    bitmap, size = torch.tensor(part["bitmap"]), part["size"]
    rows, columns = torch.div(i, size, rounding_mode="floor"), torch.div(j, size, rounding_mode="floor")
    inside = (rows >= 0) & (rows < len(bitmap)) & (columns >= 0) & (columns < bitmap.shape[1])
    return inside & bitmap[rows.clamp(0, len(bitmap) - 1), columns.clamp(0, bitmap.shape[1] - 1)]


def _dense(part: Mapping[str, Any], i: Tensor, j: Tensor) -> Tensor:
    found, runs = torch.zeros(len(i), len(j), dtype=torch.bool), torch.tensor(part["runs"]).reshape(-1, 3)
    for number, position in enumerate(i[:, 0].tolist()):
        first, last = torch.searchsorted(runs[:, 0].contiguous(), torch.tensor([position, position + 1])).tolist()
        for _, start, stop in runs[first:last].tolist():
            found[number] |= (j >= start) & (j < stop)
    return found


def _chunked(part: Mapping[str, Any], i: Tensor, j: Tensor) -> Tensor:
    return torch.div(i, part["size"], rounding_mode="floor") == torch.div(j, part["size"], rounding_mode="floor")


def _prefix(part: Mapping[str, Any], i: Tensor, j: Tensor) -> Tensor:
    found: Tensor = (j < part["length"]) | (j <= i)
    return found


def _strip(part: Mapping[str, Any], i: Tensor, j: Tensor) -> Tensor:
    found: Tensor = (j <= i) & ((j < part["strip"]) | (j > i - part["window"]))
    return found


def _window(part: Mapping[str, Any], i: Tensor, j: Tensor) -> Tensor:
    left, right = part["left"], part["right"]
    found = torch.ones(len(i), len(j), dtype=torch.bool)
    if left is not None:
        found &= i - j <= left
    if right is not None:
        found &= j - i <= right
    return found


_DEFINITIONS: dict[str, Callable[[Mapping[str, Any], Tensor, Tensor], Tensor]] = {
    "bands": _bands, "blocks": _blocks, "chunked": _chunked, "dense": _dense, "documents": _documents,
    "prefix": _prefix, "strip": _strip, "window": _window,
}  # fmt: skip
