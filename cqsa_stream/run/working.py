"""A worker of a run that somebody has begun: ``cqsa work``."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import cuda

from cqsa_stream.command import Command
from cqsa_stream.errors import InputError
from cqsa_stream.events import Observer
from cqsa_stream.machine.surroundings import undisturbed
from cqsa_stream.run.admission import refuse_strange_places
from cqsa_stream.run.inputs import reopen_inputs
from cqsa_stream.run.opened import Run
from cqsa_stream.run.outputs import Results
from cqsa_stream.run.session import Session
from cqsa_stream.run.sharing import AtWork
from cqsa_stream.run.stopping import Stopper
from cqsa_stream.storage.claims import forget

__all__ = ["place_of", "work"]

_PLACES = (  # (variables of this worker's number, of their count, of its number on its machine)
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun's first: it may run within a task of an array
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_LOCALID"),
)


def place_of(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return (number, count) of "I/N", or of what Slurm or torchrun say: 0 of 1 where they say nothing.

    Slurm's numbers may begin anywhere. Raises InputError.
    """
    if text is None:
        for number, count, _ in _PLACES:
            if number in environment and count in environment:
                first = environment.get("SLURM_ARRAY_TASK_MIN", "0") if number.startswith("SLURM") else "0"
                step = environment.get("SLURM_ARRAY_TASK_STEP", "1") if number.startswith("SLURM") else "1"
                try:
                    place = (int(environment[number]) - int(first)) // max(1, int(step))
                    return place % int(environment[count]), int(environment[count])
                except (ValueError, ZeroDivisionError) as error:
                    raise InputError(f"{number} and {count}: {error}; name the worker, as worker=0/4") from error
        return 0, 1
    first, slash, second = text.partition("/")
    if not (slash and first.isascii() and first.isdigit() and second.isascii() and second.isdigit()):
        raise InputError(f"worker {text!r}; expected I/N, as 0/4")
    if not int(first) < int(second) <= 10**6:
        raise InputError(f"worker {text!r}; expected a number from 0 to {int(second) - 1}, of at most a million")
    return int(first), int(second)


def work(
    path: Path,
    place: tuple[int, int],
    observers: Sequence[Observer],
    stop: Stopper,
    *,
    device: str | None = None,
    max_seconds: float | str | None = None,
    fetch: bool = False,
) -> Run:
    """Compute shares of the run until it is complete; a run of one share is resumed. Raises as ``attention`` does.

    ``place``: (number, count) of this worker. ``device``: that kind of the run's devices which is this worker's turn,
    where None. ``fetch``: whether inputs at URLs are fetched.
    """
    run, (worker, workers) = Run(path), place
    if run.manifest.shares == 1:
        return run.resume(observers, max_seconds, fetch=fetch, stop=stop)
    directory, manifest = run.directory, run.manifest
    if Results(directory, manifest).complete:  # whether or not the inputs are still there
        forget(directory.path)
        return run
    refuse_strange_places(manifest, directory, ())
    state = directory.state(manifest.problem)
    options = replace(
        state.options, device=device or _device(state.options.device or "cpu", worker), max_seconds=max_seconds
    )
    with undisturbed():
        arrays = reopen_inputs(directory.path, manifest, fetch=fetch)
    command = Command(arrays, manifest.problem, options)
    Session(command, AtWork(directory, manifest, options, worker, workers), observers, stop).run()
    return run


def _device(began: str, worker: int) -> str:
    """Return this worker's device, of the kind with which the run began."""
    if not began.startswith("cuda"):
        return began
    here = next((os.environ[local] for _, _, local in _PLACES if local in os.environ), str(worker))
    return f"cuda:{int(here) % max(1, cuda.device_count())}" if here.isdigit() else "cuda:0"
