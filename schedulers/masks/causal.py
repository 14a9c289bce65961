"""A query sees the keys at positions up to and including its own."""

from cqsa_stream.schedulers.masks.bands import Band, Mask

__all__ = ["causal"]


def causal(rows: range, keys: int) -> Mask:
    """Return the mask of queries at these positions over keys at positions 0 to ``keys - 1``."""
    return Mask([Band(rows.start, rows.stop, 0, keys, None, 0)], "causal")
