"""Where arrays are: URLs as users of TensorStore and of fsspec write them, as key-value stores of TensorStore."""

import os
import re
from typing import Any

from cqsa_stream.storage.errors import ArrayError

__all__ = ["is_url", "kvstore", "local_name", "redacted", "without_secrets"]

_ALIASES = {"gcs": "gs", "s3a": "s3", "local": "file"}
_SCHEMES = ("file", "gs", "http", "https", "memory", "s3")
_ARCHIVES = ("zip",)
_NO_HOST = ("file", "local", "memory", "tar", *_ARCHIVES)  # what follows is a name: it may hold @ and ?
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
_CHAIN = re.compile(rf"::(?={_SCHEME}://)")
_PIPE = re.compile(r"\|(?=[A-Za-z0-9_+.-]+:)")
_URL = re.compile(rf"{_SCHEME}://\S+")


def is_url(source: str) -> bool:
    """Return whether a source is a URL rather than a path."""
    return "://" in source or "::" in source


def local_name(source: str) -> str:
    """Return the local name behind a ``file://`` URL, or what else was given. Raises ArrayError for another host."""
    rest = source.removeprefix("file://")
    if rest == source or "|" in rest:
        return source
    host = rest.partition("/")[0]
    if host not in ("", "localhost"):
        raise ArrayError(f"{source}: names a file of the host {host!r}; expected file:///path, or a path")
    return rest.removeprefix(host)


def without_secrets(url: str) -> str:
    """Return a URL without user and password, and with a bare ``?`` for a query; anything else as it is."""
    return "::".join(map(_bare, _CHAIN.split(url)))


def redacted(text: str) -> str:
    """Return a message, the URLs in it without secrets."""
    return _URL.sub(lambda found: without_secrets(found[0]), text)


def _bare(url: str) -> str:
    scheme, colon, rest = url.partition("://")
    if not colon or not re.fullmatch(_SCHEME, scheme) or scheme.lower() in _NO_HOST:
        return url
    pipe = _PIPE.search(rest)
    rest, pipes = (rest[: pipe.start()], rest[pipe.start() :]) if pipe else (rest, "")
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = host.rpartition(":")[2] if ":" in host else ""
    odd = "@" not in host and port.strip("0123456789]") != ""  # it is a password with a character that ends a host
    rest = rest[(rest if odd else host).rfind("@") + 1 :]
    path, question, _ = rest.partition("?")
    return f"{scheme}://{path}{question}{pipes}"


def kvstore(url: str) -> str | dict[str, Any]:
    """Return TensorStore's name for a URL; ``zip://inside::url`` is fsspec's for what is inside an archive.

    Credentials come from the environment. S3: AWS_ACCESS_KEY_ID or what else AWS offers; AWS_ENDPOINT_URL_S3 or
    AWS_ENDPOINT_URL for other servers, AWS_REGION or AWS_DEFAULT_REGION. Raises ArrayError.
    """
    if re.search(r"\s", url):
        raise ArrayError("a URL with white space; write it as %20")
    outer, chained, base = url.partition("::")
    if chained:
        scheme, _, inside = outer.partition("://")
        if scheme not in _ARCHIVES:
            raise ArrayError(
                f"{without_secrets(url)}: {scheme}:: is not known; expected zip://inside::url, or a URL without '::'"
            )
        found = kvstore(base)
        inside = inside.strip("/") + "/" * bool(inside.strip("/"))
        if isinstance(found, dict):
            return {"driver": "zip", "base": {**found, "path": found["path"].rstrip("/")}, "path": inside}
        file, question, query = found.partition("?")
        return f"{file.rstrip('/')}{question}{query}|zip:{inside}"
    scheme, _, rest = url.partition("://")
    scheme = _ALIASES.get(scheme, scheme)
    if scheme not in _SCHEMES:
        raise ArrayError(
            f"{without_secrets(url)}: {scheme}:// is not known; expected one of {', '.join(_SCHEMES)}, or a path"
        )
    if "|" in rest:  # TensorStore's own way to chain
        return f"{scheme}://{rest}"
    if scheme in ("s3", "gs") and ("@" in rest.partition("/")[0] or "?" in rest):
        raise ArrayError(
            f"a URL of a bucket ({scheme}://) with a user, password or query; expected {scheme}://bucket/path: "
            "credentials come from the environment"
        )
    if scheme == "s3":
        return _s3(rest)
    path, question, query = rest.partition("?")
    return f"{scheme}://{path.rstrip('/')}/{question}{query}"


def _s3(rest: str) -> dict[str, Any]:
    bucket, _, path = rest.partition("/")
    store: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path.strip("/") + "/" * bool(path.strip("/"))}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        store |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
    elif region:
        store["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        store["aws_credentials"] = {"type": "environment"}
    return store
