"""Where arrays are: URLs as users of TensorStore and of fsspec write them, as key-value stores of TensorStore."""

import os
from typing import Any

from cqsa_stream.storage.errors import ArrayError

__all__ = ["is_url", "kvstore"]

_ALIASES = {"gcs": "gs", "s3a": "s3", "local": "file"}
_SCHEMES = ("file", "gs", "http", "https", "memory", "s3")
_ARCHIVES = ("zip",)


def is_url(source: str) -> bool:
    """Return whether a source is a URL rather than a path."""
    return "://" in source or "::" in source


def kvstore(url: str) -> str | dict[str, Any]:
    """Return TensorStore's name for a URL; ``zip://inside::url`` is fsspec's for what is inside an archive.

    Credentials come from the environment. S3: AWS_ACCESS_KEY_ID or what else AWS offers; AWS_ENDPOINT_URL_S3 or
    AWS_ENDPOINT_URL for other servers, AWS_REGION or AWS_DEFAULT_REGION. Raises ArrayError.
    """
    outer, chained, base = url.partition("::")
    if chained:
        scheme, _, inside = outer.partition("://")
        if scheme not in _ARCHIVES:
            raise ArrayError(f"{url}: {scheme}:: is not known; expected zip://inside::url, or a URL without '::'")
        found = kvstore(base)
        inside = inside.strip("/") + "/" * bool(inside.strip("/"))
        if isinstance(found, dict):
            return {"driver": "zip", "base": {**found, "path": found["path"].rstrip("/")}, "path": inside}
        return f"{found.rstrip('/')}|zip:{inside}"
    scheme, _, rest = url.partition("://")
    scheme = _ALIASES.get(scheme, scheme)
    if scheme not in _SCHEMES:
        raise ArrayError(f"{url}: {scheme}:// is not known; expected one of {', '.join(_SCHEMES)}, or a path")
    if "|" in rest:  # TensorStore's own way to chain
        return f"{scheme}://{rest}"
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
