"""The standard streams of a command, where they are closed, or nobody reads them."""

import os
import sys
from pathlib import Path
from typing import TextIO

__all__ = ["flushed", "stand_in_for_what_is_closed"]


def stand_in_for_what_is_closed() -> None:
    """Let no file that is opened later take the number of a closed stdin, stdout or stderr, where others print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends


def flushed(stream: TextIO | None) -> bool:
    """Flush; where nobody can read it, send the rest nowhere, so that the process does not fail for it at its end."""
    if stream is None:
        return True
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return False
    return True
