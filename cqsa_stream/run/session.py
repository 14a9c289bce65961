"""A session of a run: problem -> plan -> check budgets -> compute -> report. In memory or durable."""

import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cqsa_stream.engine.loop import Engine, Job
from cqsa_stream.engine.meter import HostPeak, Meter
from cqsa_stream.engine.sinks import MemorySink, Sink
from cqsa_stream.errors import ArrayError, CqsaError, LockedError, RunStopped
from cqsa_stream.events import Ended, Observer, Started
from cqsa_stream.kernels.choose import fold_for
from cqsa_stream.machine.allocator import returning_freed_memory
from cqsa_stream.machine.budgets import choose_device, free_budgets
from cqsa_stream.machine.surroundings import undisturbed
from cqsa_stream.observers import EventLog, after, everyone
from cqsa_stream.planning import CHECKPOINT_EVERY_S, Options, plan_run, refuse_over_budget, refuse_what_is_not_there
from cqsa_stream.problem import Problem
from cqsa_stream.run.admission import (
    Target,
    check_inputs,
    fingerprints,
    refuse_changed_inputs,
    refuse_differences,
    refuse_occupied,
    refuse_other_inputs,
    refuse_overlap,
    refuse_strange_places,
    results,
)
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.run.outputs import (
    damaged_rows,
    is_complete,
    missing_rows,
    open_outputs,
    outputs_exist,
    outputs_locked,
    prepare_outputs,
)
from cqsa_stream.run.places import beside
from cqsa_stream.run.running_out import saying_how_much_disk, saying_what_ran_out
from cqsa_stream.run.stopping import Stopper
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.storage.open import TokenArray
from cqsa_stream.storage.partials import PartialStore

__all__ = ["run_in_memory", "run_on_disk"]

_log = logging.getLogger(__name__)


@saying_what_ran_out()
@undisturbed()
def run_in_memory(
    problem: Problem,
    arrays: dict[str, TokenArray],
    options: Options,
    observers: Sequence[Observer],
    *,
    with_lse: bool,
) -> MemorySink:
    """Compute into tensors; nothing is written anywhere. Raises BudgetError, and RunStopped at ``max_seconds``."""
    host, stop = HostPeak(), Stopper(max_seconds=options.max_seconds)
    counted = options.host_memory is not None  # else the process's allocator is left alone
    with returning_freed_memory() if counted else nullcontext():
        plan, device = plan_run(problem, arrays, options, durable=False)
        refuse_over_budget(plan)
        refuse_what_is_not_there(plan)
        check_inputs(arrays)
        sink = MemorySink(problem, plan.grid.rows, with_lse=with_lse)
        session = _Session(problem, plan, device, arrays, sink, None, host, options)
        try:
            session.run(everyone(observers), stop)
        except RunStopped as stopped:
            raise RunStopped(f"{stopped}; nothing is kept of a run in memory: give out to be able to go on") from None
    return sink


@saying_what_ran_out()
@undisturbed()
@returning_freed_memory()
def run_on_disk(
    problem: Problem,
    arrays: dict[str, TokenArray],
    options: Options,
    target: Target,
    observers: Sequence[Observer],
    stop: Stopper,
) -> RunDirectory:
    """Begin a run, or resume it, to its end; a finished one is left as it is. Raises the errors of errors.py.

    What is found damaged of a finished run's output is computed again.
    """
    host = HostPeak()
    directory = RunDirectory(target.run_dir)
    options.check(problem)
    refuse_overlap(target, arrays)
    try:
        if directory.begun and not target.fresh:
            _resume(directory, problem, arrays, options, target, observers, stop, host)
        else:
            _begin(directory, problem, arrays, options, target, observers, stop, host)
    except RunStopped as stopped:
        raise stop.error(str(stopped)) from None
    if not outputs_exist(directory, directory.manifest()):
        raise CqsaError(f"{target.out}: the output was removed during the run; the same command computes it again")
    return directory


def _begin(
    directory: RunDirectory,
    problem: Problem,
    arrays: dict[str, TokenArray],
    options: Options,
    target: Target,
    observers: Sequence[Observer],
    stop: Stopper,
    host: HostPeak,
) -> None:
    refuse_occupied(target, directory)
    plan, device = plan_run(problem, arrays, options, durable=True, out=target.disk(directory.begun))
    refuse_over_budget(plan)
    refuse_what_is_not_there(plan)
    check_inputs(arrays)
    prints = fingerprints(arrays)
    manifest = _manifest(problem, plan, arrays, prints, target)
    disk = saying_how_much_disk(directory, manifest, plan)
    with disk, directory.locked(), outputs_locked(directory, manifest):
        if target.fresh:
            _discard(directory, target)
        elif directory.begun:
            raise LockedError(f"{directory.path}: another process has just begun this run; the same command resumes it")
        else:
            refuse_occupied(target, directory)  # another run may have come here meanwhile
        directory.begin(manifest)
        _durable_session(directory, manifest, plan, device, arrays, options, observers, stop, host)


def _resume(
    directory: RunDirectory,
    problem: Problem,
    arrays: dict[str, TokenArray],
    options: Options,
    target: Target,
    observers: Sequence[Observer],
    stop: Stopper,
    host: HostPeak,
) -> None:
    refuse_other_inputs(target, arrays)
    manifest = directory.manifest()
    refuse_differences(manifest, directory, target, problem, options)
    refuse_strange_places(manifest, directory, (target.out, target.lse))
    check_inputs(arrays)
    refuse_changed_inputs(manifest, fingerprints(arrays))
    damaged = _damaged_of_complete(directory, stop)
    if damaged == []:
        directory.sweep()
        return
    with directory.locked(), outputs_locked(directory, manifest):
        manifest = directory.manifest()
        refuse_differences(manifest, directory, target, problem, options)  # another may have begun here meanwhile
        options = _inherit(options, directory)
        plan, device = plan_run(
            problem, arrays, options, durable=True, grid=manifest.grid, out_tokens=manifest.out_tokens
        )
        refuse_over_budget(plan)
        refuse_what_is_not_there(plan)
        with saying_how_much_disk(directory, manifest, plan):
            directory.restore(manifest)
            _durable_session(directory, manifest, plan, device, arrays, options, observers, stop, host, damaged or ())


def _damaged_of_complete(directory: RunDirectory, stop: Stopper) -> list[tuple[int, int]] | None:
    """Return (lane, row) of what is damaged of a complete run, as far as a time limit lets us look; of another, None.

    Raises RunStopped at a signal.
    """
    manifest = directory.manifest()
    if not is_complete(directory) or directory.damaged_manifests(manifest):
        return None
    damaged = []
    try:
        for lane, row, good in damaged_rows(directory, manifest):
            if not good:
                damaged.append((lane, row))
            reason = stop()
            if stop.received is not None:
                raise RunStopped(f"{reason}: the run is complete, but its output was not checked to the end")
            if reason is not None:
                _log.warning("%s: complete; the time limit ended the check, verify does it", directory.path)
                break
    except ArrayError:  # what describes the output
        return None
    return damaged


def _take_back(
    directory: RunDirectory, manifest: Manifest, store: PartialStore, damaged: Iterable[tuple[int, int]]
) -> None:
    """Let rows be computed again that are known to be damaged, or are not there as far as a bounded look tells."""
    for lane, row in {*damaged, *missing_rows(directory, manifest)}:
        _log.warning(
            "%s: what was written of row chunk %d of lane %d is damaged or gone; it is computed again",
            directory.output_path(manifest), row, lane,
        )  # fmt: skip
        store.unfinish(lane, row)


@dataclass(frozen=True)
class _Session:
    problem: Problem
    plan: Plan
    device: torch.device
    arrays: dict[str, TokenArray]
    sink: Sink
    store: PartialStore | None
    host: HostPeak
    options: Options

    def run(self, observer: Observer, stop: Stopper) -> None:
        """Run the engine between the events that open and close a session."""
        meter = Meter(self.problem, self.plan.grid, self.arrays, self.store, self.sink, self.device, self.host)
        every = self.options.checkpoint_every_s
        with stop, _on(self.device):
            engine = Engine(
                Job(
                    problem=self.problem,
                    plan=self.plan,
                    arrays=self.arrays,
                    sink=self.sink,
                    store=self.store,
                    device=self.device,
                    kernel=self.options.kernel_on(self.device, self.problem),
                    fold=fold_for(self.device),
                    stop=stop,
                    observer=observer,
                    meter=meter,
                    checkpoint_every_s=CHECKPOINT_EVERY_S if every is None else every,
                )
            )
            observer(Started(str(self.problem), self.plan.to_dict(), meter.figures()))
            reason = "done"
            try:
                engine.run()
            except BaseException as error:
                reason = f"{type(error).__name__}: {error}"
                raise
            finally:
                figures = meter.figures()
                observer(Ended(reason, figures, self.plan.predicted(), figures.measured()))


def _durable_session(
    directory: RunDirectory,
    manifest: Manifest,
    plan: Plan,
    device: torch.device,
    arrays: dict[str, TokenArray],
    options: Options,
    observers: Sequence[Observer],
    stop: Stopper,
    host: HostPeak,
    damaged: Iterable[tuple[int, int]] = (),
) -> None:
    store = directory.store(manifest)
    store.prepare()
    directory.sweep()
    prepare_outputs(directory, manifest)
    _take_back(directory, manifest, store, damaged)
    used = replace(
        options,
        device=str(device),
        device_memory=plan.device_allowed_bytes,
        host_memory=plan.host_allowed_bytes,
        schedule=plan.schedule,
    )
    log = EventLog(directory, asdict(used))
    sink = open_outputs(directory, manifest)
    session = _Session(manifest.problem, plan, device, arrays, sink, store, host, options)
    session.run(after(log, everyone(observers)), stop)


def _manifest(
    problem: Problem, plan: Plan, arrays: dict[str, TokenArray], prints: dict[str, str], target: Target
) -> Manifest:
    lse = target.lse or target.run_dir / "lse.zarr"
    return Manifest(
        problem=problem,
        rows=plan.grid.rows,
        columns=plan.grid.columns,
        out_tokens=plan.layout.out_tokens,
        inputs={
            name: {
                "source": array.source,
                "beside": beside(array.source, target.run_dir),
                "fingerprint": prints[name],
            }
            for name, array in arrays.items()
        },
        output=os.path.relpath(target.out, target.run_dir),
        lse=os.path.relpath(lse, target.run_dir),
        fill_missing=target.fill_missing,
        layout=target.layout,
    )


def _inherit(options: Options, directory: RunDirectory) -> Options:
    """Take what the user did not name from the last session, so that the same plan goes on: budgets as far as they are
    free now.
    """
    last = None
    for event in directory.events():
        last = event.get("options") if event.get("event") == "started" else last
    if not isinstance(last, dict):
        return options
    kinds: dict[str, Any] = {
        "device": str,
        "schedule": str,
        "kernel": str,
        "device_memory": int,
        "host_memory": int,
        "checkpoint_every_s": int | float,
    }
    last = {name: value for name, value in last.items() if name in kinds and isinstance(value, kinds[name])}
    names: tuple[str, ...] = ("device", "device_memory", "host_memory", "schedule", "kernel", "checkpoint_every_s")
    if options.device is not None and str(choose_device(options.device)) != last.get("device"):
        names = ("schedule", "checkpoint_every_s")  # budgets of another device say nothing
    taken = {name: last.get(name) for name in names if getattr(options, name) is None}
    free = free_budgets(choose_device(options.device or taken.get("device") or "auto"))
    for name, most in zip(("device_memory", "host_memory"), free, strict=True):
        had = taken.get(name)
        if most is not None and isinstance(had, int):
            taken[name] = min(had, most)
    return replace(options, **taken)


def _discard(directory: RunDirectory, target: Target) -> None:
    """Remove what an earlier run left, and of its results what the user named; the output's folder is held: emptied."""
    for path in {path for path in results(directory) if path in (target.out, target.lse) and path.is_dir()}:
        for part in path.iterdir():
            shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
    for path in (directory.path / name for name in ("lse.zarr", "partials", "results.zarr")):
        if path.exists():
            shutil.rmtree(path)
    for name in ("events.jsonl", "session.json", "run.copy.json", "run.json"):  # without the last, the rest is foreign
        (directory.path / name).unlink(missing_ok=True)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make the device current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
