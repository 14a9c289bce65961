"""The results of a run on disk: made, opened, held by one process, and checked against what was written."""

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cqsa_stream.errors import LockedError, MismatchError
from cqsa_stream.operations.sums import forward_sums
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.storage.atomic import make_directory, open_regular
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.output import METADATA, create_array, described, holds_array, open_output
from cqsa_stream.storage.partials import Header

if TYPE_CHECKING:
    from cqsa_stream.engine.sinks import ZarrSink

__all__ = ["Results"]

_MOST_METADATA_BYTES = 1 << 20
_LOOKED_AT_BYTES = 64 << 20
_log = logging.getLogger(__name__)
_Described = tuple[tuple[int, ...], str, tuple[int, ...]]  # shape, dtype and chunks of an array


class Results:
    """The output and lse of a run, by what its manifest says, and its partials, which say what is finished."""

    def __init__(self, directory: RunDirectory, manifest: Manifest) -> None:
        self.output, self.lse = directory.output_path(manifest), directory.lse_path(manifest)
        self._directory, self._manifest = directory, manifest
        problem, tokens = manifest.problem, manifest.out_tokens
        self._wanted: dict[Path, _Described] = {
            self.output: (problem.out_shape, problem.out_dtype, (1, 1, tokens, problem.value_dim)),
            self.lse: (problem.out_shape[:3], "float32", (1, 1, manifest.rows.chunk_tokens)),
        }

    def prepare(self) -> None:
        """Create the arrays where they are missing, or what describes them is damaged."""
        for path, expected in self._wanted.items():
            make_directory(path)
            if holds_array(path) and (wrong := _misdescribed(path, expected)):
                (path / METADATA).replace(path / (METADATA + ".damaged"))
                _log.warning("%s; it is set aside and written again", wrong)
            if not holds_array(path):
                try:
                    create_array(path, *expected)
                except ArrayError:
                    if not holds_array(path):  # else another worker has just done so
                        raise

    def sink(self, at_a_time: int = 1, guard: Callable[[], object] | None = None) -> "ZarrSink":
        """Open both arrays, to write so many files of a chunk at a time, each as the guard allows. Raises ArrayError
        where they are missing, or not described as they must be.
        """
        import torch  # a status writes nothing, and does not wait for it

        from cqsa_stream.engine.sinks import Stored, ZarrSink

        for path, expected in self._wanted.items():
            if holds_array(path) and (wrong := _misdescribed(path, expected)):
                raise ArrayError(wrong)
        problem, rows = self._manifest.problem, self._manifest.rows
        lse = Stored(open_output(self.lse), torch.float32, rows.chunk_tokens)
        out = Stored(open_output(self.output), getattr(torch, problem.out_dtype), self._manifest.out_tokens)
        return ZarrSink([[lse, out]], [rows], problem.output_heads, at_a_time, guard)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold both for this process: other run directories may name them too. Raises LockedError."""
        outside = [path for path in self._wanted if not path.is_relative_to(self._directory.path)]
        with ExitStack() as held:
            for path in sorted(outside):  # what is in the run directory is held with it
                held.enter_context(_locked(path))
            yield

    @property
    def exist(self) -> bool:
        """Whether the arrays are there, as far as what describes them shows."""
        return all(map(holds_array, self._wanted))

    @property
    def complete(self) -> bool:
        """Whether every row of the run is finished, by what is on disk."""
        filled = self._manifest.rows.filled
        return self.exist and all(
            sum(cover is None for cover in lane.values()) == filled
            for lane in self._directory.store(self._manifest).covers()
        )

    def checked(self) -> Iterator[tuple[int, int, bool]]:
        """Read all of every finished row; yield (lane, row, whether it is what was written).

        Raises ArrayError where the arrays cannot be opened.
        """
        sink = self.sink()
        for header in self._finished():
            yield header.lane, header.chunk, sink.holds(header.sum, header.lane, header.chunk, header.checksum)

    def missing(self) -> Iterator[tuple[int, int]]:
        """Yield (lane, row) of the finished rows that are not there: a look that does not grow with the output.

        The size of every stored chunk is looked at, and ``_LOOKED_AT_BYTES`` are read: all that there is of a small
        run. ``checked`` reads all of any.
        """
        finished = list(self._finished())
        if not finished:
            return
        sink, left, [by_rows] = self.sink(), _LOOKED_AT_BYTES, forward_sums(self._manifest.problem)
        for header in reversed(finished):
            place = header.sum, header.lane, header.chunk
            left -= len(self._manifest.rows.span(header.chunk)) * by_rows.left_bytes
            if not sink.is_there(*place) or (left >= 0 and not sink.holds(*place, header.checksum)):
                yield header.lane, header.chunk

    def _finished(self) -> Iterator[Header]:
        return (header for header, _ in self._directory.store(self._manifest).headers() if header.finished)


def _misdescribed(path: Path, expected: _Described) -> str:
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
