"""The errors that users see, and the exit code of each.

    CqsaError
    ├── InputError      2   bad usage or bad input          (also a ValueError)
    ├── BudgetError     4   the plan does not fit           (carries the plan)
    ├── LockedError     5   another process works in the run
    ├── MismatchError   6   inputs or problem differ from those that the run began with
    └── RunStopped      3   stopped before the end, resumable (130 when by Ctrl-C)

Storage raises its own ``ArrayError`` (2) and ``FullDiskError`` (3): it does not know this package.
"""

from cqsa_stream.storage.errors import ArrayError, FullDiskError

__all__ = [
    "ArrayError",
    "BudgetError",
    "CqsaError",
    "FullDiskError",
    "InputError",
    "LockedError",
    "MismatchError",
    "RunStopped",
]


class CqsaError(Exception):
    """Base of the errors of this package."""

    exit_code = 1


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


class RunStopped(CqsaError):
    """The run stopped before its end, at a checkpoint: the same call resumes it."""

    exit_code = 3
