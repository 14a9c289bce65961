"""Exact attention over sequences that fit neither the GPU nor host memory.

Importing the package imports nothing heavy; the first use of a name does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cqsa_stream.api import Run, attention, open_run, plan
    from cqsa_stream.errors import (
        ArrayError,
        BudgetError,
        CqsaError,
        FullDiskError,
        InputError,
        LockedError,
        MismatchError,
        RunStopped,
    )

__version__ = "0.1.0"

_HOMES = {
    "ArrayError": "errors",
    "BudgetError": "errors",
    "CqsaError": "errors",
    "FullDiskError": "errors",
    "InputError": "errors",
    "LockedError": "errors",
    "MismatchError": "errors",
    "Run": "api",
    "RunStopped": "errors",
    "attention": "api",
    "open_run": "api",
    "plan": "api",
}

__all__ = [
    "ArrayError",
    "BudgetError",
    "CqsaError",
    "FullDiskError",
    "InputError",
    "LockedError",
    "MismatchError",
    "Run",
    "RunStopped",
    "attention",
    "open_run",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cqsa_stream' has no attribute {name!r}")
    return getattr(import_module(f"cqsa_stream.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
