"""The results of a run on disk: made, opened, held by one process, and checked against what was written."""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cqsa_stream.engine.sinks import ZarrSink
from cqsa_stream.errors import LockedError, MismatchError
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.storage.atomic import make_directory, open_regular
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.output import METADATA, create_array, described, holds_array, open_output

__all__ = [
    "damaged_rows",
    "is_complete",
    "missing_rows",
    "open_outputs",
    "outputs_exist",
    "outputs_locked",
    "prepare_outputs",
]

_MOST_METADATA_BYTES = 1 << 20
_LOOKED_AT_BYTES = 64 << 20
_log = logging.getLogger(__name__)


def prepare_outputs(directory: RunDirectory, manifest: Manifest) -> None:
    """Create the output and lse arrays where they are missing, or what describes them is damaged."""
    for path, expected in _wanted(directory, manifest).items():
        make_directory(path)
        if holds_array(path) and (wrong := _misdescribed(path, expected)):
            (path / METADATA).replace(path / (METADATA + ".damaged"))
            _log.warning("%s; it is set aside and written again", wrong)
        if not holds_array(path):
            create_array(path, *expected)


def _wanted(directory: RunDirectory, manifest: Manifest) -> dict[Path, tuple[tuple[int, ...], str, tuple[int, ...]]]:
    """Return shape, dtype and chunks of the output and lse arrays, by their paths."""
    problem, tokens = manifest.problem, manifest.out_tokens
    return {
        directory.output_path(manifest): (problem.out_shape, problem.out_dtype, (1, 1, tokens, problem.value_dim)),
        directory.lse_path(manifest): (problem.out_shape[:3], "float32", (1, 1, manifest.rows.chunk_tokens)),
    }


def _misdescribed(path: Path, expected: tuple[tuple[int, ...], str, tuple[int, ...]]) -> str:
    """Return what is wrong with an array's zarr.json, if anything is: all of it is known.

    Raises MismatchError where it describes another array: that may be somebody's, in the place of ours.
    """
    file = path / METADATA
    with open_regular(file) as opened:
        data = opened.read(_MOST_METADATA_BYTES)
    wanted = described(*expected)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        return f"{file}: damaged ({error})"
    if found == wanted:
        return ""
    for name in ("shape", "data_type", "chunk_grid"):
        if isinstance(found, dict) and found.get("zarr_format") == 3 and name in found and found[name] != wanted[name]:
            raise MismatchError(
                f"{file}: {name} {str(found[name])[:80]}; this run wrote {wanted[name]}. Is this another array? Move "
                "it away. Is it the run's own, damaged? Remove zarr.json: it is written again"
            )
    return f"{file}: damaged (not what was written)"


def open_outputs(directory: RunDirectory, manifest: Manifest) -> ZarrSink:
    """Open both arrays. Raises ArrayError where they are missing, or not described as they must be."""
    for path, expected in _wanted(directory, manifest).items():
        if holds_array(path) and (wrong := _misdescribed(path, expected)):
            raise ArrayError(wrong)
    out, lse = (open_output(path) for path in (directory.output_path(manifest), directory.lse_path(manifest)))
    return ZarrSink(manifest.problem, out, lse, manifest.rows, manifest.out_tokens)


@contextmanager
def outputs_locked(directory: RunDirectory, manifest: Manifest) -> Iterator[None]:
    """Hold output and lse for this process: other run directories may name them too. Raises LockedError."""
    places = [directory.output_path(manifest), directory.lse_path(manifest)]
    with ExitStack() as held:
        for path in sorted(p for p in places if not p.is_relative_to(directory.path)):  # what is in it is held with it
            held.enter_context(_locked(path))
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    make_directory(path)
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                f"{path}: the process of another run directory writes there; wait for it, or name another output or lse"
            ) from error
        except OSError:  # a file system that cannot lock a directory: the run directory's own lock holds
            pass
        yield
    finally:
        os.close(number)


def outputs_exist(directory: RunDirectory, manifest: Manifest) -> bool:
    """Return whether the output and lse arrays are there, as far as what describes them tells."""
    return all(holds_array(path) for path in (directory.output_path(manifest), directory.lse_path(manifest)))


def is_complete(directory: RunDirectory) -> bool:
    """Return whether every row of the run is finished, by what is on disk."""
    manifest = directory.manifest()
    if not outputs_exist(directory, manifest):
        return False
    covers = directory.store(manifest).covers()
    return all(sum(cover is None for cover in lane.values()) == manifest.rows.filled for lane in covers)


def damaged_rows(directory: RunDirectory, manifest: Manifest) -> Iterator[tuple[int, int, bool]]:
    """Read the output and lse of every finished row; yield (lane, row, whether it is what was written).

    Raises ArrayError where the arrays cannot be opened.
    """
    store, sink = directory.store(manifest), open_outputs(directory, manifest)
    for header, _ in store.headers():
        if header.finished:
            yield header.lane, header.row, sink.holds(header.lane, header.row, header.checksum)


def missing_rows(directory: RunDirectory, manifest: Manifest) -> Iterator[tuple[int, int]]:
    """Yield (lane, row) of the finished rows whose output is not there: a look that does not grow with the output.

    The size of every stored chunk is looked at, and ``_LOOKED_AT_BYTES`` are read: all that there is of a small run.
    ``damaged_rows`` reads all of any.
    """
    store, sink = directory.store(manifest), open_outputs(directory, manifest)
    finished = [header for header, _ in store.headers() if header.finished]
    left = _LOOKED_AT_BYTES
    for header in reversed(finished):
        left -= sink.row_bytes(header.row)
        there = sink.is_there(header.lane, header.row)
        if not there or (left >= 0 and not sink.holds(header.lane, header.row, header.checksum)):
            yield header.lane, header.row
