"""Merging the partials of several shares: in the order of the shares, whoever computed them, so that bits agree."""

import torch

from cqsa_stream.engine.job import Job
from cqsa_stream.engine.operation import Fields
from cqsa_stream.schedulers.operands import Sum

__all__ = ["merge_shares"]


def merge_shares(job: Job) -> None:
    """Finish every chunk that the shares together have completed. What two shares hold both counts as not done."""
    grid = job.plan.grid
    for number, sum_ in enumerate(job.operation.sums):
        by_rows = sum_.axis == "rows"
        axis = grid.rows if by_rows else grid.columns
        for lane, covers in enumerate(job.store.covers(number)):
            for chunk, cover in covers.items():
                complete = grid.complete_cover(chunk) if by_rows else grid.needing(chunk).bits
                if cover == complete:
                    _merge(job, number, lane, chunk, len(axis.span(chunk)), complete)


def _merge(job: Job, number: int, lane: int, chunk: int, tokens: int, complete: int) -> None:
    """Merge and write one chunk; leave it where another engine has just done so."""
    sum_, cover = job.operation.sums[number], 0
    merged = _identity(sum_, tokens)
    for share in job.store.shares(number, lane, chunk):
        store = job.store.of(share)
        part = _identity(sum_, tokens)
        found = store.load_into(number, lane, chunk, [field.numpy() for field in part])
        if found & cover:
            store.commit(number, lane, chunk, 0, [field.numpy() for field in _identity(sum_, tokens)])
        elif found:
            job.operation.merge(number, merged, part)
            cover |= found
    if cover == complete:
        job.operation.leave(number, lane, merged)
        job.store.finish(number, lane, chunk, job.sink.write(number, lane, chunk, merged))


def _identity(sum_: Sum, tokens: int) -> Fields:
    return tuple(
        torch.full(field.shape(tokens), field.identity, dtype=getattr(torch, field.dtype)) for field in sum_.fields
    )
