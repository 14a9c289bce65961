"""Finishing a run without computing: what its shares have completed is merged, on the processor of this machine."""

import torch

from cqsa_stream.engine.merging import merge_shares
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.kernels.choose import chosen, fold_for, kernel_of
from cqsa_stream.machine.device import Host
from cqsa_stream.operations.forward import Forward
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.run.outputs import Results
from cqsa_stream.run.shares import Left
from cqsa_stream.storage.claims import forget

__all__ = ["finish_shares"]


def finish_shares(directory: RunDirectory, manifest: Manifest) -> list[int]:
    """Merge all that can be; return the shares that lack a pair. The caller holds the run. Raises InputError."""
    store, results = directory.store(manifest), Results(directory, manifest)
    store.guard = lambda: directory.is_run(manifest)
    store.prepare()
    results.prepare()
    for lane, row in results.missing():
        store.unfinish(0, lane, row)
    merge_shares(manifest.grid, _operation(manifest), store, results.sink(guard=store.guard))
    if results.complete:
        forget(directory.path)
        return []
    return [0] if manifest.chosen is None else Left(manifest, store.covers()).shares()


def _operation(manifest: Manifest) -> Forward:
    """Return the operation, to merge by: no pair is computed."""
    host, problem = Host(), manifest.problem
    stored = getattr(torch, problem.dtype)
    choice = chosen(host.torch, stored, None, None, 1, 1, problem.head_dim, problem.terms.of_kernels)
    kernel = kernel_of(choice, host.torch, stored)
    return Forward(problem, kernel.abilities.tile, kernel, fold_for(host.torch), host, Timeline(host))
