"""Masks as users name them: ``cqsa.masks.Documents([0, 4, 10]) & cqsa.masks.Window(8, 0)``.

With i the query's and j the key's absolute position (row i of the queries stands at ``q_start + i``), each says which
keys a query sees. ``&`` of two lets through what both let through. Rows that see no key give 0.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import torch

from cqsa_stream.errors import InputError
from cqsa_stream.schedulers.masks import blocks, chunked, dense, documents, listed, prefix
from cqsa_stream.schedulers.masks import strip as strips
from cqsa_stream.schedulers.masks import window as windows
from cqsa_stream.schedulers.masks.kinds import rule_of
from cqsa_stream.schedulers.masks.rule import Rule

__all__ = [
    "Bands", "Blocks", "Chunked", "Documents", "Prefix", "Rule", "Strip", "Window", "from_dense", "load", "numbers",
]  # fmt: skip

_ARRAYS = ("cu_seqlens", "bitmap", "bands", "runs")
_MOST_FILE_BYTES = 1 << 30
Arguments = ParamSpec("Arguments")


def _checked(kind: Callable[Arguments, Rule], *args: Arguments.args, **options: Arguments.kwargs) -> Rule:
    try:
        return kind(*args, **options)
    except (ValueError, OverflowError, TypeError) as error:
        raise InputError(f"mask: {error}") from error


def Documents(cu_seqlens: Any) -> Rule:
    """Return the mask in which i and j lie in the same ``[cu_seqlens[n], cu_seqlens[n + 1])``.

    ``cu_seqlens``: a list, array or tensor, or the path of a .npy or .json file. Raises InputError.
    """
    return _checked(documents.Documents, numbers(cu_seqlens))


def Chunked(size: int) -> Rule:
    """Return the mask in which ``i // size == j // size``. Raises InputError."""
    return _checked(chunked.Chunked, size)


def Prefix(length: int) -> Rule:
    """Return the mask in which ``j < length or j <= i``. Raises InputError."""
    return _checked(prefix.Prefix, length)


def Window(left: int | None = None, right: int | None = None) -> Rule:
    """Return the mask in which ``i - left <= j <= i + right``; None is unbounded. Raises InputError."""
    return _checked(windows.Window, left, right)


def Strip(strip: int, window: int) -> Rule:
    """Return the mask in which ``j <= i``, and ``j < strip or j > i - window`` (StreamingLLM). Raises InputError."""
    return _checked(strips.Strip, strip, window)


def Blocks(bitmap: Any, size: int) -> Rule:
    """Return the mask in which ``bitmap[i // size, j // size]``. Raises InputError."""
    return _checked(blocks.Blocks, numbers(bitmap), size)


def Bands(bands: Any) -> Rule:
    """Return the mask of disjoint bands ``(r0, r1, c0, c1, lo, hi)``: ``r0 <= i < r1``, ``c0 <= j < c1``, ``lo <= j - i
    <= hi`` of any of them; None is unbounded. Raises InputError.
    """
    return _checked(listed.Bands, numbers(bands))


def from_dense(seen: Any, first: int, shape: tuple[int, ...]) -> Rule:
    """Return the mask of a boolean tensor that is the same for all heads, as SDPA's ``attn_mask``: True is seen.

    It broadcasts to the shape [batch, heads, queries, keys]; its first row stands at position ``first``.
    Raises InputError.
    """
    known = isinstance(seen, torch.Tensor | np.ndarray) and str(seen.dtype) in ("bool", "torch.bool")
    if not known or (isinstance(seen, torch.Tensor) and (seen.is_sparse or seen.is_meta)):
        kind = str(getattr(seen, "dtype", type(seen).__name__)).removeprefix("torch.")
        raise InputError(
            f"attn_mask: found {kind}; expected booleans, True where a query sees a key. What is added to scores: "
            "-inf by a mask (mask=cqsa.masks...), ALiBi by alibi_slopes, a cap by soft_cap"
        )
    found = torch.as_tensor(seen)
    found = found.reshape(*(1,) * max(0, 2 - found.dim()), *found.shape)
    if found.dim() > 4 or any(n not in (1, m) for n, m in zip(found.shape[::-1], shape[::-1], strict=False)):
        raise InputError(f"attn_mask: shape {tuple(found.shape)}; expected {list(shape)}, or 1 for any of these")
    flat = found.reshape(-1, *found.shape[-2:])
    if not all(torch.equal(flat[0], other) for other in flat[1:]):
        raise InputError(
            "attn_mask: it differs between batches or heads; expected the same for all: call once for each of them"
        )
    matrix = flat[0].expand(shape[2:]).cpu().numpy()
    return _checked(dense.Dense.of, matrix, first)


def load(path: str | os.PathLike[str]) -> Rule:
    """Return the mask of a JSON file: ``{"kind": "chunked", "size": 8192}``, or a list of such, which are joined.

    Parameters are named as those of the masks; of arrays, a string is the path of a file beside it. Raises InputError.
    """
    place = Path(path)
    described = _read(place)
    parts = described if isinstance(described, list) else [described]
    if not all(isinstance(part, dict) for part in parts):
        raise InputError(f'{place}: expected an object like {{"kind": "chunked", "size": 8192}}, or a list of such')
    for part in parts:
        for name in set(part) & set(_ARRAYS):
            inside = place.parent / part[name] if isinstance(part[name], str) else part[name]
            part[name] = numbers(inside)
    try:
        return _checked(rule_of, parts)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def numbers(values: Any) -> Any:
    """Return what may be numbers as an array or a list: of a tensor, of a .npy or .json file."""
    if isinstance(values, str | os.PathLike):
        return _read(Path(values))
    if not isinstance(values, torch.Tensor):
        return values
    try:
        return np.asarray(values.detach().cpu().tolist())
    except (RuntimeError, TypeError) as error:
        raise InputError(f"a tensor of {values.dtype} on {values.device}: {error}; expected numbers") from error


def _read(path: Path) -> Any:
    """Return what a .npy or .json file holds. Raises InputError."""
    try:
        if path.stat().st_size > _MOST_FILE_BYTES:
            raise ValueError(f"over {_MOST_FILE_BYTES >> 20} MiB")
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r}: {reason}; expected a .npy file or JSON") from error
