"""The results of a run on disk: made, opened, held by one process, and checked against what was written."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cqsa_stream.errors import LockedError, MismatchError
from cqsa_stream.manifest import Manifest
from cqsa_stream.run import RunDirectory
from cqsa_stream.sinks import ZarrSink
from cqsa_stream.storage.atomic import make_directory
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.output import METADATA, create_array, holds_array, open_for_writing

__all__ = ["damaged_rows", "is_complete", "open_outputs", "outputs_exist", "outputs_locked", "prepare_outputs"]

_log = logging.getLogger(__name__)


def prepare_outputs(directory: RunDirectory, manifest: Manifest) -> None:
    """Create the output and lse arrays where they are missing, or what describes them is damaged."""
    problem, tokens = manifest.problem, manifest.out_tokens
    out = (problem.out_shape, problem.out_dtype, (1, 1, tokens, problem.value_dim))
    _prepare(directory.output_path(manifest), *out)
    _prepare(directory.lse_path(manifest), problem.out_shape[:3], "float32", (1, 1, manifest.rows.chunk_tokens))


def _prepare(path: Path, shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]) -> None:
    make_directory(path)
    if holds_array(path):
        try:
            array = open_for_writing(path)
        except ArrayError as error:
            (path / METADATA).replace(path / (METADATA + ".damaged"))
            _log.warning("%s; it is set aside and written again", error)
        else:
            found = (tuple(array.shape), array.dtype.name, tuple(array.chunk_layout.write_chunk.shape or ()))
            if found != (shape, dtype, chunk):
                raise MismatchError(f"{path}: shape, dtype, chunks {found}; this run wrote {(shape, dtype, chunk)}")
            return
    create_array(path, shape, dtype, chunk)


def open_outputs(directory: RunDirectory, manifest: Manifest) -> ZarrSink:
    """Open both arrays. Raises ArrayError."""
    out, lse = (open_for_writing(path) for path in (directory.output_path(manifest), directory.lse_path(manifest)))
    return ZarrSink(manifest.problem, out, lse, manifest.rows, manifest.out_tokens)


@contextmanager
def outputs_locked(directory: RunDirectory, manifest: Manifest) -> Iterator[None]:
    """Hold the output for this process: a copy of the run directory may name it too. Raises LockedError."""
    path = directory.output_path(manifest)
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                f"{path}: another run directory's process writes there; wait for it, or name another output"
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
    for lane, covers in enumerate(store.covers()):
        for row, cover in covers.items():
            if cover is None:
                yield lane, row, sink.holds(lane, row, store.finished_checksum(lane, row))
