"""Checking a run against float64: sampled rows of what is finished, computed anew from the inputs."""

import math
import os
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cqsa_stream.errors import CqsaError
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.masks.kinds import described
from cqsa_stream.scores import Terms
from cqsa_stream.storage.dtypes import numpy_dtype
from cqsa_stream.storage.open import TokenArray
from cqsa_stream.verification.definitions import lowered, scored, seen, with_sinks
from cqsa_stream.verification.found import Verification

__all__ = ["verify_rows"]

_BLOCK_TOKENS, _MOST_SCORES = 4_096, 2**20  # of a block: at least, and unless it is the least
_LEAST_WEIGHT, _SMALL_WEIGHT = 1e-46, 1e-37  # what float32 holds not at all, and in full
_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-9}
_MOST_THREADS = 8
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")
_TILE_ROUNDOFF = {**_ROUNDOFF, "float8_e4m3fn": 2.0**-11, "float8_e5m2": 2.0**-11}  # of a GPU kernel's result


@dataclass(frozen=True)
class _Reference:
    """Attention to some keys in float64, by rows: ``out`` and ``size``, the sum of the terms' magnitudes, are weighted
    by ``exp(score - highest)``, the weights add up to ``total``; ``largest`` is the largest magnitude of a score,
    ``not_finite`` the highest score of a key whose value is not finite in a feature.
    """

    out: Tensor
    size: Tensor
    total: Tensor
    highest: Tensor
    largest: Tensor
    not_finite: Tensor

    @classmethod
    def empty(cls, rows: int, value_dim: int) -> "_Reference":
        zeros = torch.zeros(rows, value_dim, dtype=torch.float64)
        none = torch.zeros(rows, dtype=torch.float64)
        unseen, never = torch.full_like(none, -torch.inf), torch.full_like(zeros, -torch.inf)
        return cls(zeros, zeros, none, unseen, none, never)

    @classmethod
    def of(cls, scores: Tensor, values: Tensor, sizes: Tensor) -> "_Reference":
        """``sizes``: the scores without what depends on distances, which is exact at any of them."""
        highest = scores.amax(1)
        weights = torch.exp(scores - highest.masked_fill(highest.isneginf(), 0.0)[:, None])
        finite = values.isfinite()
        never = torch.full((len(scores), values.shape[1]), -torch.inf, dtype=torch.float64)
        if not finite.all():
            for feature in (~finite).any(0).nonzero()[:, 0]:
                never[:, feature] = scores[:, ~finite[:, feature]].amax(1)
            values = values.masked_fill(~finite, 0.0)
        largest = sizes.abs().masked_fill(sizes.isinf(), 0.0).amax(1)
        return cls(weights @ values, weights @ values.abs(), weights.sum(1), highest, largest, never)

    def with_more(self, other: "_Reference") -> "_Reference":
        """Return attention to the keys of both."""
        highest = torch.maximum(self.highest, other.highest)
        shift = highest.masked_fill(highest.isneginf(), 0.0)
        a, b = torch.exp(self.highest - shift), torch.exp(other.highest - shift)
        return _Reference(
            self.out * a[:, None] + other.out * b[:, None],
            self.size * a[:, None] + other.size * b[:, None],
            self.total * a + other.total * b,
            highest,
            torch.maximum(self.largest, other.largest),
            torch.maximum(self.not_finite, other.not_finite),
        )

    def finished(self, terms: Terms, heads: Tensor, i: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (out, lse, cancellation, where a value of too little weight for float32 leaves any number right), with
        the sinks of these heads.
        """
        seen = self.total != 0
        out = torch.where(seen[:, None], self.out / self.total[:, None], 0.0)
        size = torch.where(seen[:, None], self.size / self.total[:, None], 0.0)
        lse = torch.where(seen, self.highest + self.total.log(), -torch.inf)
        share = torch.exp(self.not_finite - lse[:, None]).nan_to_num(0.0)
        lse, kept = with_sinks(lowered(lse, terms, heads, i, keys), terms, heads)
        out, size, share = out * kept[:, None], size * kept[:, None], share * kept[:, None]
        out = out.masked_fill(share > _SMALL_WEIGHT, torch.nan)
        cancellation = size.norm(dim=1) / out.nan_to_num(0.0, 0.0, 0.0).norm(dim=1).clamp_min(1e-300)
        return out, lse, torch.where(seen, cancellation, 1.0), (share > _LEAST_WEIGHT) & (share <= _SMALL_WEIGHT)


def verify_rows(
    problem: Problem,
    arrays: dict[str, TokenArray],
    out: TokenArray,
    lse_at: Callable[[int, int, int], float],
    finished: list[set[int]],
    axis: Axis,
    rows: int,
    seed: int,
    *,
    rounded_tiles: bool,
    damaged: int,
) -> Verification:
    """Compute ``rows`` sampled rows of the finished row chunks anew. ``lse_at(batch, head, row)``.

    ``damaged``: how many row chunks are known to be; where a sampled row cannot be read, CqsaError is raised.
    """
    errors, bounds, lse_errors, lse_scale, not_finite_rows = [], [], [0.0], 1.0, 0
    for lane, chosen in _sample(problem, finished, axis, rows, seed).items():
        reference = _reference(problem, arrays, lane, chosen)
        batch, heads, _ = problem.lane_heads(lane)
        of_rows = torch.tensor([heads[head] for head, _ in chosen])
        expected, expected_lse, cancellation, any_number = reference.finished(
            problem.terms, of_rows, _positions(problem, chosen), problem.keys
        )
        for index, (head, row) in enumerate(chosen):
            try:
                found = _read(out, batch, heads[head], range(row, row + 1))[0]
                stored = lse_at(batch, heads[head], row)
            except ValueError as error:
                raise CqsaError(
                    f"the output of the run cannot be read: {error}; the same run command computes it again"
                ) from error
            kept = torch.where(any_number[index], found, expected[index])
            wrong, not_finite = _compared(found, kept, getattr(torch, problem.out_dtype))
            not_finite_rows += not_finite
            errors.append(wrong)
            rounded = 2 * _TILE_ROUNDOFF[problem.dtype] if rounded_tiles else 0.0
            steps = 2 * _ROUNDOFF[problem.out_dtype] + rounded + _subnormal(expected[index], problem)
            scores = 2 * _ROUNDOFF[problem.partial_dtype] * (8.0 + _finite(float(reference.largest[index])))
            if problem.terms.alibi_slopes is not None:  # the reference rounds distances from the nearest key, too
                scores += 4 * _ROUNDOFF["float64"] * problem.terms.alibi_slopes[heads[head]] * problem.keys
            bounds.append(steps + (scores + rounded) * _finite(float(cancellation[index])))
            wanted = float(expected_lse[index])
            if stored != wanted and not (math.isnan(stored) and math.isnan(wanted)):  # two -inf are equal
                lse_errors.append(abs(stored - wanted))
                lse_scale = max(lse_scale, abs(wanted))
    worst_lse = max(lse_errors) if not any(e != e for e in lse_errors) else float("nan")
    lse_bound = (1e-5 if problem.dtype in ("float64", "float32") else 1e-3) * lse_scale
    ok = all(e <= b for e, b in zip(errors, bounds, strict=True)) and worst_lse <= lse_bound
    count = len(errors)
    return Verification(
        rows=count,
        max_relative_error=max(errors, default=0.0),
        mean_relative_error=sum(errors) / max(1, count),
        tolerance=max(bounds, default=0.0),
        lse_max_abs_error=worst_lse,
        damaged_rows=damaged,
        not_finite_rows=not_finite_rows,
        complete=sum(map(len, finished)) == problem.lanes * axis.filled,
        ok=ok and not damaged,
    )


def _compared(found: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[float, bool]:
    """Return a row's relative error, and whether its reference is not finite everywhere in the output's dtype."""
    unknown = ~expected.to(dtype).isfinite()
    expected = expected.masked_fill(unknown, 0.0)
    difference = torch.where(unknown, torch.where(found.isfinite(), torch.inf, 0.0), found - expected)
    return float(difference.norm()) / (float(expected.norm()) or 1.0), bool(unknown.any())


def _subnormal(expected: Tensor, problem: Problem) -> float:
    """Return by how much rounding to the smallest numbers may change a row, relative to it: each term, and the sum."""
    term, whole = (torch.finfo(getattr(torch, dtype)) for dtype in (problem.partial_dtype, problem.out_dtype))
    size = float(expected.nan_to_num(0.0, 0.0, 0.0).norm())
    error = expected.numel() ** 0.5 * (problem.keys * term.tiny * term.eps + whole.tiny * whole.eps)
    return error / size if size else 0.0


def _finite(number: float) -> float:
    """Return a factor of a bound; 1 where inputs that are not finite leave none."""
    return number if math.isfinite(number) else 1.0


def _sample(
    problem: Problem, finished: list[set[int]], axis: Axis, rows: int, seed: int
) -> dict[int, list[tuple[int, int]]]:
    """Return, by lane, (head within the group, query row) of rows drawn evenly from what is finished."""
    spans = [(lane, axis.span(chunk)) for lane, chunks in enumerate(finished) for chunk in sorted(chunks)]
    total = sum(len(span) for _, span in spans) * problem.group
    drawn = sorted(random.Random(seed).sample(range(total), min(rows, total)))
    chosen: dict[int, list[tuple[int, int]]] = defaultdict(list)
    start = 0
    remaining = iter([*drawn, None])
    number = next(remaining)
    for lane, span in spans:
        stop = start + len(span) * problem.group
        while number is not None and number < stop:
            head, offset = divmod(number - start, len(span))
            chosen[lane].append((head, span.start + offset))
            number = next(remaining)
        start = stop
    return chosen


def _positions(problem: Problem, chosen: list[tuple[int, int]]) -> Tensor:
    """Return where rows stand, ``[q, 1]``."""
    return torch.tensor([problem.q_start + problem.first_query + row for _, row in chosen])[:, None]


def _reference(problem: Problem, arrays: dict[str, TokenArray], lane: int, chosen: list[tuple[int, int]]) -> _Reference:
    batch, heads, (kv_head, *_) = problem.lane_heads(lane)
    first = problem.first_query
    queries = torch.cat(
        [_read(arrays["query"], batch, heads[h], range(row + first, row + first + 1)) for h, row in chosen]
    )
    positions = _positions(problem, chosen)
    of_rows, parts = torch.tensor([heads[h] for h, _ in chosen]), described(problem.rule)

    def of_block(block: tuple[Tensor, Tensor]) -> _Reference:
        j, sees = block
        tokens = range(int(j[0]), int(j[-1]) + 1)
        keys, values = (_read(arrays[name], batch, kv_head, tokens) for name in ("key", "value"))
        products = ((queries * problem.scale) @ keys.T).masked_fill(~sees, -torch.inf)
        scores = scored(products, problem.terms, of_rows, positions, j, problem.keys).masked_fill(~sees, -torch.inf)
        plain = scored(products, replace(problem.terms, alibi_slopes=None), of_rows, positions, j, problem.keys)
        return _Reference.of(scores, values, plain.masked_fill(~sees, -torch.inf))

    parts_of_it = _in_threads(of_block, _seen_blocks(problem, arrays, parts, positions))
    return reduce(_Reference.with_more, parts_of_it, _Reference.empty(len(chosen), problem.value_dim))


def _seen_blocks(
    problem: Problem, arrays: dict[str, TokenArray], parts: list[dict[str, Any]], positions: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of keys of which a query sees some: their positions ``[k]``, and which each query sees ``[q, k]``.

    A block is a stored chunk, which is read whole, where its scores do not take too much memory.
    """
    stored = max(arrays[name].stored_chunk[2] for name in ("key", "value"))
    size = max(_BLOCK_TOKENS, min(stored, _MOST_SCORES // len(positions)))
    for start in range(0, problem.keys, size):
        j = torch.arange(start, min(start + size, problem.keys))
        sees = seen(parts, positions, j)
        if sees.any():
            yield j, sees


def _in_threads(compute: Callable[[_Item], _Found], items: Iterator[_Item]) -> Iterator[_Found]:
    """Yield what is computed of each item, in order, by as many threads as may work at a time."""
    count, inside = min(_MOST_THREADS, len(os.sched_getaffinity(0))), torch.get_num_threads()
    torch.set_num_threads(1)  # those of each thread's own would be too many
    try:
        with ThreadPoolExecutor(count) as threads:
            coming: deque[Future[_Found]] = deque()
            for item in items:
                coming.append(threads.submit(compute, item))
                if len(coming) > count:
                    yield coming.popleft().result()
            yield from (future.result() for future in coming)
    finally:
        torch.set_num_threads(inside)


def _read(array: TokenArray, batch: int, head: int, tokens: range) -> Tensor:
    buffer = np.empty((1, len(tokens), array.shape[3]), numpy_dtype(array.dtype))
    array.read_into(batch, range(head, head + 1), tokens, buffer)
    return torch.from_numpy(buffer[0].astype(np.float64))
