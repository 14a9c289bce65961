"""Exact attention over sequences that fit neither the GPU nor host memory.

Importing the package imports nothing heavy; the first use of a name does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cqsa_stream import masks
    from cqsa_stream.api import attention, plan
    from cqsa_stream.errors import (
        ArrayError,
        BudgetError,
        CqsaError,
        FullDiskError,
        InputError,
        LockedError,
        MismatchError,
        NoMemoryError,
        RunInterrupted,
        RunStopped,
    )
    from cqsa_stream.run.opened import Run, open_run

__version__ = "0.1.0"

_HOMES = {
    "ArrayError": "errors",
    "BudgetError": "errors",
    "CqsaError": "errors",
    "FullDiskError": "errors",
    "InputError": "errors",
    "LockedError": "errors",
    "MismatchError": "errors",
    "NoMemoryError": "errors",
    "Run": "run.opened",
    "RunInterrupted": "errors",
    "RunStopped": "errors",
    "attention": "api",
    "open_run": "run.opened",
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
    "NoMemoryError",
    "Run",
    "RunInterrupted",
    "RunStopped",
    "attention",
    "masks",
    "open_run",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name == "masks":
        return import_module("cqsa_stream.masks")
    if name not in _HOMES:
        raise AttributeError(f"module 'cqsa_stream' has no attribute {name!r}")
    return getattr(import_module(f"cqsa_stream.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
