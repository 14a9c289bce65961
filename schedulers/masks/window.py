"""A query sees the last keys up to and including that at its own position: a causal sliding window."""

from cqsa_stream.schedulers.masks.bands import Band, Mask

__all__ = ["window"]


def window(rows: range, keys: int, width: int) -> Mask:
    """Return the mask in which the query at position i sees the keys i - width + 1 to i.

    Raises ValueError where the width is below 1.
    """
    if width < 1:
        raise ValueError(f"window {width}; expected at least 1: a key's own position is in it")
    return Mask([Band(rows.start, rows.stop, 0, keys, 1 - width, 0)], f"window of {width}")
