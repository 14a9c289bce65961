"""What can go wrong with stored bytes."""

__all__ = ["ArrayError", "DamagedError", "FullDiskError"]


class ArrayError(ValueError):
    """An array cannot be opened or read: missing, truncated, of the wrong kind."""

    exit_code = 2


class DamagedError(Exception):
    """A stored file does not carry the checksum of its content."""


class FullDiskError(OSError):
    """The disk is full; the run is intact and can be resumed."""

    exit_code = 3
