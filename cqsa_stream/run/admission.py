"""What is looked at before a run begins or goes on: nothing is overwritten, and nothing mixed, that should not be."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from cqsa_stream.errors import ArrayError, InputError, MismatchError
from cqsa_stream.planning import Options
from cqsa_stream.problem import Problem
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.run.places import local_path
from cqsa_stream.storage.fingerprint import fingerprint
from cqsa_stream.storage.open import TokenArray
from cqsa_stream.storage.output import holds_array

__all__ = [
    "Target",
    "check_inputs",
    "fingerprints",
    "refuse_changed_inputs",
    "refuse_differences",
    "refuse_occupied",
    "refuse_other_inputs",
    "refuse_overlap",
    "refuse_strange_places",
    "results",
]


@dataclass(frozen=True)
class Target:
    """Where a durable run goes, and how its inputs are read. ``lse`` None: into the run directory."""

    out: Path
    run_dir: Path
    lse: Path | None = None
    fresh: bool = False
    fill_missing: bool = False
    layout: str = "bhtd"

    def disk(self, begun: bool) -> Path | None:
        """Return a place on the disk that the run will fill; None where that is several, or is emptied before."""
        places = [self.out, self.run_dir, *([self.lse] if self.lse else [])]
        there = {next(p for p in (path, *path.parents) if p.exists()).stat().st_dev for path in places}
        return None if len(there) > 1 or (begun and self.fresh) else self.out

    @classmethod
    def of(
        cls,
        out: str | os.PathLike[str],
        run_dir: str | os.PathLike[str] | None,
        lse: str | os.PathLike[str] | None = None,
        fresh: bool = False,
        fill_missing: bool = False,
        layout: str = "bhtd",
    ) -> "Target":
        """The run directory is ``OUT.run`` beside the output where none is named."""
        path = _place(out)
        beside = path.with_name(path.name + ".run")
        directory = beside if run_dir is None else _place(run_dir)
        return cls(path, directory, None if lse is None else _place(lse), fresh, fill_missing, layout)


def _place(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path without links in the folders that lead to it. Raises InputError where it names none."""
    whole = Path(os.path.abspath(local_path(path)))  # noqa: PTH100 - Path.absolute keeps ".."
    if not whole.name:
        raise InputError(f"{path}: no name for a file; expected a path like out.zarr")
    return Path(os.path.realpath(whole.parent), whole.name)


def refuse_other_inputs(target: Target, arrays: dict[str, TokenArray]) -> None:
    """Raise MismatchError where a run has begun with arrays of another shape or dtype."""
    directory = RunDirectory(target.run_dir)
    if target.fresh or not directory.begun:
        return
    problem = directory.manifest().problem
    for name, shape in problem.input_shapes.items():
        began, now = (shape, problem.dtype), (tuple(arrays[name].shape), arrays[name].dtype)
        if began != now:
            raise MismatchError(
                f"the run in {directory.path} began with {name} of shape {began[0]}, {began[1]}; it is {now[0]}, "
                f"{now[1]} now: bring it back as it was, name another output, or start anew with --fresh"
            )


def check_inputs(arrays: dict[str, TokenArray]) -> None:
    for name, array in arrays.items():
        with _naming(name):
            array.check()


def fingerprints(arrays: dict[str, TokenArray]) -> dict[str, str]:
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


def refuse_overlap(target: Target, arrays: dict[str, TokenArray]) -> None:
    places = {"output": target.out, "run directory": target.run_dir, **({"lse": target.lse} if target.lse else {})}
    for name, array in arrays.items():
        if array.source == "memory" or "://" in array.source:
            continue
        source = Path(os.path.realpath(array.source))
        for kind, path in places.items():
            if _nested(path, source):
                raise InputError(f"{kind} {path} overlaps the {name} array {source}; name another place")
    for (kind, path), (other, place) in combinations(places.items(), 2):
        if _nested(path, place) and (kind, other, place) != ("run directory", "lse", target.run_dir / "lse.zarr"):
            raise InputError(f"{kind} {path} overlaps the {other} {place}; name another place")
    for kind, path in places.items():
        parent = next(p for p in path.parents if p.exists())
        if not parent.is_dir() or (path.is_symlink() and not path.exists()):
            raise InputError(f"{kind} {path}: {parent} is no directory, or the link leads nowhere; name another path")


def _nested(a: Path, b: Path) -> bool:
    a, b = Path(os.path.realpath(a)), Path(os.path.realpath(b))
    return a == b or a in b.parents or b in a.parents


def refuse_occupied(target: Target, directory: RunDirectory) -> None:
    """Nothing that this run did not write is ever overwritten."""
    ours = set(results(directory))
    if directory.path.exists() and not directory.path.is_dir():
        raise InputError(f"{directory.path} exists and is no directory; name another --run-dir")
    for path in (target.out, target.lse):
        if path is not None and path.exists() and path not in ours and not _left_empty(path, directory):
            raise InputError(f"{path} exists and is no result of the run in {directory.path}; name another path")
    if directory.path.exists() and not directory.begun and (foreign := directory.foreign()):
        raise InputError(f"{directory.path} exists and holds no run but {foreign[:3]}; name another --run-dir")


def _left_empty(path: Path, directory: RunDirectory) -> bool:
    """Return whether this is an empty folder, made for a run that was killed, or held, before it began."""
    return directory.path.is_dir() and path.is_dir() and not any(path.iterdir())


def refuse_strange_places(manifest: Manifest, directory: RunDirectory, named: Iterable[Path | None]) -> None:
    """Raise InputError where nothing but a file's word says that output or lse belong where they would be created."""
    for path in (directory.output_path(manifest), directory.lse_path(manifest)):
        if path not in named and not path.is_relative_to(directory.path.parent) and not holds_array(path):
            raise InputError(
                f"{path}: no array is there, and it is not beside the run directory; name it, with the command or "
                "call that began the run, to have it created"
            )


def results(directory: RunDirectory) -> list[Path]:
    """Return the output and lse of the run, as far as its manifest can be read."""
    try:
        manifest = directory.manifest()
    except InputError:
        return []
    return [directory.output_path(manifest), directory.lse_path(manifest)]


def refuse_differences(
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


def refuse_changed_inputs(manifest: Manifest, prints: dict[str, str]) -> None:
    changed = [name for name, found in prints.items() if manifest.inputs[name]["fingerprint"] != found]
    if changed:
        raise MismatchError(
            f"{', '.join(changed)}: not the content that the run began with; bring the inputs back as they were, or "
            "start anew with --fresh"
        )
