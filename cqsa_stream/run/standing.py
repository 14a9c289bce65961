"""Where a run stands, by its directory alone: without what computes, so that looking at it takes no time."""

import os
import time
from pathlib import Path
from typing import Any

from cqsa_stream.engine.progress import Progress
from cqsa_stream.machine.places import local_path
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.run.pair_map import pair_map
from cqsa_stream.run.status import status

__all__ = ["Standing", "run_place"]


def run_place(path: str | os.PathLike[str]) -> Path:
    """Return the directory of a run that is named by itself, or by its output. Raises InputError for a URL."""
    named = local_path(path)
    named = named if named.name else named.absolute()
    beside = named.with_name(f"{named.name}.run")
    return beside if not RunDirectory(named).begun and RunDirectory(beside).begun else named


class Standing:
    """A run directory, and the covers in it as they were read last."""

    def __init__(self, path: Path) -> None:
        self.directory = RunDirectory(path)
        self.manifest: Manifest = self.directory.manifest()
        self._covers: list[dict[int, int | None]] = []
        self._seen_ns: int | None = None  # when the partials had changed last, as they were read

    def __repr__(self) -> str:
        done = Progress(self.manifest.problem, self.manifest.grid, self._stored_covers(durable=False))
        return (
            f"<Run {self.directory.path}: {self.manifest.problem}; {done.pairs_done} of {done.pairs_total} pairs done>"
        )

    def pairs(self, height: int = 24, width: int = 64) -> list[list[float | None]]:
        """Return the map of pairs: which part of each is done, by row and column chunks; None where none is needed.

        Chunks beyond ``height`` and ``width`` are put together.
        """
        return pair_map(self.manifest.grid, self._stored_covers(durable=False), height, width)

    def status(self, *, durable: bool = True) -> dict[str, Any]:
        """Return where the run stands, by what is on disk, and the last session's figures.

        ``durable=False``: by what is seen on disk, which may be a moment before it survives a power cut; it does not
        burden a run that works, and reads nothing again that has not changed.
        """
        return status(self.directory, self.manifest, self._stored_covers(durable=durable))

    def _stored_covers(self, *, durable: bool) -> list[dict[int, int | None]]:
        """Return the covers of the stored partials; those read before, where nothing was renamed since."""
        store = self.directory.store(self.manifest)
        try:
            changed_ns = store.directory.stat().st_mtime_ns
        except FileNotFoundError:
            changed_ns = 0
        if durable or changed_ns != self._seen_ns:
            settled = time.time_ns() - changed_ns > 10**9  # clocks of file systems are coarse
            self._covers, self._seen_ns = store.covers(), changed_ns if settled else None
        if durable:
            store.make_durable()
        return self._covers
