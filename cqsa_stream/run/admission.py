"""What is looked at before a run begins or goes on: nothing is overwritten, and nothing mixed, that should not be."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import combinations
from pathlib import Path

from cqsa_stream.command import Command, Target
from cqsa_stream.errors import InputError, MismatchError
from cqsa_stream.options import Options
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.schedulers.schedules import AUTO
from cqsa_stream.storage.open import TokenArray
from cqsa_stream.storage.output import holds_array

__all__ = ["refuse_differences", "refuse_occupied", "refuse_overlap", "refuse_strange_places", "results"]


def refuse_overlap(target: Target, arrays: dict[str, TokenArray]) -> None:
    """Raise InputError where one of the places is within another, or cannot be."""
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
        raise InputError(f"{directory.path} exists and is no directory; name another run_dir")
    for path in (target.out, target.lse):
        if path is not None and path.exists() and path not in ours and not _left_empty(path, directory):
            raise InputError(f"{path} exists and is no result of the run in {directory.path}; name another path")
    if directory.path.exists() and not directory.begun and (foreign := directory.foreign()):
        raise InputError(f"{directory.path} exists and holds no run but {foreign[:3]}; name another run_dir")


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
        manifest = directory.manifest(discarded=not directory.begun)
    except InputError:
        return []
    return [directory.output_path(manifest), directory.lse_path(manifest)]


def _fixed(manifest: Manifest, options: Options) -> Iterator[tuple[str, str, str | None]]:
    """Yield (what, as it began, as it is named now) of what shares fix."""
    if manifest.chosen is not None:
        for name in ("schedule", "kernel"):
            named = getattr(options, name)
            yield name, getattr(manifest.chosen, name), None if named == AUTO else named


def refuse_differences(manifest: Manifest, directory: RunDirectory, command: Command) -> None:
    """Raise MismatchError where a command asks for another problem, grid or place than the run began with."""
    problems = manifest.problem, command.problem
    differing = [
        f"{field.name} {began or 'none'} (now {now or 'none'}{', other places or numbers' * (str(began) == str(now))})"
        for field in fields(manifest.problem)
        if field.compare
        for began, now in [[getattr(problem, field.name) for problem in problems]]
        if began != now
    ]
    target, chunks = command.target, command.options.chunks
    assert target is not None
    for name, found, named in (
        ("chunks", manifest.rows.chunks, chunks),
        ("shares", manifest.shares, command.options.shares),
        ("output", directory.output_path(manifest), target.out),
        ("lse", directory.lse_path(manifest), target.lse),
        *_fixed(manifest, command.options),
    ):
        if named is not None and named != found:
            differing.append(f"{name} {found} (now {named})")
    if differing:
        raise MismatchError(
            f"the run in {directory.path} began with {', '.join(differing)}; go on with what it began with, or name "
            "another output, or start anew with fresh=True"
        )
