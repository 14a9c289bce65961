"""What the command line says: data on stdout, messages on stderr, and the names of options as flags."""

import errno
import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from logging import Formatter, LogRecord
from typing import Any

from cqsa_stream.commands.options import FLAGS, RUN_OPTIONS
from cqsa_stream.observers.streams import in_its_letters

__all__ = ["Messages", "in_flags", "print_data", "say", "show"]

_NAMES = "|".join(sorted(FLAGS, key=len, reverse=True))
_GIVEN = re.compile(rf"""(?<![\w/.-])({_NAMES})=("[^"]*"|[^\s,;:)"]*[^\s,;:)".])""")
_FIRST = re.compile(rf"^({_NAMES})(?= (?!memory\b)|:)")
_INNER = re.compile(rf"(?<![\w/.-])({'|'.join(name for name in FLAGS if '_' in name)})(?![\w/.-])")


def in_flags(text: str, *, of_input: bool = True) -> str:
    """Return a message with the options as flags: messages name them as Python does, ``host_memory="4GiB"``.

    ``of_input``: it is about what the user named, and may begin with the option's name.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        shown = FLAGS[name]
        if value == "False":
            return match[0]
        if (name in RUN_OPTIONS and RUN_OPTIONS[name].kind is bool) or value == "True":
            return shown
        return f"{shown} {value.strip(chr(34))}"

    text = _GIVEN.sub(flag, text)
    if of_input:
        text = _FIRST.sub(lambda match: FLAGS[match[1]], text)
    return _INNER.sub(lambda match: FLAGS[match[1]], text)


class Messages(Formatter):
    """Warnings as the command line says them; in a log with the time."""

    def format(self, record: LogRecord) -> str:
        stamp = "" if sys.stderr is not None and sys.stderr.isatty() else time.strftime("%Y-%m-%d %H:%M:%S ")
        return f"{stamp}cqsa: {in_flags(record.getMessage(), of_input=False)}"


def say(message: str) -> None:
    """Tell the user, if there is one who reads it."""
    with suppress(OSError):
        print(f"cqsa: {message}", file=sys.stderr, flush=True)


def show(found: dict[str, Any], as_json: bool, described: Callable[[dict[str, Any]], str]) -> None:
    """Print what was found: as JSON, or as text."""
    print_data(json.dumps(found) if as_json else described(found))


def print_data(data: object) -> None:
    """Print what a command is for. Raises OSError where it cannot be."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "stdout is closed; nothing could be printed")
    print(in_its_letters(str(data), sys.stdout), flush=True)
