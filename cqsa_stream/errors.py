"""The errors that users see, and the exit code of each.

CqsaError               1   failed
├── InputError          2   bad usage or bad input          (also a ValueError)
├── ArrayError          2   an array cannot be opened or read   (also a ValueError)
├── BudgetError         4   the plan does not fit
├── LockedError         5   another process works in the run
├── MismatchError       6   inputs or problem differ from those that the run began with
├── NoMemoryError       1   the host or the device has no memory left   (also a MemoryError)
├── FullDiskError       3   the disk is full, resumable         (also an OSError)
└── RunStopped          3   stopped before the end, resumable where an output was named
    └── RunInterrupted 130  by Ctrl-C                       (also a KeyboardInterrupt)
"""

from cqsa_stream.storage.errors import ArrayError, CqsaError, FullDiskError

__all__ = [
    "ArrayError",
    "BudgetError",
    "CqsaError",
    "FullDiskError",
    "InputError",
    "LockedError",
    "MismatchError",
    "NoMemoryError",
    "RunInterrupted",
    "RunStopped",
]


class InputError(CqsaError, ValueError):
    """Bad usage or bad input; nothing was written."""

    exit_code = 2


class BudgetError(CqsaError):
    """No plan fits the budgets; the message names the smallest that would do."""

    exit_code = 4


class LockedError(CqsaError):
    """Another live process works in the run directory."""

    exit_code = 5


class MismatchError(CqsaError):
    """The inputs or the problem are not those that the run began with."""

    exit_code = 6


class NoMemoryError(CqsaError, MemoryError):
    """The host or the device has no memory left; a run on disk is intact and can be resumed."""


class RunStopped(CqsaError):
    """The run stopped before its end: on disk at a checkpoint, and the same call resumes it; in memory it is gone."""

    exit_code = 3


class RunInterrupted(RunStopped, KeyboardInterrupt):
    """Ctrl-C stopped the run before its end, at a checkpoint: the same call resumes it."""

    exit_code = 130
