"""A session of a run: problem -> plan -> check budgets -> compute -> report. In memory or durable."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import tensorstore as ts
import torch

from cqsa_stream.allocator import returning_freed_memory
from cqsa_stream.engine import Engine, Job
from cqsa_stream.errors import ArrayError, InputError, LockedError, MismatchError
from cqsa_stream.events import Ended, Observer, Started
from cqsa_stream.kernels import kernel_for
from cqsa_stream.machine import choose_device, free_budgets
from cqsa_stream.meter import HostPeak, Meter
from cqsa_stream.observers import EventLog, everyone
from cqsa_stream.planning import CHECKPOINT_EVERY_S, Options, plan_run, refuse_over_budget, refuse_what_is_not_there
from cqsa_stream.problem import Problem
from cqsa_stream.run import Manifest, RunDirectory
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.sinks import MemorySink, Sink, ZarrSink
from cqsa_stream.stopping import Stopper
from cqsa_stream.storage.arrays import TokenArray
from cqsa_stream.storage.fingerprint import fingerprint
from cqsa_stream.storage.output import create_array, holds_array, open_for_writing
from cqsa_stream.storage.partials import PartialStore

__all__ = ["Target", "run_in_memory", "run_on_disk"]


@dataclass(frozen=True)
class Target:
    """Where a durable run goes. ``lse`` None: into the run directory."""

    out: Path
    run_dir: Path
    lse: Path | None = None
    fresh: bool = False
    fill_missing: bool = False

    def disk(self, begun: bool) -> Path | None:
        """Return a place on the disk that the run will fill; None where that is several, or is emptied before."""
        places = [self.out, self.run_dir, *([self.lse] if self.lse else [])]
        there = {next(p for p in (path, *path.parents) if p.exists()).stat().st_dev for path in places}
        return None if len(there) > 1 or (begun and self.fresh) else self.out

    @classmethod
    def of(
        cls,
        out: str | Path,
        run_dir: str | Path | None,
        lse: str | Path | None = None,
        fresh: bool = False,
        fill_missing: bool = False,
    ) -> "Target":
        """The run directory is ``OUT.run`` beside the output where none is named."""
        path = Path(os.path.abspath(out))  # noqa: PTH100 - Path.absolute keeps ".."
        beside = path.with_name(path.name + ".run")
        directory = beside if run_dir is None else Path(os.path.abspath(run_dir))  # noqa: PTH100
        lse_path = None if lse is None else Path(os.path.abspath(lse))  # noqa: PTH100
        return cls(path, directory, lse_path, fresh, fill_missing)


@returning_freed_memory()
def run_in_memory(
    problem: Problem,
    arrays: dict[str, TokenArray],
    options: Options,
    observers: Sequence[Observer],
    *,
    with_lse: bool,
) -> MemorySink:
    """Compute into tensors; nothing is written anywhere. Raises BudgetError, and RunStopped at ``max_seconds``."""
    host = HostPeak()
    plan, device = plan_run(problem, arrays, options, durable=False)
    refuse_over_budget(plan)
    refuse_what_is_not_there(plan)
    _check(arrays)
    sink = MemorySink(problem, with_lse=with_lse)
    session = _Session(problem, plan, device, arrays, sink, None, host, options)
    session.run(everyone(observers), Stopper(()))
    return sink


@returning_freed_memory()
def run_on_disk(
    problem: Problem,
    arrays: dict[str, TokenArray],
    options: Options,
    target: Target,
    observers: Sequence[Observer],
    stop: Stopper,
) -> RunDirectory:
    """Begin a run, or resume it, to its end; a finished one is left as it is. Raises the errors of errors.py."""
    host = HostPeak()
    directory = RunDirectory(target.run_dir)
    options.check(problem)
    _refuse_overlap(target, arrays)
    if directory.begun and not target.fresh:
        _refuse_differences(directory.manifest(), directory, target, problem, options)
        _check(arrays)
        prints = _fingerprints(arrays)
        _refuse_changed_inputs(directory.manifest(), prints)
        if is_complete(directory):
            return directory
        with directory.locked():
            manifest = directory.manifest()
            options = _inherit(options, directory)
            plan, device = plan_run(
                problem, arrays, options, durable=True, grid=manifest.grid, out_tokens=manifest.out_tokens
            )
            refuse_over_budget(plan)
            refuse_what_is_not_there(plan)
            _durable_session(directory, manifest, plan, device, arrays, options, observers, stop, host)
        return directory
    _refuse_occupied(target, directory)
    plan, device = plan_run(problem, arrays, options, durable=True, out=target.disk(directory.begun))
    refuse_over_budget(plan)
    refuse_what_is_not_there(plan)
    _check(arrays)
    prints = _fingerprints(arrays)
    with directory.locked():
        if target.fresh:
            _discard(directory)
        elif directory.begun:
            raise LockedError(f"{directory.path}: another process has just begun this run; the same command resumes it")
        manifest = _manifest(problem, plan, arrays, prints, target)
        directory.begin(manifest)
        _durable_session(directory, manifest, plan, device, arrays, options, observers, stop, host)
    return directory


def is_complete(directory: RunDirectory) -> bool:
    """Return whether every row of the run is finished, by what is on disk."""
    manifest = directory.manifest()
    if not holds_array(directory.output_path(manifest)) or not holds_array(directory.lse_path(manifest)):
        return False
    store = directory.store(manifest)
    rows = sum(1 for a in range(manifest.rows.chunks) if manifest.rows.span(a))
    return all(
        sum(1 for _, cover in store.covers(lane) if cover is None) == rows for lane in range(manifest.problem.lanes)
    )


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
        stop.begin(self.options.max_seconds)
        with stop, _on(self.device):
            engine = Engine(
                Job(
                    problem=self.problem,
                    plan=self.plan,
                    arrays=self.arrays,
                    sink=self.sink,
                    store=self.store,
                    device=self.device,
                    kernel=kernel_for(self.device, getattr(torch, self.problem.dtype)),
                    stop=stop,
                    observer=observer,
                    meter=meter,
                    checkpoint_every_s=CHECKPOINT_EVERY_S if every is None else every,
                )
            )
            observer(Started(self.plan.to_dict(), meter.figures()))
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
) -> None:
    store = directory.store(manifest)
    store.prepare()
    out, lse = _output_arrays(directory, manifest, store)
    sink = ZarrSink(manifest.problem, out, lse, manifest.out_tokens)
    used = replace(
        options,
        device=str(device),
        device_memory=plan.device_allowed_bytes,
        host_memory=plan.host_allowed_bytes,
        schedule=plan.schedule,
    )
    log = EventLog(directory, asdict(used))
    session = _Session(manifest.problem, plan, device, arrays, sink, store, host, options)
    session.run(everyone((log, *observers)), stop)


def _output_arrays(
    directory: RunDirectory, manifest: Manifest, store: PartialStore
) -> tuple[ts.TensorStore, ts.TensorStore]:
    """Open the output and lse arrays, creating them where they are missing (their finished rows are then undone)."""
    problem, tokens = manifest.problem, manifest.out_tokens
    wanted = {
        directory.output_path(manifest): (problem.out_shape, problem.out_dtype, (1, 1, tokens, problem.value_dim)),
        directory.lse_path(manifest): (problem.out_shape[:3], "float32", (1, 1, manifest.rows.chunk_tokens)),
    }
    if not all(holds_array(path) for path in wanted):
        store.forget_finished(problem.lanes)
    opened = []
    for path, (shape, dtype, chunk) in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        array = open_for_writing(path) if holds_array(path) else create_array(path, shape, dtype, chunk)
        found = (tuple(array.shape), array.dtype.name, tuple(array.chunk_layout.write_chunk.shape or ()))
        if found != (shape, dtype, chunk):
            raise MismatchError(f"{path}: shape, dtype, chunks {found}; this run wrote {(shape, dtype, chunk)}")
        opened.append(array)
    return opened[0], opened[1]


def _manifest(
    problem: Problem, plan: Plan, arrays: dict[str, TokenArray], prints: dict[str, str], target: Target
) -> Manifest:
    lse = target.lse or target.run_dir / "lse.zarr"
    return Manifest(
        problem=problem,
        rows=plan.grid.rows,
        columns=plan.grid.columns,
        out_tokens=plan.layout.out_tokens,
        inputs={name: {"source": array.source, "fingerprint": prints[name]} for name, array in arrays.items()},
        output=os.path.relpath(target.out, target.run_dir),
        lse=os.path.relpath(lse, target.run_dir),
        fill_missing=target.fill_missing,
    )


def _check(arrays: dict[str, TokenArray]) -> None:
    for name, array in arrays.items():
        with _naming(name):
            array.check()


def _fingerprints(arrays: dict[str, TokenArray]) -> dict[str, str]:
    found = {}
    for name, array in arrays.items():
        with _naming(name):
            found[name] = fingerprint(array)
    return found


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say which of the arrays an error is about."""
    try:
        yield
    except ArrayError as error:
        raise ArrayError(f"{name}: {error}") from error


def _inherit(options: Options, directory: RunDirectory) -> Options:
    """Take what the user did not name from the last session, so that the same plan goes on: budgets as far as they are
    free now.
    """
    last = next((e.get("options") for e in reversed(directory.events()) if e.get("event") == "started"), None)
    if not isinstance(last, dict):
        return options
    names: tuple[str, ...] = ("device", "device_memory", "host_memory", "schedule", "checkpoint_every_s")
    if options.device is not None and options.device != last.get("device"):
        names = ("schedule", "checkpoint_every_s")  # budgets of another device say nothing
    taken = {name: last.get(name) for name in names if getattr(options, name) is None}
    free = free_budgets(choose_device(options.device or taken.get("device") or "auto"))
    for name, most in zip(("device_memory", "host_memory"), free, strict=True):
        had = taken.get(name)
        if most is not None and isinstance(had, int):
            taken[name] = min(had, most)
    return replace(options, **taken)


def _refuse_overlap(target: Target, arrays: dict[str, TokenArray]) -> None:
    places = {"output": target.out, "run directory": target.run_dir, **({"lse": target.lse} if target.lse else {})}
    for name, array in arrays.items():
        if array.source == "memory" or "://" in array.source:
            continue
        source = Path(array.source).resolve()
        for kind, path in places.items():
            if _nested(path, source):
                raise InputError(f"{kind} {path} overlaps the {name} array {source}; name another place")
    for (kind, path), (other, place) in combinations(places.items(), 2):
        if _nested(path, place) and path != target.run_dir / "lse.zarr" != place:
            raise InputError(f"{kind} {path} overlaps the {other} {place}; name another place")
    for kind, path in places.items():
        parent = next(p for p in path.parents if p.exists())
        if not parent.is_dir() or (path.is_symlink() and not path.exists()):
            raise InputError(f"{kind} {path}: {parent} is no directory, or the link leads nowhere; name another path")


def _nested(a: Path, b: Path) -> bool:
    a, b = a.resolve(), b.resolve()
    return a == b or a in b.parents or b in a.parents


def _refuse_occupied(target: Target, directory: RunDirectory) -> None:
    """Nothing that this run did not write is ever overwritten."""
    ours = set(_results(directory))
    if directory.path.exists() and not directory.path.is_dir():
        raise InputError(f"{directory.path} exists and is no directory; name another --run-dir")
    for path in (target.out, target.lse):
        if path is not None and path.exists() and path not in ours:
            raise InputError(f"{path} exists and is no result of the run in {directory.path}; name another path")
    if directory.path.exists() and not directory.begun:
        foreign = {p.name for p in directory.path.iterdir()} - {"lock", "run.json.tmp", "results.zarr"}
        if foreign:
            raise InputError(
                f"{directory.path} exists and holds no run but {sorted(foreign)[:3]}; name another --run-dir"
            )


def _results(directory: RunDirectory) -> list[Path]:
    """Return the output and lse of the run, as far as its manifest can be read."""
    try:
        manifest = directory.manifest()
    except InputError:
        return []
    return [directory.output_path(manifest), directory.lse_path(manifest)]


def _refuse_differences(
    manifest: Manifest, directory: RunDirectory, target: Target, problem: Problem, options: Options
) -> None:
    began, now = manifest.problem.to_dict(), problem.to_dict()
    differing = [f"{name} {began[name]} (now {now[name]})" for name in began if began[name] != now[name]]
    if options.chunks is not None and options.chunks != manifest.rows.chunks:
        differing.append(f"chunks {manifest.rows.chunks} (now {options.chunks})")
    if directory.output_path(manifest) != target.out:
        differing.append(f"output {directory.output_path(manifest)} (now {target.out})")
    if target.lse is not None and directory.lse_path(manifest) != target.lse:
        differing.append(f"lse {directory.lse_path(manifest)} (now {target.lse})")
    if differing:
        raise MismatchError(
            f"the run in {directory.path} began with {', '.join(differing)}; go on with what it began with, or name "
            "another output, or start anew with --fresh"
        )


def _refuse_changed_inputs(manifest: Manifest, prints: dict[str, str]) -> None:
    changed = [name for name, found in prints.items() if manifest.inputs[name]["fingerprint"] != found]
    if changed:
        raise MismatchError(
            f"{', '.join(changed)}: not the content that the run began with; bring the inputs back as they were, or "
            "start anew with --fresh"
        )


def _discard(directory: RunDirectory) -> None:
    """Remove what an earlier run left, its output included."""
    ours = (directory.path / name for name in ("lse.zarr", "partials", "results.zarr"))
    for path in {*_results(directory), *ours}:
        if path.exists():
            shutil.rmtree(path)
    for name in ("run.json", "events.jsonl", "session.json"):
        (directory.path / name).unlink(missing_ok=True)


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Make the device current; running out of its memory becomes a clear error."""
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"{device} has no memory left ({error}); the run is intact: take a smaller --device-memory"
        ) from error
