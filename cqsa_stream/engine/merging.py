"""Merging the partials of several shares: in the order of the shares, whoever computed them, so that bits agree."""

import torch

from cqsa_stream.engine.operation import Fields, Operation
from cqsa_stream.engine.sinks import Sink
from cqsa_stream.engine.stores import Store
from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.operands import Sum

__all__ = ["merge_shares"]


def merge_shares(grid: Grid, operation: Operation, store: Store, sink: Sink) -> None:
    """Finish every chunk that the shares together have completed. What two shares hold both counts as not done."""
    for number, sum_ in enumerate(operation.sums):
        by_rows = sum_.axis == "rows"
        axis = grid.rows if by_rows else grid.columns
        for lane, covers in enumerate(store.covers(number)):
            for chunk in range(axis.filled):
                complete = grid.complete_cover(chunk) if by_rows else grid.needing(chunk).bits
                if covers.get(chunk, 0) == complete:
                    _merge(operation, store, sink, (number, lane, chunk), len(axis.span(chunk)), complete)


def _merge(
    operation: Operation, store: Store, sink: Sink, at: tuple[int, int, int], tokens: int, complete: int
) -> None:
    """Merge and write one chunk; leave it where another engine has just done so."""
    sum_, cover = operation.sums[at[0]], 0
    merged = _identity(sum_, tokens)
    for share in store.shares(*at):
        part = _identity(sum_, tokens)
        found = store.of(share).load_into(*at, [field.numpy() for field in part])
        if found & cover:
            store.of(share).commit(*at, 0, [field.numpy() for field in _identity(sum_, tokens)])
        elif found:
            operation.merge(at[0], merged, part)
            cover |= found
    if cover == complete:
        operation.leave(at[0], at[1], merged)
        store.finish(*at, sink.write(*at, merged))


def _identity(sum_: Sum, tokens: int) -> Fields:
    return tuple(
        torch.full(field.shape(tokens), field.identity, dtype=getattr(torch, field.dtype)) for field in sum_.fields
    )
