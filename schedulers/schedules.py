"""All schedules, by name. A new one is a file and a line here."""

from cqsa_stream.schedulers.cqs import Cqs
from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.model.memory import Layout
from cqsa_stream.schedulers.rectangular import Rectangular
from cqsa_stream.schedulers.tasks import Schedule

__all__ = ["AUTO", "SCHEDULES", "make_schedule"]

AUTO = "auto"
SCHEDULES: dict[str, type[Schedule]] = {kind.name: kind for kind in (Cqs, Rectangular)}


def make_schedule(name: str, grid: Grid, layout: Layout) -> Schedule:
    """Return the schedule of that name over the grid. Raises ValueError where it cannot be."""
    return SCHEDULES[name].over(grid, layout.rows_per_task, layout.stride)
