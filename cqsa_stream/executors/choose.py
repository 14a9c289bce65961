"""Who does the work of a run, by its options."""

from collections.abc import Callable

from cqsa_stream.engine.job import Job
from cqsa_stream.executors.local import Processes
from cqsa_stream.executors.ray import Actors
from cqsa_stream.options import Options
from cqsa_stream.run.directory import RunDirectory

__all__ = ["crew_of"]


def crew_of(directory: RunDirectory, options: Options) -> Callable[[Job], None] | None:
    """Return who does the work where several processes or a cluster are wanted; None where this process does."""
    if options.executor == "ray":
        return Actors(directory, len(options.devices), options.address)
    return Processes(directory, options.devices) if len(options.devices) > 1 else None
