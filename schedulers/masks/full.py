"""Every query sees every key."""

from cqsa_stream.schedulers.masks.bands import Band, Mask

__all__ = ["full"]


def full(rows: range, keys: int) -> Mask:
    """Return the mask of queries at these positions over keys at positions 0 to ``keys - 1``."""
    return Mask([Band(rows.start, rows.stop, 0, keys)], "full")
