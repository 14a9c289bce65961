"""The arrays with which a run began: compared with those that are named now, and found again."""

import os
from pathlib import Path

from cqsa_stream.command import Target
from cqsa_stream.errors import ArrayError, InputError, MismatchError
from cqsa_stream.inputs import fingerprints, naming
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.storage.contract import TokenArray
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.readers.locations import is_url

__all__ = ["refuse_changed_inputs", "refuse_other_inputs", "reopen_inputs"]


def refuse_other_inputs(target: Target, arrays: dict[str, TokenArray]) -> None:
    """Raise MismatchError where the target's run has begun with arrays of another shape or dtype."""
    directory = RunDirectory(target.run_dir)
    if target.fresh or not directory.begun:
        return
    problem = directory.manifest().problem
    for name, shape in problem.input_shapes.items():
        began, now = (shape, problem.dtype), (tuple(arrays[name].shape), arrays[name].dtype)
        if began != now:
            raise MismatchError(
                f"the run in {directory.path} began with {name} of shape {began[0]}, {began[1]}; it is {now[0]}, "
                f"{now[1]} now: bring it back as it was, name another output, or start anew with fresh=True"
            )


def refuse_changed_inputs(manifest: Manifest, prints: dict[str, str]) -> None:
    """Raise MismatchError where a fingerprint is not that of the array with which the run began. A run that ended
    before it had taken them has stored nothing.
    """
    changed = [name for name, found in prints.items() if manifest.inputs[name]["fingerprint"] not in ("", found)]
    if changed:
        raise MismatchError(
            f"{', '.join(changed)}: not the content that the run began with; bring the inputs back as they were, or "
            "start anew with fresh=True"
        )


def reopen_inputs(folder: Path, manifest: Manifest, *, fetch: bool) -> dict[str, TokenArray]:
    """Open the arrays that the run began with, where they were or beside the run directory.

    Raises ArrayError where they are not there, MismatchError where others are, InputError where one cannot be opened by
    a name, or is at a URL and not to be fetched.
    """
    places = {name: _places(folder, manifest, name, fetch=fetch) for name in ("query", "key", "value")}
    return {name: _first_that_is_it(manifest, name, found) for name, found in places.items()}


def _first_that_is_it(manifest: Manifest, name: str, places: list[str]) -> TokenArray:
    refused: Exception | None = None
    for place in dict.fromkeys(places):
        try:
            with naming(name):
                array = open_array(place, fill_missing=manifest.fill_missing, layout=manifest.layout)
            refuse_changed_inputs(manifest, fingerprints({name: array}))
        except ArrayError as error:
            refused = refused or error
        except MismatchError as error:
            refused = error
        else:
            return array
    assert refused is not None
    raise refused


def _places(folder: Path, manifest: Manifest, name: str, *, fetch: bool) -> list[str]:
    """Return where an input may be. Raises InputError where it cannot be opened by a name, or is not to be."""
    about = manifest.inputs[name]
    source = about["source"]
    if source == "memory":
        raise InputError("the run's inputs were in memory: call attention with the same tensors and out path")
    if is_url(source) and source.endswith("?"):
        raise InputError(f"{name}: {source}: the rest of the URL was not kept; name the inputs, with the same command")
    if is_url(source) and not fetch:
        raise InputError(
            f"{name}: {source} is fetched only where you say so, since anybody may have written this run "
            "directory: take fetch=True; or name the inputs, with the same command"
        )
    nearby = os.path.normpath(folder / about["beside"]) if about["beside"] else source
    return [source, nearby]
