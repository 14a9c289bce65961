"""Events as JSON lines."""

import json
import time
from dataclasses import asdict, replace
from typing import TextIO

from cqsa_stream.events import Ended, Event, Progressed

__all__ = ["JsonLines"]


class JsonLines:
    """One JSON object for each event but progress within a second of the last."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progressed):
            if time.monotonic() - self._last < 1:
                return
            self._last = time.monotonic()
        if isinstance(event, Ended):  # its spans are thousands
            event = replace(event, spans=())
        print(json.dumps({"type": type(event).__name__.lower(), **asdict(event)}), file=self._file, flush=True)
