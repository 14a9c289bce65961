"""A text that is drawn again in its place, on a terminal; elsewhere one after the other."""

import shutil
import time
from typing import TextIO

from cqsa_stream.observers.streams import in_its_letters

__all__ = ["Screen"]

_UP, _CLEAR = "\x1b[{}A", "\x1b[0J"


class Screen:
    """Shows one text at a time."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._lines = file, 0

    def show(self, text: str) -> None:
        """Draw a text in the place of the last one; lines are cut where the terminal ends."""
        self.clear()
        text = in_its_letters(text, self._file)
        if not self._file.isatty():
            print(text, file=self._file, flush=True)
            return
        columns, rows = shutil.get_terminal_size()
        lines = [line[: columns - 1] for line in text.splitlines()][: max(1, rows - 1)]
        print("\n".join(lines), file=self._file, flush=True)
        self._lines = len(lines)

    def clear(self) -> None:
        """Remove the text that is shown."""
        if self._lines:
            print(_UP.format(self._lines), end=f"\r{_CLEAR}", file=self._file, flush=True)
        self._lines = 0

    def wait(self, seconds: float) -> None:
        """Let the reader look at it."""
        time.sleep(seconds)
