"""Who watches a run: the observers of a call or a command, together. Each is called with every event."""

import logging
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from cqsa_stream.errors import InputError
from cqsa_stream.events import Event, Observer
from cqsa_stream.observers.bar import ProgressBar
from cqsa_stream.observers.jsonl import JsonLines
from cqsa_stream.observers.lines import PlainLines

__all__ = ["checked", "everyone", "shown", "terminal_observers"]

_log = logging.getLogger(__name__)


def checked(observers: Any) -> tuple[Observer, ...]:
    """Return a call's observers. Raises InputError where they are no functions."""
    found = tuple(observers) if isinstance(observers, Iterable) else (observers, None)
    if not all(map(callable, found)):
        raise InputError("observers: expected a sequence of functions that take an event")
    return found


def everyone(observers: Iterable[Observer]) -> Observer:
    """Return an observer that passes each event on to all. None can hurt the run: one that raises is called no more."""
    watching = dict(enumerate(observers))

    def observe(event: Event) -> None:
        for number, observer in tuple(watching.items()):
            try:
                observer(event)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                del watching[number]
                name = getattr(observer, "__qualname__", type(observer).__name__)
                found = f"{type(error).__name__}: {error}"
                _log.warning("observer %s raised %s; it is told no more, the run goes on", name, found)

    return observe


def terminal_observers(*, as_json: bool, quiet: bool, verbose: bool, opening: str) -> tuple[Observer, ...]:
    """Return who watches a run of the command line: a bar on a terminal, else lines; JSON lines go to stdout.

    They say at once what is being opened, where that takes more than a moment: torch must be imported first.
    """
    observers: list[Observer] = [JsonLines(sys.stdout)] if as_json else []
    if not quiet:
        kind = ProgressBar if sys.stderr.isatty() else PlainLines
        watching = kind(sys.stderr, verbose=verbose)
        if "torch" not in sys.modules:
            with suppress(OSError):  # nobody reads it
                watching.opening(opening)
        observers.append(watching)
    return tuple(observers)


def shown(progress: object) -> tuple[Observer, ...]:
    """Return what shows the progress of a call: a bar on a terminal, in a notebook one of its own, else lines; nothing
    where it is not wanted.

    Raises InputError where ``progress`` is no flag.
    """
    if not isinstance(progress, bool):
        raise InputError(f"progress {progress!r}; expected True or False")
    if not progress:
        return ()
    from tqdm.auto import tqdm

    notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    return (ProgressBar(sys.stderr, tqdm) if notebook or sys.stderr.isatty() else PlainLines(sys.stderr),)
