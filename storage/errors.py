"""What can go wrong with stored bytes; and the base of all errors of the package, which is here since storage imports
nothing of it. ``cqsa_stream.errors`` draws the whole tree.
"""

__all__ = ["ArrayError", "CqsaError", "DamagedError", "FullDiskError"]


class CqsaError(Exception):
    """Base of the errors that this package raises for its users."""

    exit_code = 1


class ArrayError(CqsaError, ValueError):
    """An array cannot be opened or read: missing, truncated, of the wrong kind."""

    exit_code = 2


class DamagedError(Exception):
    """A stored file does not carry the checksum of its content."""


class FullDiskError(CqsaError, OSError):
    """The disk is full; the run is intact and can be resumed."""

    exit_code = 3
