"""What is left of the shares of a run, by the covers on disk."""

from collections.abc import Iterator, Mapping, Sequence

from cqsa_stream.run.manifest import Manifest
from cqsa_stream.schedulers.model.memory import Layout
from cqsa_stream.schedulers.schedules import make_schedule
from cqsa_stream.schedulers.shares import Share
from cqsa_stream.schedulers.tasks import Schedule, Task

__all__ = ["Left"]

Covers = Sequence[Mapping[int, int | None]]


class Left:
    """The tasks of a run of several shares that lack a pair."""

    def __init__(self, manifest: Manifest, covers: Covers) -> None:
        """``covers``: for each lane, by row chunk; None where the row is finished. Raises ValueError."""
        assert manifest.chosen is not None
        self._manifest, self._covers = manifest, covers
        layout = Layout.from_dict(manifest.chosen.layout)
        self.schedule: Schedule = make_schedule(manifest.chosen.schedule, manifest.grid, layout)

    def tasks(self, share: int) -> Iterator[Task]:
        """Yield those of a share."""
        lanes = self._manifest.problem.lanes
        for lane in range(lanes):
            for task in Share(share, self._manifest.shares).tasks(self.schedule, lane, lanes):
                if any(self._lacks(lane, row, column) for row, column in task.pairs):
                    yield task

    def shares(self) -> list[int]:
        """Return the shares that have such tasks."""
        return [share for share in range(self._manifest.shares) if next(self.tasks(share), None) is not None]

    def _lacks(self, lane: int, row: int, column: int) -> bool:
        cover = self._covers[lane].get(row, 0)
        return cover is not None and not cover >> column & 1
