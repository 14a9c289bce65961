"""Which options of ``attention`` a library's call leaves to the user."""

from typing import Any

from cqsa_stream.errors import InputError

__all__ = ["refuse_options"]

_ITS_OWN = ("out", "layout", "return_lse", "queries", "q_start", "run_dir", "lse", "fresh")


def refuse_options(options: dict[str, Any]) -> None:
    """Raise InputError where an option would change what a call returns, or where it goes."""
    for name in _ITS_OWN:
        if name in options:
            raise InputError(f"{name}: a call returns a tensor as the library expects it; leave it out")
