"""The standard streams of a command, where they are closed, or nobody reads them."""

import os
import sys
from pathlib import Path
from typing import TextIO

__all__ = ["flushed", "in_its_letters", "stand_in_for_what_is_closed"]

_PLAIN = str.maketrans({"█": "#", "▓": "+", "▒": "+", "░": "+", "·": "."})


def stand_in_for_what_is_closed() -> None:
    """Let no file that is opened later take the number of a closed stdin, stdout or stderr, where others print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends


def in_its_letters(text: str, stream: TextIO) -> str:
    """Return a text as a stream can write it: pictures of plain letters where it knows no others."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    return text


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
