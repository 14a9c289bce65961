"""Local paths, as users name where results and run directories are."""

import os
import re
from pathlib import Path

from cqsa_stream.errors import InputError

__all__ = ["local_path"]

_MOST_NAME_BYTES = 240  # what is written beside a file, and made of its name, is longer
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # a Path has made one slash of two


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a result or run directory; ``~`` is expanded, ``file:///x`` is ``/x``.

    Raises InputError for a URL, and for what is no path.
    """
    try:
        text = os.fsdecode(path)
        text.encode()
    except TypeError as error:
        raise InputError(f"found a {type(path).__name__}; expected a path like out.zarr") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{path!r}: the name is not UTF-8, and results cannot be opened by it; rename it") from error
    if "\0" in text or any(len(part.encode()) > _MOST_NAME_BYTES for part in text.split("/")):
        raise InputError(f"{text[:60]!r}...: no name of a file; expected names of up to {_MOST_NAME_BYTES} bytes")
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() == "file":
        host, slash, rest = text[len("file:") :].removeprefix("//").partition("/")
        if host not in ("", "localhost") or not slash:
            raise InputError("a file:// URL of another host; expected file:///path, or a path")
        text = f"/{rest.lstrip('/')}"
    elif scheme:
        raise InputError(
            f"a URL ({scheme[1]}://...): results and run directories are local paths; name one, and copy the result "
            "when the run is done"
        )
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path raises for a user whom nobody knows
