"""Bridges to other libraries, each in a file of its own that alone imports it."""

from importlib import import_module
from typing import Any

__all__ = ["sdpa", "transformers"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cqsa_stream.integrations' has no attribute {name!r}")
    return import_module(f"cqsa_stream.integrations.{name}")
